"""``rsgwm adapter importance``: for adapters that were trained elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.options import shared
from mlx_rsgwm.cli.options.kinds import SOURCE


@click.command()
@click.argument("source", metavar="ADAPTER", type=SOURCE)
@shared.corpus(required=True)
@shared.base()
@shared.batch_size(8)
@shared.max_seq_length()
@shared.mask_prompt()
@shared.replace()
@shared.out("a new folder, for an adapter of another format; else ADAPTER itself")
@common_options
def importance(
    console: Console,
    source: Path | str,
    corpus: Path,
    base_name: str | None,
    batch_size: int,
    max_tokens: int,
    mask_prompt: bool,
    replace: bool,
    out: Path | None,
) -> None:
    """Pass once over data and keep the root mean square of the gradients as ADAPTER's importance.

    For adapters that were trained elsewhere: a folder (mlx-lm's or PEFT's), a .gguf file, a Hub id or
    hf://owner/name@revision. With --out the adapter is written there, as mlx-lm has it. Weights stay as they are.

    Example: rsgwm adapter importance adapters --corpus corpus/change --base smollm2-135m
    """
    from mlx_rsgwm.core.errors import RsgwmError
    from mlx_rsgwm.core.folders import new_folder, require_empty
    from mlx_rsgwm.data.loading import load_data
    from mlx_rsgwm.inference.open import load_base_for
    from mlx_rsgwm.models.adapter_sources import load_adapter
    from mlx_rsgwm.training.estimate_importance import collect_importance, save_importance

    adapter = load_adapter(source, base_name, progress=console.progress)
    if out is not None:
        require_empty(out)
    elif adapter.own_folder is None:
        raise RsgwmError(f"{adapter.where} is not a folder that importance could stand in; give --out")
    elif adapter.importance and not replace:
        origin = adapter.importance_metadata.get("source", "an unknown source")
        raise RsgwmError(f"{adapter.where} already has importance ({origin}); pass --replace to replace it")
    data, _ = load_data(corpus, None, mask_prompt)
    base = load_base_for([adapter], base_name, console.progress)
    arrays, metadata = collect_importance(base, adapter, data, batch_size, max_tokens, console.progress)
    if out is None:
        save_importance(adapter, base, data, arrays, metadata)
    else:
        with new_folder(out) as work:
            save_importance(load_adapter(adapter.save(work)), base, data, arrays, metadata)
    batches = {name.removeprefix("steps/"): int(text) for name, text in metadata.items() if name.startswith("steps/")}
    where = str(out or adapter.where)
    console.line(f"{where}: importance from {batches['all']} batches")
    console.result({"adapter": where, "batches": batches, "source": metadata["source"]})
