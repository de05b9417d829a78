"""``rsgwm adapter importance``: for adapters that were trained elsewhere."""

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
@shared.batch_size(8)
@shared.max_seq_length()
@shared.mask_prompt()
@shared.replace()
@common_options
def importance(
    console: Console,
    adapter_folder: Path,
    corpus: Path,
    base_name: str | None,
    batch_size: int,
    max_tokens: int,
    mask_prompt: bool,
    replace: bool,
) -> None:
    """Pass once over data and keep the root mean square of the gradients as ADAPTER's importance.

    For adapters of mlx_lm.lora, or of PEFT after `rsgwm convert from-peft`. Weights stay as they are.

    Example: rsgwm adapter importance adapters --corpus corpus/change --base smollm2-135m
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.data.loading import load_data
    from mlx_rsgwm.inference.open import load_base_for
    from mlx_rsgwm.models.adapter import Adapter
    from mlx_rsgwm.training.estimate_importance import collect_importance, save_importance

    adapter = Adapter.load(adapter_folder)
    if adapter.importance and not replace:
        source = adapter.importance_metadata.get("source", "an unknown source")
        raise RsgwmError(f"{adapter_folder} already has importance ({source}); pass --replace to replace it")
    data, _ = load_data(corpus, None, mask_prompt)
    base = load_base_for([adapter], base_name, console.progress)
    arrays, metadata = collect_importance(base, adapter, data, batch_size, max_tokens, console.progress)
    save_importance(adapter, base, data, arrays, metadata)
    batches = {name.removeprefix("steps/"): int(text) for name, text in metadata.items() if name.startswith("steps/")}
    console.line(f"{adapter_folder}: importance from {batches['all']} batches")
    console.result({"adapter": str(adapter_folder), "batches": batches, "source": metadata["source"]})
