"""``rsgwm fuse``: a model of a base and an adapter, once most of the adapter is known to survive in it."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.old_names import also_positional
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import SHARE, SOURCE, OneOf

# mlx_rsgwm.converters.fuse.fuse.FORMATS, which is slow to import; a test holds them equal.
FORMATS = ["keep", "float32", "float16", "bfloat16", "8bit", "4bit", "3bit"]


@click.command()
@click.argument("adapter", type=SOURCE)
@also_positional("out")
@shared.out("a new folder; required")
@shared.base()
@click.option(
    "--format",
    "target",
    type=OneOf(FORMATS),
    default="keep",
    show_default=True,
    help="Of the result's weights: as the base's, a float type, or quantised (all layers, groups of 64).",
)
@click.option(
    "--min-share",
    type=SHARE,
    default=0.9,
    show_default=True,
    help="Share of the adapter's update that must survive in that format.",
)
@click.option("--force", is_flag=True, help="Write the model however little survives.")
@common_options
def fuse(
    console: Console,
    adapter: Path | str,
    out: Path,
    base_name: str | None,
    target: str,
    min_share: float,
    force: bool,
) -> None:
    """Work ADAPTER into its base's weights and write the model to a new folder.

    ADAPTER is a folder (ours, mlx-lm's or PEFT's), a .gguf file, a Hub id or hf://owner/name@revision.

    Before anything is written, the share of every layer's update that survives rounding to the format is measured;
    afterwards the written model's logits are compared. Exits 3 when less than the stated share survives.

    Example: rsgwm fuse runs/drafter --out drafter-model --format float16
    """
    from mlx_rsgwm.converters.fuse.fuse import fuse as fuse_adapter

    result = fuse_adapter(
        adapter, base_name, out, target=target, min_share=min_share, force=force, progress=console.progress
    )
    replaced = f", {result['replaced']} parameters replaced" if result["replaced"] else ""
    console.line(
        f"{out}: {result['modules']} modules of {result['base']} fused{replaced}, {result['share']:.1%} of their "
        "updates survive; "
        f"{result['logit_share']:.1%} of the effect on logits, which are off by at most {result['max_abs_logit']:.1e}"
    )
    if reason := result.get("form_reason"):
        console.line(f"for mlx-lm alone: transformers would not load these arrays as they are meant ({reason})")
    console.result(result)
