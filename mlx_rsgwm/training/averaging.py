"""One adapter from the checkpoints of one run: their mean, weighted by losses or steps (MWA, docs/methods.md).

Checkpoints of a run share a trajectory, so the mean of their factors is near the mean of their products, and both are
computed to say how near. Of a product the mean is exact (stacked factors) and brought back to the run's rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.data.row_hashes import KEY
from mlx_rsgwm.linalg.gram import float64
from mlx_rsgwm.linalg.lowrank import Factors, cross, stack, truncate
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.finite import not_finite
from mlx_rsgwm.training.average_weights import (
    FEW_EFFECTIVE,
    AverageOptions,
    effective_count,
    loss_weights,
    step_weights,
)
from mlx_rsgwm.training.checkpoints import claim_adapter_folder
from mlx_rsgwm.training.run_checkpoints import TRAIN, VALIDATION, RunCheckpoint, run_checkpoints, run_folder


@dataclass(frozen=True)
class Weighted:
    """Checkpoints with their weights (n,) float64, which sum to 1, by ``metric`` (what decided them).

    ``passed_over``: those with a validation loss, which did not weigh because others have none.
    """

    checkpoints: tuple[RunCheckpoint, ...]
    weights: np.ndarray
    metric: str
    passed_over: int = 0

    @property
    def effective(self) -> float:
        """Of how many equally weighted checkpoints the average is worth."""
        return effective_count(self.weights)

    def describe(self) -> list[dict[str, Any]]:
        """A JSON object for each checkpoint, in the order of their steps."""
        return [
            {
                "checkpoint": each.name,
                "step": each.step,
                "train_loss": each.train_loss,
                "validation_loss": each.validation_loss,
                "weight": float(weight),
            }
            for each, weight in zip(self.checkpoints, self.weights, strict=True)
        ]


def average(
    run: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    metric: str = AverageOptions.metric,
    penalty: float = AverageOptions.penalty,
    power: float = AverageOptions.power,
    last: int = AverageOptions.last,
    space: str = AverageOptions.space,
    log: str | Path | None = None,
    base: str | None = None,
    progress: Progress = SILENT,
) -> Adapter:
    """One adapter from the checkpoints of a training run, weighted by their losses or steps.

    Args:
        run: the run's folder (of ``rsgwm train``, of mlx_lm.lora, of a PEFT trainer), or two or more checkpoints of it.
        out: the folder to write; None keeps the adapter in memory.
        metric: ``loss`` (of validation where every checkpoint has it, else of training), ``train-loss``,
            ``validation-loss`` or ``steps``.
        penalty: p in (0, 1], a checkpoint's factor for each place behind the best.
        power: q from 0, the exponent of 1 / loss, or of step / last step. p = 1 and q = 0 are the uniform mean.
        last: the newest so many checkpoints; 0 for all.
        space: mean of the ``factor``\\ s, or of the ``product``\\ s, brought back to the run's rank.
        log: a file of what mlx_lm.lora printed, for its losses.
        base: the base that PEFT's folders are read for; None for the one that they name.
        progress: told of checkpoints and warnings.

    Returns:
        The adapter: arrays of the run's shapes in float32, importance averaged likewise (in factor space), the run's
        directions; ``manifest["average"]`` has weights, their effective number and the cosine between both means.

    Raises:
        RsgwmError: fewer than two checkpoints, checkpoints of several runs, no such loss, a loss that is not finite,
            settings out of range, a finished adapter in ``out``.

    Example::

        rs.average("pool/change", "averaged", last=5)
    """
    options = AverageOptions(metric, penalty, power, last, space)
    sources = [Path(run)] if isinstance(run, (str, Path)) else [Path(source) for source in run]
    folder, printed = (None if path is None else Path(path) for path in (out, log))
    return average_run(sources, lambda _: (options, None), folder, printed, base, progress)


def average_run(
    sources: Sequence[Path],
    settle: Callable[[list[RunCheckpoint]], tuple[AverageOptions, Mapping[str, Any] | None]],
    out: Path | None,
    log: Path | None = None,
    base: str | None = None,
    progress: Progress = SILENT,
) -> Adapter:
    """:func:`average` with settings that the checkpoints decide: ``settle`` gives them, and what is told of a choice.

    Raises:
        RsgwmError: as :func:`average`, and whatever ``settle`` raises; nothing is written then.
    """
    with claim_adapter_folder(out) if out is not None else nullcontext():
        checkpoints = run_checkpoints(sources, log, base, progress)
        options, choice = settle(checkpoints)
        weighted = weigh(checkpoints, options)
        for warning in warnings_of(weighted):
            progress.warning(f"warning: {warning}")
        adapter = mean_of(weighted, options, progress)
        if choice is not None:
            adapter.manifest["average"]["choice"] = dict(choice)
        if out is not None:
            adapter.save(out)
    return adapter


def weigh(checkpoints: Sequence[RunCheckpoint], options: AverageOptions) -> Weighted:
    """The newest ``options.last`` of the checkpoints with their weights.

    Raises:
        RsgwmError: fewer checkpoints than asked for, or without a loss of the metric; which metrics there are is said.
    """
    if options.last > len(checkpoints):
        raise RsgwmError(f"the last {options.last} checkpoints are asked for, and there are {len(checkpoints)}")
    chosen = tuple(checkpoints[-options.last :])
    metric = options.metric
    known = [name for name in (VALIDATION, TRAIN) if all(c.loss(name) is not None or name in c.refused for c in chosen)]
    if metric == "loss" and known:
        metric = known[0]
    raise_problems("average", [c.refused[metric] for c in chosen if metric in c.refused])
    if metric == "steps":
        return Weighted(chosen, step_weights([c.step for c in chosen], options.penalty, options.power), metric)
    if metric not in known:
        without = [c.name for c in chosen if all(c.loss(name) is None for name in _names(metric))]
        shown = ", ".join(without[:3]) + (" …" if len(without) > 3 else "")
        if not without:  # each has one of the two
            raise RsgwmError(
                "some checkpoints have a validation loss alone and others a training loss; weigh by metric steps"
            )
        raise RsgwmError(
            f"{shown} has no {metric.replace('-', ' ')}; there {'are' if known else 'is'} "
            f"{', '.join((*known, 'steps'))}: weigh by metric {(*known, 'steps')[0]} (mlx_lm.lora's losses: --log FILE)"
        )
    losses = [loss for c in chosen if (loss := c.loss(metric)) is not None]
    validated = sum(c.validation_loss is not None for c in chosen)
    passed_over = validated if (options.metric, metric) == ("loss", TRAIN) else 0
    return Weighted(chosen, loss_weights(losses, options.penalty, options.power), metric, passed_over)


def _names(metric: str) -> tuple[str, ...]:
    return (VALIDATION, TRAIN) if metric == "loss" else (metric,)


def warnings_of(weighted: Weighted) -> list[str]:
    """What a careful person would want to know of these weights."""
    told = []
    if weighted.passed_over:
        told.append(
            f"{weighted.passed_over} of {len(weighted.checkpoints)} checkpoints have a validation loss and the others "
            "none, so the training loss weighs; leave the others out, or name the metric"
        )
    if weighted.effective < FEW_EFFECTIVE:
        told.append(
            f"the average is worth {weighted.effective:.2f} checkpoints, hardly more than the best alone; "
            "raise the penalty or lower the power"
        )
    return told


def mean_of(weighted: Weighted, options: AverageOptions, progress: Progress = SILENT) -> Adapter:
    """The weighted mean, not saved yet; one module's arrays of all checkpoints are in memory at a time.

    Raises:
        RsgwmError: checkpoints of different modules or shapes, products of adapters that are no plain LoRA.
    """
    adapters, first = _loaded(weighted, options.space)
    measured = _nothing()
    weights: dict[str, mx.array] = {}
    modules = first.modules()
    with progress.task("average", len(modules)) as advance:
        for module in modules:
            names = [name for name in first.weights if name.rpartition(".")[0] == module]
            arrays = [{name: adapter.weights.pop(name) for name in names} for adapter in adapters]
            weights |= _mean_module(module, arrays, weighted.weights, first.spec.scale, options.space, measured)
            advance(1, "")
    _check_finite(weighted, weights, measured)
    keep = options.space == "factor"
    if not keep and adapters[-1].importance:
        progress.message("an average of products has no importance, which belongs to factors")
    importance = _mean_importance(adapters, weighted.weights) if keep else {}
    result = Adapter(first.spec, weights, importance, first.importance_metadata if importance else {})
    finished = _beside(weighted, result, keep)
    result.manifest = _manifest(weighted, options, first, finished, measured)
    raise_problems("average", result.problems())
    return result


def mean_weights(weighted: Weighted, options: AverageOptions) -> Adapter:
    """The weights of :func:`mean_of` alone: nothing is told of them, and there is no importance.

    Raises:
        RsgwmError: as :func:`mean_of`.
    """
    adapters, first = _loaded(weighted, options.space)
    weights: dict[str, mx.array] = {}
    for module in first.modules():
        names = [name for name in first.weights if name.rpartition(".")[0] == module]
        arrays = [{name: adapter.weights.pop(name) for name in names} for adapter in adapters]
        if options.space == "factor":
            weights |= {name: mean_array([each[name] for each in arrays], weighted.weights) for name in names}
        else:
            weights |= _mean_module(module, arrays, weighted.weights, first.spec.scale, options.space, _nothing())
        mx.eval(weights)
    return Adapter(first.spec, weights)


def _check_finite(weighted: Weighted, weights: dict[str, mx.array], measured: Mapping[str, float]) -> None:
    """Refuse a mean that is not finite, with the checkpoints that make it so.

    Raises:
        RsgwmError: values of a checkpoint that are not finite, or too large for their products.
    """
    if not_finite(weights):
        broken = [str(each.path) for each in weighted.checkpoints if not_finite(each.load().weights)]
        raise_problems("average", [f"{path} has values that are not finite; leave it out" for path in broken])
    if not all(map(math.isfinite, measured.values())):
        raise RsgwmError("the checkpoints' weights are so large that their products leave float32; average others")


def _nothing() -> dict[str, float]:
    """What :func:`_mean_module` adds to."""
    return dict.fromkeys(("dot", "factor", "product", "discarded"), 0.0)


def _loaded(weighted: Weighted, space: str) -> tuple[list[Adapter], Adapter]:
    """The checkpoints' adapters, alike, and the newest of them."""
    adapters = [each.load() for each in weighted.checkpoints]
    _check_alike(weighted, adapters, space)
    return adapters, adapters[-1]


def _mean_module(
    module: str,
    arrays: Sequence[dict[str, mx.array]],
    weights: np.ndarray,
    scale: float,
    space: str,
    measured: dict[str, float],
) -> dict[str, mx.array]:
    """A module's averaged arrays, float32; what both means are like is added to ``measured``."""
    mean = {name: mean_array([each[name] for each in arrays], weights) for name in arrays[0]}
    a, b = f"{module}.lora_a", f"{module}.lora_b"
    if mean[a].ndim != 2:  # experts: their products are not formed
        return mean
    updates = [Factors(each[a].astype(mx.float32), scale * each[b].astype(mx.float32)) for each in arrays]
    factors = Factors(mean[a], scale * mean[b])
    product = truncate(stack(updates, mx.array(weights.astype(np.float32))), factors.rank)
    pairs = {"dot": (factors, product.factors), "factor": (factors,) * 2, "product": (product.factors,) * 2}
    values: dict[str, Any] = {name: cross(*pair) for name, pair in pairs.items()} | {"discarded": product.discarded}
    mx.eval(values, mean, product.factors.a, product.factors.b)
    for name, value in values.items():
        measured[name] += value.item()
    return mean if space == "factor" else {a: product.factors.a, b: product.factors.b / scale}


def mean_array(arrays: Sequence[mx.array], weights: np.ndarray) -> mx.array:
    """Σ w_x θ_x, summed in float64, as float32."""
    total = np.zeros(arrays[0].shape)
    for array, weight in zip(arrays, weights, strict=True):
        total += weight * float64(array.astype(mx.float32))
    return mx.array(total.astype(np.float32))


def _mean_importance(adapters: Sequence[Adapter], weights: np.ndarray) -> dict[str, mx.array]:
    """The same of the importances, each over the checkpoints that have it: the first may have seen one role alone."""
    means = {}
    for name in list(adapters[-1].importance):
        places = [place for place, adapter in enumerate(adapters) if name in adapter.importance]
        shares = weights[places]
        if shares.sum() > 0:
            arrays = [adapters[place].importance.pop(name) for place in places]
            means[name] = mean_array(arrays, shares / shares.sum())
    return means


def _check_alike(weighted: Weighted, adapters: Sequence[Adapter], space: str) -> None:
    first = adapters[-1]
    if space == "product" and (first.spec.fine_tune_type != "lora" or first.full):
        raise RsgwmError(f"{first.spec.fine_tune_type} adapters have no plain product; average them by --space factor")
    shapes = {name: value.shape for name, value in first.weights.items()}
    if space == "product" and any(len(shape) != 2 for shape in shapes.values()):
        raise RsgwmError("layers of experts are averaged by --space factor only")
    raise_problems(
        "the checkpoints cannot be averaged",
        [
            f"{each.path} has other modules, shapes or settings than {weighted.checkpoints[-1].name}"
            for each, adapter in zip(weighted.checkpoints, adapters, strict=True)
            if {name: value.shape for name, value in adapter.weights.items()} != shapes
            or adapter.spec != first.spec
            or adapter.full
        ],
    )


def _beside(weighted: Weighted, result: Adapter, keep: bool) -> Mapping[str, Any]:
    """Take over what the finished run has beside its weights, and return its manifest; empty where none is finished.

    Its directions are sums over all of its steps already, and its prompt states are the base's; its initialisation
    holds for the mean of factors alone.
    """
    folder = run_folder(weighted.checkpoints[-1])
    if folder is None:
        return {}
    finished = Adapter.load(folder, lazy=True)
    result.directions = finished.directions
    result.directions_metadata = {k: v for k, v in finished.directions_metadata.items() if k != "weights_sha256"}
    result.prompt_states, result.prompt_states_metadata = finished.prompt_states, finished.prompt_states_metadata
    result.init = finished.init if keep else {}
    return finished.manifest


def _manifest(
    weighted: Weighted,
    options: AverageOptions,
    newest: Adapter,
    finished: Mapping[str, Any],
    measured: Mapping[str, float],
) -> dict[str, Any]:
    norms = (measured["factor"] * measured["product"]) ** 0.5
    names = ("base", "template", "config", "data", "seed", "warm_start", KEY, "task", "untied")
    before = finished or newest.manifest
    about = {name: value for name in names if (value := before.get(name)) is not None}
    if ((before.get("source") or {}).get("layout") or {}).get("untied"):
        about["untied"] = True
    return {
        "kind": "averaged",
        **about,
        "average": {
            **asdict(options),
            "metric": weighted.metric,
            "checkpoints": weighted.describe(),
            "effective": weighted.effective,
            "cosine_factor_product": measured["dot"] / norms if norms else None,
            "discarded": measured["discarded"] / (measured["product"] + measured["discarded"] or 1.0),
            "warnings": warnings_of(weighted),
        },
        "versions": versions(),
    }
