"""``rsgwm parity``: does torch with PEFT compute the same as MLX with this adapter?"""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options.paths import PATH, SOURCE

TOLERANCE = 1e-3


@click.command()
@click.argument("adapter", type=SOURCE)
@click.option("--base", help="Base model: Hub id, folder, .gguf file or smollm2-135m; default: the adapter's own.")
@click.option("--peft", type=PATH, help="Compare this PEFT folder; default: convert on the fly.")
@click.option("--tolerance", default=TOLERANCE, show_default=True, help="Largest difference of two logits that passes.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of both sides; the default tolerance is for float32.",
)
@click.option("--certificate", type=PATH, help="Write the result to this JSON file.")
@click.option(
    "--device", default="auto", show_default=True, help="Torch's: auto (MPS, CUDA, else the CPU), mps, cuda or cpu."
)
@common_options
def parity(
    console: Console,
    adapter: Path | str,
    base: str | None,
    peft: Path | None,
    tolerance: float,
    dtype: str,
    certificate: Path | None,
    device: str,
) -> None:
    """Compare ADAPTER in MLX with torch and PEFT: logits, greedy continuations, perplexity, every adapted layer.

    ADAPTER is a folder (ours, mlx-lm's or PEFT's), a .gguf file, a Hub id or hf://owner/name@revision.

    Both sides have the same base, dtype and tokens, torch with eager attention. Exits 3 and names the first layer that
    differs when they differ by more than the tolerance, or when either side does not apply the adapter.

    Example: rsgwm parity runs/drafter --base smollm2-135m
    """
    from mlx_rsgwm.converters.parity.check import check_parity
    from mlx_rsgwm.core import files
    from mlx_rsgwm.core.errors import CheckFailed
    from mlx_rsgwm.core.folders import make_folder

    result = check_parity(
        adapter, base, peft_folder=peft, tolerance=tolerance, dtype=dtype, device=device, progress=console.progress
    )
    if certificate is not None:
        make_folder(certificate.absolute().parent)
        files.write_json(certificate, result)
    console.line(
        f"parity: max |Δlogit| {result['max_abs_logit']:.1e} over {result['tokens']} tokens "
        f"({result['dtype']}, torch {result['device']}) — {'passed' if result['passed'] else 'failed'}"
    )
    greedy, perplexity = result["greedy"], result["perplexity"]
    console.line(
        f"greedy: {greedy['agree']} of {greedy['tokens']} tokens alike; perplexity with the adapter "
        f"{_shown(perplexity['mlx']['adapted'])} in MLX, {_shown(perplexity['torch']['adapted'])} in torch"
    )
    console.result(result)
    if not result["passed"]:
        raise CheckFailed(f"parity of {adapter} with torch failed: {'; '.join(result['failures'])}")


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
