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
    from mlx_rsgwm.merging.quantisation_vector import extract as extract_vector
    from mlx_rsgwm.models.adapter_sources import load_adapter
    from mlx_rsgwm.training.checkpoints import claim_adapter_folder

    first, second = (load_adapter(source, progress=console.progress) for source in (through, plain))
    vector = extract_vector(first, second)
    _tell_unrecorded(console, second, first)
    if names := vector.manifest["trained_differently"]:
        console.progress.warning(
            f"warning: {first.where} and {second.where} were trained differently in {', '.join(names)} too; "
            "the vector holds that as well"
        )
    with claim_adapter_folder(out):
        vector.save(out)
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
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.merging.quantisation_vector import check_plain, patch, require_base, vector_format
    from mlx_rsgwm.models.adapter_sources import load_adapter
    from mlx_rsgwm.models.base import resolve_base
    from mlx_rsgwm.training.checkpoints import claim_adapter_folder

    if weight is not None and rows is not None:
        raise RsgwmError("--choose chooses λ; leave out --lambda, or give it and leave out --choose")
    adapter = load_adapter(receiver, base_name, progress=console.progress)
    quantvec = load_adapter(vector, base_name, progress=console.progress)
    vector_format(quantvec)
    check_plain(adapter)
    if base_name is not None:
        require_base(resolve_base(base_name, console.progress), [adapter, quantvec])
    with claim_adapter_folder(out):
        choice = None if rows is None else _choose(console, adapter, quantvec, rows, base_name)
        chosen = choice.weight if choice is not None else 1.0 if weight is None else weight
        patched = patch(adapter, quantvec, chosen, choice.describe() if choice is not None else None)
        _tell_unrecorded(console, adapter, quantvec)
        patched.save(out)
    told = patched.manifest["quantization_vector"]
    origin = "zero-shot" if told["zero_shot"] else "λ chosen on its rows, not zero-shot"
    if told["of_itself"]:
        origin = "its own vector, which is the ceiling and no transfer"
    console.line(
        f"{out}: {adapter.where} + {chosen:g} · {quantvec.where}, for {_shown(told['quantization'])}; {origin}"
    )
    if choice is not None:
        console.line(
            f"loss of the rounded model there {choice.loss:.4f}, with λ chosen on other rows {choice.nested:.4f}, "
            f"without the vector {choice.losses['0']:.4f}"
        )
    console.result({"out": str(out), "rank": patched.spec.rank, **told})


def _choose(console: Console, adapter: Any, vector: Any, rows: Path, base_name: str | None) -> Any:
    from mlx_rsgwm.data.batching import tell_rows
    from mlx_rsgwm.data.loading import load_data
    from mlx_rsgwm.data.row_hashes import record_of
    from mlx_rsgwm.inference.open import load_base_for
    from mlx_rsgwm.merging.vector_weight import choose_weight
    from mlx_rsgwm.training.config import TrainConfig

    data, _ = load_data(rows, None)
    base = load_base_for([adapter, vector], base_name, console.progress)
    token_rows, dropped = data.token_rows(base.tokenizer, TrainConfig.max_tokens, "drop")
    tell_rows(token_rows, dropped, TrainConfig.max_tokens, console.progress)
    trained_on = sum(record_of(adapter.manifest, adapter.name).has(row.keys) for row in token_rows)
    if trained_on:
        console.progress.warning(f"NOT NEW: {adapter.where} was trained on what {trained_on} of these rows ask")
    return choose_weight(base, adapter, vector, token_rows, console.seed, progress=console.progress)


def _tell_unrecorded(console: Console, adapter: Any, other: Any) -> None:
    if adapter.base_fingerprint is None:
        console.progress.warning(
            f"warning: {adapter.where} does not record its base; it is taken to be {other.base_name}"
        )


def _shown(quantization: dict[str, Any]) -> str:
    from mlx_rsgwm.models.quantisation import QuantFormat

    return str(QuantFormat(**quantization))
