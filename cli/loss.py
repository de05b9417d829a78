"""``rsgwm adapter loss``: how well a base, and adapters on it, predict the completions of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_rsgwm.cli.console import Console, common_options
from mlx_rsgwm.cli.old_names import also_positional
from mlx_rsgwm.cli.options import shared


@click.command()
@also_positional("corpus")
@shared.corpus("required")
@shared.adapter("none is the base alone")
@shared.base("the adapters' own, else smollm2-135m")
@shared.rows(0)
@shared.batch_rows(8)
@shared.max_seq_length()
@common_options
def loss(
    console: Console,
    corpus: Path,
    adapters: tuple[Path | str, ...],
    base_name: str | None,
    rows: int,
    batch_rows: int,
    max_tokens: int,
) -> None:
    """Mean negative log-likelihood, in nats per completion token, of a corpus under the base and each adapter.

    Prompts do not count; dropout is off.

    Example: rsgwm adapter loss --corpus corpus/change --adapter adapters/change
    """
    from mlx_rsgwm.data.batching import row_notes
    from mlx_rsgwm.data.loading import load_data
    from mlx_rsgwm.data.row_hashes import RowRecord, not_recorded, record_of, record_of_base
    from mlx_rsgwm.inference.open import load_base_for, slots_of
    from mlx_rsgwm.models.adapter_sources import load_adapters
    from mlx_rsgwm.training.losses import held_out_loss

    loaded = {adapter.where: adapter for adapter in load_adapters(adapters, base_name, progress=console.progress)}
    examples, _ = load_data(corpus, None)
    base = load_base_for(list(loaded.values()), base_name, console.progress)
    token_rows, dropped = examples.token_rows(base.tokenizer, max_tokens, "drop")
    chosen = token_rows[:rows] if rows else token_rows
    for note in row_notes(chosen):
        console.progress.message(f"{corpus}: {note}")
    slots = slots_of(base, loaded)
    fused = record_of_base(base.path)
    records = {name: record_of(adapter.manifest, name) | fused for name, adapter in loaded.items()}
    if fused != RowRecord():
        records["base"] = fused
    seen = {name: sum(record.has(row.keys) for row in chosen) for name, record in records.items()}
    trained_on = {  # null: nothing was met, but not everything that it was trained on is recorded
        name: seen[name] / len(chosen) or (None if record.unknown else 0.0) for name, record in records.items()
    }
    results: dict[str, Any] = {}
    with console.progress.task("loss", 1 + len(loaded)) as advance:
        for name in ("base", *loaded):
            with slots.using(None if name == "base" else name):
                results[name] = held_out_loss(slots.model, chosen, batch_rows)
            advance(1, name)
    for name, values in results.items():
        shown = ", ".join(f"{role} {value:.4f}" for role, value in values.items())
        if seen.get(name):
            console.line(f"NOT NEW: {name} was trained on what {seen[name]} of the {len(chosen)} rows ask")
        if name in records and records[name].unknown:
            console.line(not_recorded(records[name].unknown))
        console.line(
            f"{name}: {shown} nats per completion token, {len(chosen)} rows{f' ({dropped} too long)' * bool(dropped)}"
        )
    counts = {"rows": len(chosen), "rows_too_long": dropped}
    console.result({**counts, "loss": results, "trained_on": trained_on})
