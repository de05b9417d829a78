"""``rsgwm directions collect``: for adapters that were trained elsewhere, or on other rows than are at hand."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import COUNT, PATH
from mlx_rsgwm.training.config import TrainConfig


@click.command()
@click.argument("adapter_folder", metavar="ADAPTER", type=PATH)
@shared.corpus("or questions without answers, or lines of a .txt file", required=True)
@shared.base()
@shared.batch_rows(8)
@shared.rows(256)
@shared.max_seq_length()
@click.option(
    "--directions",
    "rank",
    type=COUNT,
    default=TrainConfig.directions,
    show_default=True,
    help=f"{shared.SKETCH_COLUMNS}; at least 1.",
)
@click.option("--full", is_flag=True, help="Keep whole matrices instead of sketches.")
@shared.replace()
@common_options
def collect(
    console: Console,
    adapter_folder: Path,
    corpus: Path,
    base_name: str | None,
    rows: int,
    batch_rows: int,
    max_tokens: int,
    rank: int,
    full: bool,
    replace: bool,
) -> None:
    """Pass once over rows and keep sketches of the second moments of ADAPTER's inputs, by role, as training does.

    The rows should be of the adapter's own task; they need no answers. Rows of a corpus keep their roles, all others
    are draft rows. Weights stay as they are.

    \b
    Examples:
      rsgwm directions collect adapters/change --corpus corpus/change --base smollm2-135m
      rsgwm directions collect adapters/change --corpus questions.jsonl --directions 128
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.inference.open import load_base_for
    from mlx_rsgwm.models.adapter import DIRECTIONS_FILE, Adapter
    from mlx_rsgwm.training.collect_directions import collect_directions, load_rows, save_directions

    if not rank and not full:
        raise RsgwmError("--directions 0 would keep nothing; give a number of columns, or --full for whole matrices")
    adapter = Adapter.load(adapter_folder)
    if DIRECTIONS_FILE in (adapter.manifest.get("files") or {}) and not replace:
        source = adapter.directions_metadata.get("source", "an unknown source")
        raise RsgwmError(f"{adapter_folder} already has directions ({source}); pass --replace to replace them")
    data = load_rows(corpus, adapter)
    base = load_base_for([adapter], base_name, console.progress)
    arrays, metadata = collect_directions(
        base, adapter, data, 0 if full else rank, batch_rows, max_tokens, rows, console.seed, console.progress
    )
    save_directions(adapter, base, data, arrays, metadata)
    counts = {
        counted: {name.partition("/")[2]: int(n) for name, n in metadata.items() if name.startswith(f"{counted}/")}
        for counted in ("rows", "tokens")
    }
    size = (adapter_folder / DIRECTIONS_FILE).stat().st_size
    inputs = len({name.partition("/")[2].rpartition(".")[0] for name in arrays})
    rows_read = ", ".join(f"{counts['tokens'][role]} tokens of {n} {role} rows" for role, n in counts["rows"].items())
    console.line(f"{adapter_folder}: directions of {inputs} inputs from {rows_read} ({size / 1e6:.1f} MB)")
    modules = len(adapter.modules())
    console.result({"adapter": str(adapter_folder), "modules": modules, "inputs": inputs, **counts, "bytes": size})
