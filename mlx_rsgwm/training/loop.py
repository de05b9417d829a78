"""Training one LoRA or DoRA adapter: mlx-lm's layers, our own loop.

Loss is taken on completion tokens only, logits are computed only at their positions, batches hold one role each and
are bucketed by length, and the second moment of the gradients is kept as importance. With a :class:`Saving` the run can
be stopped at any moment; resumed later, its final weights are bit-identical.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_rsgwm.core.distributed import ALONE, Processes
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import exclusive
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.batching import TokenRow, plan_steps, row_notes
from mlx_rsgwm.data.row_hashes import KEY, RowRecord, record_of_base
from mlx_rsgwm.data.template import Template, Tokenizer
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.training.checkpoints import Saving, deferred_interrupts, prune, read_checkpoint
from mlx_rsgwm.training.config import ALL_LINEAR, TrainConfig
from mlx_rsgwm.training.layers import expert_keys, linear_keys, lora_layers
from mlx_rsgwm.training.losses import held_out_loss
from mlx_rsgwm.training.memory import MemoryEstimate, MemoryOptions, check_estimate, estimate, memory_line, memory_now
from mlx_rsgwm.training.reporting import NO_REPORTS, Reports
from mlx_rsgwm.training.state import Run
from mlx_rsgwm.training.warm_start import WarmStart

# Fewer steps than these hardly move an adapter: whoever sets no number of them is told.
FEW_STEPS = 20


class TrainingData(Protocol):
    """What can be trained on: a :class:`Corpus`, or mlx-lm's formats (``data.examples``)."""

    @property
    def template(self) -> Template | None: ...

    @property
    def hash(self) -> str: ...

    def token_rows(self, tokenizer: Tokenizer, max_tokens: int, long_rows: str) -> tuple[list[TokenRow], int]: ...

    def record(self) -> RowRecord: ...

    def describe(self) -> dict[str, Any]: ...


def train(
    base: Base,
    corpus: TrainingData,
    config: TrainConfig,
    held_out: TrainingData | None = None,
    label: str = "train",
    progress: Progress = SILENT,
    saving: Saving | None = None,
    reports: Reports = NO_REPORTS,
    memory: MemoryOptions | None = None,
    processes: Processes = ALONE,
    warm_start: WarmStart | None = None,
    test: TrainingData | None = None,
) -> Adapter:
    """Train one adapter on ``corpus`` and return it with importance, initialisation and provenance.

    The base model is left as it was found. ``held_out`` is scored before and after, and as ``config`` says in between.
    ``saving`` keeps checkpoints and snapshots in the adapter's folder; the caller saves the adapter there afterwards.
    Of several ``processes`` all return the same adapter, and only the first writes. ``warm_start`` are weights to begin
    with; such an adapter records no initialisation. ``test`` is scored once, at the end.

    Raises:
        RsgwmError: rows that do not fit, keys that match nothing, a rank above a layer's dimensions, too little memory,
            a run that cannot be resumed, a loss that is not finite (names step and rows).
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the step was finished and saved.
    """
    if config.keys == ALL_LINEAR:
        config = replace(config, keys=linear_keys(base.model))
        if experts := expert_keys(base.model):
            progress.message(f"{label}: the experts' layers are not adapted, unlike in mlx-lm: {', '.join(experts)}")
    memory = memory or MemoryOptions()
    memory.apply()
    rows, dropped = corpus.token_rows(base.tokenizer, config.max_tokens, config.long_rows)
    held_rows, held_dropped = (
        held_out.token_rows(base.tokenizer, config.max_tokens, config.long_rows) if held_out else ([], 0)
    )
    held_cut = sum(row.cut for row in held_rows)
    test_rows, test_dropped = test.token_rows(base.tokenizer, config.max_tokens, config.long_rows) if test else ([], 0)
    for note in (*row_notes(rows), *row_notes(held_rows), *row_notes(test_rows)):
        progress.message(f"{label}: {note}")
    if held_dropped or held_cut:
        progress.message(
            f"{label}: {held_dropped} held-out rows of {len(held_rows) + held_dropped} left out, {held_cut} cut: "
            f"they have more than {config.max_tokens} tokens"
        )
    before = record_of_base(base.path)
    if warm_start:
        before |= warm_start.record
    seen = RowRecord.of_keys(row.keys for row in rows) | before
    held_trained, test_trained = (sum(seen.has(row.keys) for row in chosen) for chosen in (held_rows, test_rows))
    for name, shared, chosen in (("held-out", held_trained, held_rows), ("test", test_trained, test_rows)):
        if shared:
            progress.message(
                f"{label}: {shared} of {len(chosen)} {name} rows ask what is trained on, too; "
                "their loss says nothing of new questions"
            )
    if config.validate_every and not held_rows:
        raise RsgwmError(f"validate_every is {config.validate_every}, but there are no held-out rows to score")
    plan = plan_steps(rows, config.step_rows, config.seed, config.epochs, config.steps)
    started_from = {"warm_start": warm_start.describe()} if warm_start else {}
    identity = {**_identity(base, corpus, config, held_out, processes), **started_from}
    about = {**_provenance(base, corpus, config, rows, dropped), **started_from}
    if before != RowRecord():  # it has seen those rows, too
        about[KEY] = (before | corpus.record()).describe()
    started = time.monotonic()
    model: Any = base.model
    with ExitStack() as stack:
        init = stack.enter_context(lora_layers(model, config.spec(), config.init_seed))
        for note in warm_start.put_into(model, config.scale) if warm_start else ():
            progress.message(f"{label}: {note}")
        need = _estimate(base, rows, config, processes)
        progress.message(f"{label}: {check_estimate(need, memory.enforce)}")
        if len(plan) < FEW_STEPS and not config.steps:
            more = math.ceil(3 * FEW_STEPS / len(plan)) * config.epochs
            progress.message(f"{label}: only {len(plan)} steps, few to learn from; more rows, or --epochs {more}")
        run = Run(model, rows, plan, held_rows, config, label, processes)
        if saving and processes.writes:
            stack.enter_context(exclusive(saving.folder))
        checkpoint = read_checkpoint(saving, identity, progress) if saving else None
        if checkpoint is not None:
            run.restore(checkpoint)
            progress.message(f"{label}: continuing after step {checkpoint.step} of {len(plan)}")
        elif held_rows:
            run.before = held_out_loss(model, held_rows, config.batch_size)
        with deferred_interrupts() as interruption:
            run.execute(progress, saving, identity, about, reports, interruption)
        run.settle()
        after = held_out_loss(model, held_rows, config.batch_size) if held_rows else {}
        tested = held_out_loss(model, test_rows, config.batch_size) if test_rows else {}
        weights, importance = run.result()
        progress.message(f"{label}: {memory_line()}")
    arrays = importance.arrays()
    mx.eval(weights, arrays)
    manifest = {
        "kind": "trained",
        **about,
        "seconds": round(run.seconds + time.monotonic() - started, 3),
        "tokens": {
            "trained": sum(step.trained_tokens for step in run.history),
            "real": run.real,
            "padding": run.padded,
        },
        "memory": {**memory_now(), "estimate": need.total},
        "held_out_loss": {"before": run.before, "after": after},
        **({"held_out_rows": _counts(held_rows, held_dropped, held_trained)} if held_out else {}),
        **({"test_loss": tested, "test_rows": _counts(test_rows, test_dropped, test_trained)} if test else {}),
        "validation": [[score.step, score.loss, score.by_role] for score in run.scores],
        "kept_step": run.kept_step,
        "history": [[step.step, step.role, round(step.loss, 6), step.trained_tokens] for step in run.history],
    }
    return Adapter(config.spec(), weights, arrays, importance.metadata(), {} if warm_start else init, manifest)


def check_fit(model: Any, config: TrainConfig) -> None:
    """Find out before any data is read whether ``config`` names layers that the model has, and a rank that they take.

    Raises:
        RsgwmError: keys that match nothing, a rank above a layer's dimensions.
    """
    if config.keys == ALL_LINEAR:
        config = replace(config, keys=linear_keys(model))
    with lora_layers(model, config.spec(), config.init_seed):
        pass


def _identity(
    base: Base, corpus: TrainingData, config: TrainConfig, held_out: TrainingData | None, processes: Processes
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued."""
    return {
        "config": config.describe(),
        "base": base.fingerprint,
        "dtype": _float_type(base.model),
        "data": corpus.hash,
        "template": corpus.template.hash if corpus.template else None,
        "held_out": held_out.hash if held_out else None,
        "processes": processes.size,
    }


def _provenance(
    base: Base, corpus: TrainingData, config: TrainConfig, rows: Sequence[TokenRow], dropped: int
) -> dict[str, Any]:
    """What the manifest, and every checkpoint, says of where the adapter comes from."""
    return {
        "base": base.describe(),
        **({"template": corpus.template.describe()} if corpus.template else {}),
        "config": config.describe(),
        "data": {
            **corpus.describe(),
            **_counts(rows, dropped),
            **({"notes": notes} if (notes := row_notes(rows)) else {}),
        },
        "seed": config.seed,
        "versions": versions(),
    }


def _counts(rows: Sequence[TokenRow], dropped: int, also_trained: int = 0) -> dict[str, int]:
    counts = {"rows": len(rows), "rows_too_long": dropped, "rows_cut": sum(row.cut for row in rows)}
    return {**counts, "also_trained": also_trained} if also_trained else counts


def _estimate(base: Base, rows: Sequence[TokenRow], config: TrainConfig, processes: Processes) -> MemoryEstimate:
    """Memory that the largest batch of this process needs; the LoRA layers must be in the model."""
    longest = max(rows, key=lambda row: len(row.tokens))
    share = -(-min(config.batch_size, len(rows)) // processes.size)
    return estimate(
        base.model,
        base.config,
        share,
        len(longest.tokens),
        share * longest.trained_tokens,
        config.accumulate,
        config.recompute,
    )


def finish(adapter: Adapter, saving: Saving) -> None:
    """Save a finished run's adapter into its folder; its checkpoints keep their weights, but not their state."""
    adapter.save(saving.folder)
    prune(saving.folder, saving.keep, with_state=0)


def _float_type(model: Any) -> str:
    flat: Any = tree_flatten(model.parameters())
    types = {str(value.dtype) for _, value in flat if mx.issubdtype(value.dtype, mx.floating)}
    return ", ".join(name.removeprefix("mlx.core.") for name in sorted(types))
