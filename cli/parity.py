"""``rsgwm parity``: does torch with PEFT compute the same as MLX with this adapter?"""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PATH, SOURCE, Number

TOLERANCE = 1e-3


@click.command()
@click.argument("adapter", type=SOURCE)
@shared.base()
@click.option("--peft", type=PATH, help="Compare this PEFT folder.  [default: convert on the fly]")
@click.option(
    "--tolerance",
    type=Number(0),
    default=TOLERANCE,
    show_default=True,
    help="Largest difference of two logits that passes.",
)
@shared.dtype(["float32", "float16", "bfloat16"], "the default tolerance is for float32")
@shared.device()
@shared.out("a JSON file: the certificate")
@common_options
def parity(
    console: Console,
    adapter: Path | str,
    base_name: str | None,
    peft: Path | None,
    tolerance: float,
    dtype: str,
    out: Path | None,
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
        adapter, base_name, peft_folder=peft, tolerance=tolerance, dtype=dtype, device=device, progress=console.progress
    )
    if out is not None:
        make_folder(out.absolute().parent)
        files.write_json(out, result)
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
