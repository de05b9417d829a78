"""The merge at the end of a round: θ' = θ + α · agg({ΔW_t − θ}), and how the tasks' updates lie to each other (ATM).

θ is the state that all tasks started the round with, None for the bare base. What a mean of products is brought back to
the rank from is exact: stacked factors, never a dense matrix. docs/methods.md#rounds has the four modes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.row_hashes import KEY, record_of
from mlx_rsgwm.linalg.gram import float64
from mlx_rsgwm.linalg.lowrank import Factors, stack, truncate
from mlx_rsgwm.merging.families.linear import two_adapters
from mlx_rsgwm.merging.merge import merge
from mlx_rsgwm.merging.methods import find_method, needs_directions, resolved
from mlx_rsgwm.merging.options import MergeOptions
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.finite import not_finite
from mlx_rsgwm.training.averaging import mean_array
from mlx_rsgwm.training.config import TrainConfig
from mlx_rsgwm.training.rounds import ACCUMULATE, AVG_PRODUCT, BY_PRODUCTS, Rounds

EVERYTHING = "all"  # the signal of all batches
ROLE = "round"  # of neither role: directions of all tokens count
# Of a column of lora_a at initialisation, U(±1/√in): learning rates are chosen for factors of that size.
COLUMN_NORM = 3**-0.5


@dataclass
class Measures:
    """Sums over modules: ``products`` (T, T) of the tasks' updates of this round, squares of norms otherwise.

    ``state``: of θ', ``step``: of θ' − θ, ``discarded``: of what the rank took away, from θ', or with ``accumulated``
    from the step alone. ``method_discarded``: the share that another method than the mean had discarded before.
    """

    products: np.ndarray
    accumulated: bool = False
    state: float = 0.0
    step: float = 0.0
    discarded: float = 0.0
    method_discarded: float = 0.0

    def add(self, updates: Sequence[Factors], before: Factors | None, after: Factors, discarded: mx.array) -> None:
        """Take in a module."""
        moved = after if before is None else stack((after, before), (1.0, -1.0))
        products = _products((*updates, after, moved))
        self.products += products[:-2, :-2]
        self.state, self.step = self.state + products[-2, -2], self.step + products[-1, -1]
        self.discarded += float(np.array(discarded))

    def describe(self) -> dict[str, Any]:
        """JSON object: norms, the share of ‖·‖² that was discarded, cosines (T, T) between the tasks' updates."""
        norms = np.sqrt(np.maximum(np.diag(self.products), 0.0))
        scale = np.outer(norms, norms)
        left = self.step if self.accumulated else self.state
        cosines = np.divide(self.products, scale, out=np.zeros_like(scale), where=scale > 0)
        return {
            "norm": max(self.state, 0.0) ** 0.5,
            "step_norm": max(self.step, 0.0) ** 0.5,
            "update_norms": norms.tolist(),
            "cosines": cosines.tolist(),
            "discarded": self.discarded / (left + self.discarded) if self.discarded > 0 else 0.0,
            "method_discarded": self.method_discarded,
        }


def _products(updates: Sequence[Factors]) -> np.ndarray:
    """(T, T) inner products in float64: of updates that are differences, float32 would lose digits."""
    a = np.concatenate([float64(update.a) for update in updates], axis=1)
    b = np.concatenate([float64(update.b) for update in updates], axis=0)
    starts = np.cumsum([0, *(update.rank for update in updates[:-1])])
    pieces = (a.T @ a) * (b @ b.T)
    return np.asarray(np.add.reduceat(np.add.reduceat(pieces, starts, axis=0), starts, axis=1))


def check_rounds(config: TrainConfig, tasks: int) -> None:
    """Find out before any training whether the merges of the rounds of so many ``tasks`` can be made.

    Raises:
        RsgwmError: an unknown method or parameter, factors that cannot be merged, directions that are not kept, the
            importance of a role, which not every round has, a method of two adapters for more.
    """
    rounds = config.rounds
    if rounds is None:
        raise RsgwmError("the settings have no rounds")
    if rounds.mode not in BY_PRODUCTS:
        return
    options = merge_options(rounds, config.seed)
    parameters = resolved(options)
    if parameters.get("space") == "factor" and rounds.mode == AVG_PRODUCT:
        raise RsgwmError(f"rounds of mode {rounds.mode} merge products; {rounds.method} needs space=product for that")
    method = find_method(rounds.method)
    if "importance" in method.needs and parameters["signal"] != EVERYTHING:
        raise RsgwmError(f"rounds merged by {rounds.method} use the importance of all batches: signal=shared")
    if method.survey is two_adapters and tasks > 2:
        raise RsgwmError(f"{rounds.method} merges two adapters, and the rounds are of {tasks} tasks")
    if needs_directions(method, parameters) and not config.directions:
        raise RsgwmError(f"rounds merged by {rounds.method} need directions, and training keeps none (--directions 0)")


def merge_options(rounds: Rounds, seed: int) -> MergeOptions:
    """The merge of a round; where a method chooses by importance, by that of all batches unless it is said."""
    shared = {"signal": "shared"} if "signal" in find_method(rounds.method).parameters else {}
    return MergeOptions(method=rounds.method, role=ROLE, parameters={**shared, **rounds.parameters}, seed=seed)


def merge_round(
    state: Adapter | None, adapters: Sequence[Adapter], config: TrainConfig, progress: Progress = SILENT
) -> Adapter:
    """θ' as an adapter, with ``manifest["round"]`` as :meth:`Measures.describe` gives it.

    ``adapters`` are the T tasks' as they were trained from ``state``; of mode ``accumulate``, on top of it.

    Raises:
        RsgwmError: whatever :func:`~mlx_rsgwm.merging.merge.merge` raises for the method.
    """
    rounds = config.rounds
    assert rounds is not None
    measures = Measures(np.zeros((len(adapters),) * 2), rounds.mode == ACCUMULATE)
    if rounds.mode not in BY_PRODUCTS:
        weights, rank = _mean_factors(state, adapters, rounds, measures), adapters[0].spec.rank
    else:
        merged = None if rounds.method == "linear" else _merged_steps(state, adapters, config, progress)
        weights, rank = _by_products(state, adapters, rounds, merged, measures)
        measures.method_discarded = _discarded(merged)
    if not math.isfinite(measures.state + measures.discarded) or not_finite(weights):
        raise RsgwmError(
            f"the merge of round {rounds.number} has values that are not finite; lower the learning rate or alpha"
        )
    spec = replace(adapters[0].spec, rank=rank)
    return Adapter(spec, weights, manifest=_manifest(state, adapters, rounds, measures))


def _discarded(merged: Adapter | None) -> float:
    """What a method's own merge discarded to come to a rank, as a share of ‖·‖²."""
    return 0.0 if merged is None else float(merged.manifest["merge"]["diagnosis"]["overall"]["discarded"])


def on_top(state: Adapter | None, adapter: Adapter) -> Adapter:
    """``adapter`` with ``state`` beneath it as one, of the sum of their ranks; the state's part has importance 0."""
    if state is None:
        return adapter
    return _stacked(adapter, state, 1.0)


def _factors(adapter: Adapter, module: str) -> Factors:
    a, b = (adapter.weights[f"{module}.{leaf}"].astype(mx.float32) for leaf in ("lora_a", "lora_b"))
    return Factors(a, b * adapter.spec.scale)


def _updates(
    state: Adapter | None, adapters: Sequence[Adapter], module: str, accumulated: bool
) -> tuple[Factors | None, list[Factors]]:
    """θ of a module, and what each task added to it."""
    before = None if state is None else _factors(state, module)
    updates = [_factors(adapter, module) for adapter in adapters]
    if before is None or accumulated:
        return before, updates
    return before, [stack((update, before), (1.0, -1.0)) for update in updates]


def _mean_factors(
    state: Adapter | None, adapters: Sequence[Adapter], rounds: Rounds, measures: Measures
) -> dict[str, mx.array]:
    """θ + α (mean of the factors − θ), array by array; before the first round lora_b is zero."""
    first, weights = adapters[0], {}
    shares = np.array([1 - rounds.alpha, *[rounds.alpha / len(adapters)] * len(adapters)])
    for module in first.modules():
        for leaf in ("lora_a", "lora_b"):
            name = f"{module}.{leaf}"
            began = state.weights[name] if state else first.init.get(name, mx.zeros_like(first.weights[name]))
            weights[name] = mean_array([began, *(adapter.weights[name] for adapter in adapters)], shares)
        before, updates = _updates(state, adapters, module, False)
        after = Factors(weights[f"{module}.lora_a"], weights[f"{module}.lora_b"] * first.spec.scale)
        measures.add(updates, before, after, mx.array(0.0))
    return weights


def _by_products(
    state: Adapter | None, adapters: Sequence[Adapter], rounds: Rounds, merged: Adapter | None, measures: Measures
) -> tuple[dict[str, mx.array], int]:
    """θ + α · the ``merged`` update, or the mean, at the adapters' rank, or with mode accumulate at a growing one."""
    accumulated, spec = rounds.mode == ACCUMULATE, adapters[0].spec
    weights: dict[str, mx.array] = {}
    rank = spec.rank
    for module in adapters[0].modules():
        before, updates = _updates(state, adapters, module, accumulated)
        mean = [1 / len(updates)] * len(updates)
        step = _factors(merged, module) if merged is not None else stack(updates, mean)
        step = Factors(step.a, rounds.alpha * step.b)
        if accumulated:
            cut = truncate(step, spec.rank)
            after = cut.factors if before is None else stack((before, cut.factors))
        elif merged is None:
            cut = truncate(_mean_of_all(state, adapters, module, rounds.alpha), spec.rank)
            after = _of_training_size(cut.factors)
        else:
            cut = truncate(step if before is None else stack((before, step)), spec.rank)
            after = _of_training_size(cut.factors)
        measures.add(updates, before, after, cut.discarded)
        weights[f"{module}.lora_a"], weights[f"{module}.lora_b"] = after.a, after.b / spec.scale
        rank = after.rank
    return weights, rank


def _mean_of_all(state: Adapter | None, adapters: Sequence[Adapter], module: str, alpha: float) -> Factors:
    """(1 − α) θ + α · mean ΔW_t: θ + α · mean (ΔW_t − θ), without the factors of θ in every term."""
    updates = [_factors(adapter, module) for adapter in adapters]
    shares = [alpha / len(updates)] * len(updates)
    if state is None or alpha == 1:
        return stack(updates, shares)
    return stack((_factors(state, module), *updates), [1 - alpha, *shares])


def _of_training_size(update: Factors) -> Factors:
    """The same product, the columns of a as long as those of an initial lora_a; where they are zero they stay so."""
    lengths = mx.sqrt(mx.square(update.a).sum(axis=0))
    scale = mx.where(lengths > 0, COLUMN_NORM / mx.maximum(lengths, 1e-30), 1.0)
    return Factors(update.a * scale, update.b / scale[:, None])


def _merged_steps(
    state: Adapter | None, adapters: Sequence[Adapter], config: TrainConfig, progress: Progress
) -> Adapter:
    """What the rounds' method makes of the tasks' updates of this round."""
    rounds = config.rounds
    assert rounds is not None
    steps = adapters if state is None or rounds.mode == ACCUMULATE else [_stacked(a, state, -1.0) for a in adapters]
    return merge(steps, merge_options(rounds, config.seed), progress)


def _stacked(adapter: Adapter, other: Adapter, sign: float) -> Adapter:
    """``adapter`` plus ``sign`` times ``other``, factors side by side; importance is that of ``adapter``'s part."""
    weights: dict[str, mx.array] = {}
    importance: dict[str, mx.array] = {}
    signals = {name.partition("/")[0] for name in adapter.importance}
    for module, a, b in adapter.factors():
        below_a, below_b = other.weights[f"{module}.lora_a"], other.weights[f"{module}.lora_b"]
        factor = sign * other.spec.scale / adapter.spec.scale
        pairs = {"lora_a": (a, below_a, 1), "lora_b": (b, factor * below_b, 0)}
        for leaf, (array, below, axis) in pairs.items():
            name = f"{module}.{leaf}"
            weights[name] = mx.concatenate([array, below.astype(array.dtype)], axis=axis)
            for signal in signals:
                entry = adapter.importance[f"{signal}/{name}"]
                importance[f"{signal}/{name}"] = mx.concatenate([entry, mx.zeros(below.shape)], axis=axis)
    spec = replace(adapter.spec, rank=adapter.spec.rank + other.spec.rank)
    manifest = {name: value for name, value in adapter.manifest.items() if name != "files"}
    return replace(
        adapter, spec=spec, weights=weights, importance=importance, init={}, manifest=manifest, path=None,
        label=adapter.where,
        directions_metadata={k: v for k, v in adapter.directions_metadata.items() if k != "weights_sha256"},
    )  # fmt: skip


def _manifest(state: Adapter | None, adapters: Sequence[Adapter], rounds: Rounds, measures: Measures) -> dict[str, Any]:
    manifests: list[Mapping[str, Any]] = [adapter.manifest for adapter in adapters]
    records = [record_of(adapter.manifest, adapter.name) for adapter in (*adapters, *([state] if state else []))]
    return {
        "kind": "merged",
        **{name: manifests[0][name] for name in ("base", "template") if name in manifests[0]},
        KEY: reduce(or_, records).describe(),
        "round": {"number": rounds.number, "of": rounds.count, "mode": rounds.mode, **measures.describe()},
        "versions": versions(),
    }
