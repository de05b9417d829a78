"""Training one LoRA adapter: mlx-lm's layers, our own loop.

Loss is taken on completion tokens only, logits are computed only at their positions, batches hold one role each and
are bucketed by length, and the second moment of the gradients is kept as importance.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_rsgwm.adapter import Adapter, LoraSpec, versions
from mlx_rsgwm.base import Base
from mlx_rsgwm.cpu import cross_entropy
from mlx_rsgwm.data.batching import Batch, TokenRow, make_batch, plan_epoch
from mlx_rsgwm.data.corpus import Corpus, tokenize
from mlx_rsgwm.errors import RsgwmError
from mlx_rsgwm.logits import Head, Hidden, split_head
from mlx_rsgwm.progress import SILENT, Progress
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.importance import Importance


@dataclass(frozen=True)
class Step:
    """One line of the loss history: mean loss in nats per trained token of the step's batch."""

    step: int
    role: str
    loss: float
    trained_tokens: int


def initial_factors(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, mx.array]:
    """lora_a (in, rank) ~ U(±1/sqrt(in)) for every module of ``shapes`` (module → (in, out)), float32.

    The stream is named by seed and module, so that adapters of a pool share A whatever modules each of them adapts.
    """
    factors = {}
    for module, (inputs, _) in shapes.items():
        digest = hashlib.sha256(f"{seed}/{module}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))
        bound = 1 / math.sqrt(inputs)
        factors[f"{module}.lora_a"] = mx.array(generator.uniform(-bound, bound, (inputs, rank)).astype(np.float32))
    return factors


@contextmanager
def lora_layers(model: Any, spec: LoraSpec, seed: int) -> Iterator[dict[str, mx.array]]:
    """Put mlx-lm's LoRA layers into ``model`` with seeded factors; take them out again at the end.

    Yields lora_a at initialisation by parameter name. lora_b starts at zero.
    """
    names = {name for name, _ in model.layers[-1].named_modules()}
    unmatched = sorted(set(spec.keys) - names)
    if unmatched:
        known = sorted(name for name, module in model.layers[-1].named_modules() if hasattr(module, "weight"))
        raise RsgwmError(f"no layer has a module {', '.join(unmatched)}; there are {', '.join(known)}")
    if spec.num_layers > len(model.layers):
        raise RsgwmError(f"num_layers is {spec.num_layers}, but the model has {len(model.layers)} layers")
    layers = len(model.layers) if spec.num_layers == -1 else spec.num_layers
    before = dict(model.named_modules())
    model.freeze()
    parameters = {"rank": spec.rank, "scale": spec.scale, "dropout": spec.dropout, "keys": list(spec.keys)}
    linear_to_lora_layers(model, layers, parameters)
    try:
        trainable: Any = tree_flatten(model.trainable_parameters())
        shapes = {name.rpartition(".")[0]: (value.shape[0], 0) for name, value in trainable if name.endswith(".lora_a")}
        init = initial_factors(shapes, spec.rank, seed)
        model.update(tree_unflatten(list(init.items())))
        yield init
    finally:
        model.update_modules(tree_unflatten([(name, before[name]) for name in shapes]))
        model.eval()


def batch_loss(hidden: Hidden, head: Head, batch: Batch) -> mx.array:
    """Mean cross-entropy in nats over the batch's trained tokens; logits exist at their positions only."""
    states = hidden(batch.inputs)
    picked = states.reshape(-1, states.shape[-1])[batch.positions]
    loss = cross_entropy(head(picked).astype(mx.float32), batch.targets)
    return (loss * batch.weights).sum() / batch.weights.sum()


def held_out_loss(model: Any, rows: Sequence[TokenRow], batch_size: int) -> dict[str, float]:
    """Mean loss in nats per trained token for each role, dropout off."""
    model.eval()
    hidden, head = split_head(model)
    sums: dict[str, list[float]] = {}
    for indices in plan_epoch(rows, batch_size, seed=0, epoch=0):
        batch = make_batch([rows[index] for index in indices])
        loss: Any = batch_loss(hidden, head, batch).item()
        total = sums.setdefault(batch.role, [0.0, 0.0])
        total[0] += loss * batch.trained_tokens
        total[1] += batch.trained_tokens
    return {role: total / count for role, (total, count) in sums.items()}


def learning_rate_at(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate of 0-based ``step``: linear warm-up from one step's share, then the schedule down to zero."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate


def train(
    base: Base,
    corpus: Corpus,
    config: TrainConfig,
    held_out: Corpus | None = None,
    label: str = "train",
    progress: Progress = SILENT,
) -> Adapter:
    """Train one adapter on ``corpus`` and return it with importance, initialisation and provenance.

    The base model is left as it was found. ``held_out`` is scored before and after, for the manifest.

    Raises:
        RsgwmError: rows that do not fit, keys that match nothing, a loss that is not finite (names step and role).
    """
    rows, dropped = tokenize(corpus, base.tokenizer, config.max_tokens)
    held_rows = tokenize(held_out, base.tokenizer, config.max_tokens)[0] if held_out else []
    plan = [
        batch for epoch in range(config.epochs) for batch in plan_epoch(rows, config.batch_size, config.seed, epoch)
    ]
    model: Any = base.model
    spec = config.spec()
    started = time.monotonic()
    with lora_layers(model, spec, config.init_seed) as init:
        before = held_out_loss(model, held_rows, config.batch_size) if held_rows else {}
        importance, history, padded, real = _optimise(model, rows, plan, config, label, progress)
        after = held_out_loss(model, held_rows, config.batch_size) if held_rows else {}
        weights = dict(tree_flatten(model.trainable_parameters()))
        weights = {name: weights[name] for name in sorted(weights)}
    arrays = importance.arrays()
    mx.eval(weights, arrays)
    manifest = {
        "kind": "trained",
        "base": base.describe(),
        "template": corpus.template.describe(),
        "config": config.describe(),
        "data": {**corpus.describe(), "rows": len(rows), "rows_too_long": dropped},
        "seed": config.seed,
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 3),
        "tokens": {
            "trained": sum(step.trained_tokens for step in history),
            "real": real,
            "padding": padded,
        },
        "held_out_loss": {"before": before, "after": after},
        "history": [[step.step, step.role, round(step.loss, 6), step.trained_tokens] for step in history],
    }
    return Adapter(spec, weights, arrays, importance.metadata(), init, manifest)


def _optimise(
    model: Any, rows: Sequence[TokenRow], plan: Sequence[list[int]], config: TrainConfig, label: str, progress: Progress
) -> tuple[Importance, list[Step], int, int]:
    hidden, head = split_head(model)
    optimizer = optimizers.Adam(config.learning_rate, betas=[config.beta1, config.beta2], bias_correction=True)
    trainable = dict(tree_flatten(model.trainable_parameters()))
    importance = Importance({name: value.shape for name, value in trainable.items()}, config.beta2)

    def loss_of(_: Any, batch: Batch) -> mx.array:
        return batch_loss(hidden, head, batch)

    loss_and_gradients = nn.value_and_grad(model, loss_of)
    mx.random.seed(config.seed)
    model.train()
    history: list[Step] = []
    padded = real = 0
    with progress.task(label, len(plan)) as advance:
        for number, indices in enumerate(plan):
            batch = make_batch([rows[index] for index in indices])
            optimizer.learning_rate = learning_rate_at(config, number, len(plan))
            loss, gradients = loss_and_gradients(model, batch)
            importance.update(batch.role, dict(tree_flatten(gradients)))
            optimizer.update(model, gradients)
            mx.eval(loss, model.trainable_parameters(), optimizer.state, importance.moments)
            value = loss.item()
            if not math.isfinite(value):
                raise RsgwmError(
                    f"{label}: the loss is {value} at step {number + 1} ({batch.role} batch); "
                    "lower the learning rate or look at the data of that batch"
                )
            history.append(Step(number + 1, batch.role, value, batch.trained_tokens))
            padded += batch.padded_tokens
            real += batch.real_tokens
            advance(1, f"{batch.role} loss {value:.3f}")
    return importance, history, padded, real
