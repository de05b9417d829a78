"""Training one LoRA or DoRA adapter: mlx-lm's layers, our own loop.

Loss is taken on completion tokens only, logits are computed only at their positions, batches hold one role each and
are bucketed by length, and two things are kept besides: the second moment of the gradients as importance, that of the
layers' inputs as directions; once all steps are done, where the prompts lie in the bare base. With a :class:`Saving`
the run can be stopped at any moment; resumed later, its final weights are bit-identical.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_rsgwm.core.distributed import ALONE, Processes
from mlx_rsgwm.core.dtypes import name_of
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.folders import exclusive
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.signals import deferred_interrupts
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.batching import TokenRow, plan_steps, row_notes
from mlx_rsgwm.data.row_hashes import KEY, RowRecord, record_of, record_of_base
from mlx_rsgwm.data.template import Template, Tokenizer
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.rounded_weights import check_rounding, rounded_bytes, rounded_weights
from mlx_rsgwm.training.checkpoints import Saving, clear_run, prune, read_checkpoint
from mlx_rsgwm.training.config import ALL_LINEAR, TrainConfig
from mlx_rsgwm.training.layers import expert_keys, linear_keys, lora_layers, updates_beneath
from mlx_rsgwm.training.losses import held_out_loss
from mlx_rsgwm.training.memory import MemoryEstimate, MemoryOptions, check_estimate, estimate, memory_line, memory_now
from mlx_rsgwm.training.prompt_statistics import prompt_fields
from mlx_rsgwm.training.reporting import NO_REPORTS, Reports
from mlx_rsgwm.training.rounds import round_steps
from mlx_rsgwm.training.state import TrainingRun
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
    beneath: Adapter | None = None,
) -> Adapter:
    """Train one adapter on ``corpus`` and return it with importance, initialisation and provenance.

    The base model is left as it was found. ``held_out`` is scored before and after, and as ``config`` says in between.
    ``saving`` keeps checkpoints and snapshots in the adapter's folder; the caller saves the adapter there afterwards.
    Of several ``processes`` all return the same adapter, and only the first writes. ``warm_start`` are weights to begin
    with; such an adapter records no initialisation. ``test`` is scored once, at the end. ``beneath`` is an adapter that
    the base has on all the while, and that does not change.

    Raises:
        RsgwmError: rows that do not fit, keys that match nothing, a rank above a layer's dimensions, weights that
            cannot be rounded, too little memory, a run that cannot be resumed, a loss that is not finite (names step
            and rows).
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP, after the step was finished and saved.
    """
    message = partial(_message, progress, label)
    config = _with_keys(base, config, message)
    memory = memory or MemoryOptions()
    memory.apply()
    data = _read_data(base, corpus, held_out, test, config, (warm_start, beneath), message)
    plan = plan_of(data.train.rows, config)
    started_from: dict[str, Any] = {"warm_start": warm_start.describe()} if warm_start else {}
    started_from |= {"beneath": beneath.content_hash()} if beneath else {}
    identity = {**_identity(base, corpus, config, held_out, processes), **started_from}
    about = {**_provenance(base, corpus, config, data), **started_from, **_seen_before(corpus, data)}
    started = time.monotonic()
    model: Any = base.model
    with ExitStack() as stack:
        init = stack.enter_context(lora_layers(model, config.spec(), config.init_seed))
        for note in warm_start.put_into(model, config.scale) if warm_start else ():
            message(note)
        stack.enter_context(updates_beneath(model, beneath))
        stack.enter_context(rounded_weights(model, config.qat))
        run = TrainingRun(model, data.train.rows, plan, data.held_out.rows, config, label, processes)
        need = _estimate(base, data.train.rows, config, processes, run.directions.nbytes)
        progress.detail(f"{label}: {check_estimate(need, memory.enforce)}")
        _warn_of_few_steps(len(plan), config, message)
        if saving and processes.writes:
            stack.enter_context(exclusive(saving.folder))
        _begin(run, saving, identity, progress)
        with deferred_interrupts() as interruption:
            run.execute(progress, saving, identity, about, reports, interruption)
        run.settle()
        after, tested = (_loss(model, rows.rows, config) for rows in (data.held_out, data.test))
        weights, importance = run.result()
        progress.detail(f"{label}: {memory_line()}")
    arrays, directions = importance.arrays(), run.directions.arrays()
    mx.eval(weights, arrays, directions)
    manifest = {
        "kind": "trained",
        **about,
        "seconds": round(run.seconds + time.monotonic() - started, 3),
        **_tokens_and_memory(run, need),
        "held_out_loss": {"before": run.before, "after": after},
        **({"held_out_rows": data.held_out.counts()} if held_out else {}),
        **({"test_loss": tested, "test_rows": data.test.counts()} if test else {}),
        **_course(run),
    }
    adapter = Adapter(config.spec(), weights, arrays, importance.metadata(), {} if warm_start else init, manifest)
    about_directions = {**run.directions.metadata(), "data_hash": corpus.hash, "source": "training"}
    prompts = prompt_fields(base, corpus, config, message)
    return replace(adapter, directions=directions, directions_metadata=about_directions, **prompts)


@dataclass(frozen=True)
class _Rows:
    """Token rows of one set of data; how many were left out as too long, and how many ask what is trained on, too."""

    rows: list[TokenRow]
    dropped: int = 0
    also_trained: int = 0

    def counts(self) -> dict[str, int]:
        """What a manifest says of them."""
        cut = sum(row.cut for row in self.rows)
        counts = {"rows": len(self.rows), "rows_too_long": self.dropped, "rows_cut": cut}
        return {**counts, "also_trained": self.also_trained} if self.also_trained else counts


@dataclass(frozen=True)
class _Data:
    """All rows of a run; ``before``: what base and warm start have been trained on."""

    train: _Rows
    held_out: _Rows
    test: _Rows
    before: RowRecord


def _message(progress: Progress, label: str, text: str) -> None:
    progress.message(f"{label}: {text}")


def _with_keys(base: Base, config: TrainConfig, message: Callable[[str], None]) -> TrainConfig:
    """``config`` with the names of all linear layers where it asks for all."""
    if config.keys != ALL_LINEAR:
        return config
    if experts := expert_keys(base.model):
        message(f"the experts' layers are not adapted, unlike in mlx-lm: {', '.join(experts)}")
    return replace(config, keys=linear_keys(base.model))


def _read_data(
    base: Base,
    corpus: TrainingData,
    held_out: TrainingData | None,
    test: TrainingData | None,
    config: TrainConfig,
    before: tuple[WarmStart | None, Adapter | None],
    message: Callable[[str], None],
) -> _Data:
    """Tokenise all data, and tell what is left out, cut, or asked both in training and elsewhere.

    Raises:
        RsgwmError: a loss between the steps is asked for, and there is nothing held out.
    """
    train, held, tested = (
        _Rows(*source.token_rows(base.tokenizer, config.max_tokens, config.long_rows)) if source else _Rows([])
        for source in (corpus, held_out, test)
    )
    for note in (*row_notes(train.rows), *row_notes(held.rows), *row_notes(tested.rows)):
        message(note)
    cut = sum(row.cut for row in held.rows)
    if held.dropped or cut:
        message(
            f"{held.dropped} held-out rows of {len(held.rows) + held.dropped} left out, {cut} cut: "
            f"they have more than {config.max_tokens} tokens"
        )
    warm_start, beneath = before
    trained = record_of_base(base.path)
    trained |= warm_start.record if warm_start else RowRecord()
    trained |= record_of(beneath.manifest, beneath.name) if beneath else RowRecord()
    seen = RowRecord.of_keys(row.keys for row in train.rows) | trained
    held, tested = (replace(rows, also_trained=sum(seen.has(row.keys) for row in rows.rows)) for rows in (held, tested))
    for name, rows in (("held-out", held), ("test", tested)):
        if rows.also_trained:
            message(
                f"{rows.also_trained} of {len(rows.rows)} {name} rows ask what is trained on, too; "
                "their loss says nothing of new questions"
            )
    if config.validate_every and not held.rows:
        raise RsgwmError(f"validate_every is {config.validate_every}, but there are no held-out rows to score")
    return _Data(train, held, tested, trained)


def plan_of(rows: Sequence[TokenRow], config: TrainConfig) -> list[list[int]]:
    """Indices of the rows of every step of a run, or of one round of it.

    Raises:
        RsgwmError: steps that the rounds cannot share; all rounds at once, which only a pool trains.
    """
    plan = plan_steps(rows, config.step_rows, config.seed, config.epochs, config.steps)
    if config.rounds is None:
        return plan
    if not config.rounds.number:
        raise RsgwmError("rounds are for a pool, which is merged between them: rsgwm pool train --rounds")
    return round_steps(plan, [rows[step[0]].role for step in plan], config.rounds)


def _warn_of_few_steps(steps: int, config: TrainConfig, message: Callable[[str], None]) -> None:
    if steps < FEW_STEPS and not config.steps and not config.rounds:
        more = math.ceil(3 * FEW_STEPS / steps) * config.epochs
        message(f"only {steps} steps, few to learn from; more rows, or --epochs {more}")


def _begin(run: TrainingRun, saving: Saving | None, identity: Mapping[str, Any], progress: Progress) -> None:
    """Take up the checkpoint that is there; with none, clear another run's away and score the held-out rows."""
    checkpoint = read_checkpoint(saving, identity, progress) if saving else None
    if checkpoint is not None:
        run.restore(checkpoint)
        progress.message(f"{run.label}: continuing after step {checkpoint.step} of {len(run.plan)}")
    else:
        if saving and run.processes.writes:
            clear_run(saving.folder)
        run.before = _loss(run.model, run.held_rows, run.config)


def _loss(model: Any, rows: Sequence[TokenRow], config: TrainConfig) -> dict[str, float]:
    return held_out_loss(model, rows, config.batch_size) if rows else {}


def _tokens_and_memory(run: TrainingRun, need: MemoryEstimate) -> dict[str, Any]:
    """What the manifest says the run took."""
    trained = sum(step.trained_tokens for step in run.history)
    return {
        "tokens": {"trained": trained, "real": run.real, "padding": run.padded},
        "memory": {**memory_now(), "estimate": need.total},
    }


def _course(run: TrainingRun) -> dict[str, Any]:
    """What the manifest says of the steps."""
    return {
        "validation": [[score.step, score.loss, score.by_role] for score in run.scores],
        "kept_step": run.kept_step,
        "history": [[step.step, step.role, round(step.loss, 6), step.trained_tokens] for step in run.history],
    }


def check_layers(model: Any, config: TrainConfig) -> None:
    """Find out before any data is read whether ``config`` names layers that the model has, and a rank that they take.

    Raises:
        RsgwmError: keys that match nothing, a rank above a layer's dimensions, weights that cannot be rounded.
    """
    if config.keys == ALL_LINEAR:
        config = replace(config, keys=linear_keys(model))
    with lora_layers(model, config.spec(), config.init_seed):
        if config.qat:
            check_rounding(model, config.qat)


def _identity(
    base: Base, corpus: TrainingData, config: TrainConfig, held_out: TrainingData | None, processes: Processes
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued."""
    return {
        "config": config.describe(),
        "base": base.fingerprint,
        "dtype": float_type(base.model),
        "data": corpus.hash,
        "template": corpus.template.hash if corpus.template else None,
        "held_out": held_out.hash if held_out else None,
        "processes": processes.size,
    }


def _provenance(base: Base, corpus: TrainingData, config: TrainConfig, data: _Data) -> dict[str, Any]:
    """What the manifest, and every checkpoint, says of where the adapter comes from."""
    notes = row_notes(data.train.rows)
    return {
        "base": base.describe(),
        **({"template": corpus.template.describe()} if corpus.template else {}),
        "config": config.describe(),
        "data": {**corpus.describe(), **data.train.counts(), **({"notes": notes} if notes else {})},
        "seed": config.seed,
        "versions": versions(),
    }


def _seen_before(corpus: TrainingData, data: _Data) -> dict[str, Any]:
    """The rows that base and warm start were trained on, which the adapter has seen, too, with its own."""
    return {KEY: (data.before | corpus.record()).describe()} if data.before != RowRecord() else {}


def _estimate(
    base: Base, rows: Sequence[TokenRow], config: TrainConfig, processes: Processes, directions: int
) -> MemoryEstimate:
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
        directions,
        rounded_bytes(base.model, config.qat) if config.qat else 0,
    )


def finish(adapter: Adapter, saving: Saving) -> None:
    """Save a finished run's adapter into its folder; its checkpoints keep their weights, but not their state."""
    adapter.save(saving.folder)
    prune(saving.folder, saving.keep, with_state=0)


def float_type(model: Any) -> str:
    """The types of a model's floating parameters (``float32``), which a run's bits depend on."""
    flat: Any = tree_flatten(model.parameters())
    return ", ".join(sorted({name_of(value.dtype) for _, value in flat if mx.issubdtype(value.dtype, mx.floating)}))
