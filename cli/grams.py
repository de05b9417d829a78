"""``rsgwm adapter grams``: what RegMean needs to know of an adapter's inputs."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import PATH


@click.command()
@click.argument("adapter_folder", metavar="ADAPTER", type=PATH)
@shared.corpus(required=True)
@shared.base()
@shared.batch_rows(8)
@shared.rows(256)
@shared.max_seq_length()
@shared.replace()
@common_options
def grams(
    console: Console,
    adapter_folder: Path,
    corpus: Path,
    base_name: str | None,
    rows: int,
    batch_rows: int,
    max_tokens: int,
    replace: bool,
) -> None:
    """Pass once over data and keep the mean XᵀX of the inputs X of every module that ADAPTER adapts.

    The data should be of the adapter's own task: RegMean looks for the update that answers every adapter's inputs as
    that adapter does. Weights stay as they are.

    Example: rsgwm adapter grams adapters/change --corpus corpus/change --base smollm2-135m
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.data.loading import load_data
    from mlx_rsgwm.inference.open import load_base_for
    from mlx_rsgwm.models.adapter import Adapter
    from mlx_rsgwm.training.grams import GRAMS_FILE, collect_grams, save_grams

    adapter = Adapter.load(adapter_folder)
    if GRAMS_FILE in (adapter.manifest.get("files") or {}) and not replace:
        raise RsgwmError(f"{adapter_folder} already has Gram matrices; pass --replace to replace them")
    data, _ = load_data(corpus, None)
    base = load_base_for([adapter], base_name, console.progress)
    collected, metadata = collect_grams(
        base, adapter, data, batch_rows, max_tokens, rows, console.seed, console.progress
    )
    save_grams(adapter, base, data, collected, metadata)
    size = (adapter_folder / GRAMS_FILE).stat().st_size
    matrices = len({id(gram) for gram in collected.values()})
    console.line(
        f"{adapter_folder}: {matrices} Gram matrices for {len(collected)} modules from {metadata['tokens']} tokens "
        f"({size / 1e6:.0f} MB)"
    )
    console.result(
        {
            "adapter": str(adapter_folder),
            "modules": len(collected),
            "matrices": matrices,
            "rows": int(metadata["rows"]),
            "tokens": int(metadata["tokens"]),
            "bytes": size,
        }
    )
