"""``rsgwm quantvec extract`` and ``apply``: what training through rounding adds, put on another adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import SOURCE


@click.command()
@click.option("--qat", "through", type=SOURCE, required=True, help="Adapter that was trained with `rsgwm train --qat`.")
@click.option("--plain", type=SOURCE, required=True, help="Adapter that was trained alike, without --qat.")
@shared.out("an adapter folder", required=True)
@common_options
def extract(console: Console, through: Path | str, plain: Path | str, out: Path) -> None:
    """Write the quantization vector: the update of an adapter trained through rounding less that of its plain twin.

    Both are trained from one start on the same rows. The difference is exact, of the sum of their ranks; the folder
    says which format it is for.

    Example: rsgwm quantvec extract --qat pool/change-4bit --plain pool/change --out vectors/change-4bit
    """
    from mlx_rsgwm.merging.vector_sources import extract_vector

    vector = extract_vector(through, plain, out, progress=console.progress)
    told: dict[str, Any] = {"out": str(out), "rank": vector.spec.rank, "modules": len(vector.modules())}
    told |= {name: vector.manifest[name] for name in ("quantization", "sources", "trained_differently")}
    console.line(f"{out}: {told['modules']} modules of rank {told['rank']}, for {_shown(told['quantization'])}")
    console.result(told)


@click.command()
@click.argument("receiver", metavar="RECEIVER", type=SOURCE)
@shared.vector(required=True)
@shared.vector_weight()
@shared.choose("λ, instead of --lambda; of RECEIVER's task")
@shared.base()
@shared.out("an adapter folder", required=True)
@common_options
def apply(
    console: Console,
    receiver: Path | str,
    vector: Path | str,
    weight: float | None,
    rows: Path | None,
    base_name: str | None,
    out: Path,
) -> None:
    """Put a quantization vector on RECEIVER, an adapter that was trained without rounding: ΔW + λ V.

    λ = 1 takes no row of RECEIVER's task (zero-shot). --choose tries seven λ, on the model rounded to the vector's
    format, and says what choosing hides. `rsgwm fuse --vector` does both steps at once.

    \b
    Examples:
      rsgwm quantvec apply pool/groups --vector vectors/change-4bit --out patched
      rsgwm quantvec apply pool/groups --vector vectors/change-4bit --choose corpus/held --out patched
    """
    from mlx_rsgwm.merging.vector_sources import apply_vector
    from mlx_rsgwm.models.adapter_sources import load_adapter

    adapter, quantvec = (load_adapter(source, base_name, progress=console.progress) for source in (receiver, vector))
    patched = apply_vector(
        adapter, quantvec, out, weight=weight, choose=rows, base=base_name, seed=console.seed,
        progress=console.progress,
    )  # fmt: skip
    told = patched.manifest["quantization_vector"]
    origin = "zero-shot" if told["zero_shot"] else "λ chosen on its rows, not zero-shot"
    if told["of_itself"]:
        origin = "its own vector, which is the ceiling and no transfer"
    console.line(
        f"{out}: {adapter.where} + {told['lambda']:g} · {quantvec.where}, for {_shown(told['quantization'])}; {origin}"
    )
    if choice := told.get("choice"):
        console.line(
            f"loss of the rounded model there {choice['loss']:.4f}, with λ chosen on other rows "
            f"{choice['nested']:.4f}, without the vector {choice['losses']['0']:.4f}"
        )
    console.result({"out": str(out), "rank": patched.spec.rank, **told})


def _shown(quantization: dict[str, Any]) -> str:
    from mlx_rsgwm.models.quantisation import QuantFormat

    return str(QuantFormat(**quantization))
