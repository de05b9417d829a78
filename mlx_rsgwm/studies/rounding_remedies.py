"""Ways to run an adapter on a base of few bits, beside each other: loss on held-out rows, what is left of it, size.

``plain``: base and adapter summed and rounded. ``feedback``: rounded by error feedback on the second moments of the
layers' inputs (GPTQ). ``vector``: a quantization vector on the adapter first; ``vector_feedback``: both.
``unfused``: the base rounded, the adapter beside it in floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.audit.eligibility import BATCH, token_weighted
from mlx_rsgwm.converters.fuse.error_feedback import round_by_feedback
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.linalg.gram import Gram
from mlx_rsgwm.merging.quantisation_vector import patch
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.fit_check import fitting_modules
from mlx_rsgwm.models.hooks import module_at
from mlx_rsgwm.models.quantisation import SYMMETRIC, QuantFormat
from mlx_rsgwm.models.rounded_weights import check_rounding, rounded_formats, stored_bytes, weights_replaced
from mlx_rsgwm.training.layers import adapted
from mlx_rsgwm.training.losses import row_nats

PLAIN, FEEDBACK, VECTOR, BOTH, UNFUSED = REMEDIES = ("plain", "feedback", "vector", "vector_feedback", "unfused")
CALLED = {
    PLAIN: "plain rounding",
    FEEDBACK: "error feedback",
    VECTOR: "the quantization vector",
    BOTH: "vector and error feedback",
    UNFUSED: "the adapter unfused",
}


@dataclass(frozen=True)
class Remedy:
    """One way: ``nll`` in nats a completion token, by how much it is ``worse`` than the best (95 % from ``low`` to
    ``high``, rows resampled), the share of ΔW ``kept`` along it and the ``error`` beside it, both of ‖ΔW‖, the share of
    what was rounded (ΔW, or ΔW + λ V) that ``survives``, which ``fuse`` asks for, and the ``bytes`` of all arrays.
    """

    remedy: str
    nll: float
    worse: float
    low: float
    high: float
    kept: float
    error: float
    survives: float
    bytes: int


@dataclass(frozen=True)
class Comparison:
    """All ways that could be tried, in the order of :data:`REMEDIES`, and which is recommended, for what reason.

    ``float_nll``: base and adapter without rounding; ``base_nll``: the rounded base alone. ``not_tried``: the other
    ways, with what each of them needs.
    """

    quant: QuantFormat
    remedies: tuple[Remedy, ...]
    recommended: str
    reason: str
    float_nll: float
    base_nll: float
    rows: int
    tokens: int
    not_tried: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON object."""
        return {**asdict(self), "quant": asdict(self.quant), "remedies": [asdict(each) for each in self.remedies]}


def compare_remedies(
    base: Base,
    adapter: Adapter,
    quant: QuantFormat,
    rows: Sequence[TokenRow],
    vector: Adapter | None = None,
    weight: float = 1.0,
    grams: Mapping[str, Gram] | None = None,
    seed: int = DEFAULT_SEED,
    progress: Progress = SILENT,
) -> Comparison:
    """Try every way that there is what it needs for, on ``rows``.

    Args:
        base: a dense one.
        adapter: LoRA on linear layers of it.
        quant: a format that MLX stores.
        rows: held out; each counts by its completion's tokens.
        vector: a quantization vector, of which ``weight`` (λ) times is added.
        grams: second moments of the inputs by module, for error feedback.
        seed: of resampling rows.
        progress: told of ways.

    Raises:
        RsgwmError: MLX does not store the format, it does not fit, or the base is quantised.
        AdapterError: the adapter or the vector does not fit the base.
    """
    if quant.mode == SYMMETRIC:
        raise RsgwmError(f"MLX stores no {quant}; give one of its own formats, such as 4 or 3,32 or 4,mxfp4")
    patched = patch(adapter, vector, weight) if vector is not None else None
    rounded_base = RoundedBase(base, quant)
    missing = _missing(quant, patched, grams)
    sums = {PLAIN: (adapter, None), FEEDBACK: (adapter, grams), VECTOR: (patched, None), BOTH: (patched, grams)}
    nats: dict[str, np.ndarray] = {}
    shares: dict[str, tuple[float, float, float]] = {UNFUSED: (1.0, 0.0, 1.0)}
    with progress.task("remedies", len(REMEDIES) - len(missing) + 2) as advance:
        for name, (summand, moments) in sums.items():
            if name in missing or summand is None:
                continue
            weights = rounded_base.sums(summand, moments)
            shares[name] = (*rounded_base.survival(weights, adapter), rounded_base.survival(weights, summand)[0])
            with rounded_base.using(weights):
                nats[name] = row_nats(base.model, rows, BATCH)[0]
            advance(1, CALLED[name])
        with rounded_base.using({}, adapter):
            nats[UNFUSED] = row_nats(base.model, rows, BATCH)[0]
        advance(1, CALLED[UNFUSED])
        with rounded_base.using({}):
            base_nats = row_nats(base.model, rows, BATCH)[0]
        advance(1, "the rounded base alone")
        with adapted(base.model, *_layers(base, adapter)):
            float_nats, counts = row_nats(base.model, rows, BATCH)
        advance(1, "without rounding")
    tokens = float(counts.sum())
    remedies = _told(nats, counts, shares, rounded_base.bytes, adapter, seed)
    recommended, reason = recommend(remedies)
    return Comparison(
        quant, remedies, recommended, reason, float(float_nats.sum() / tokens), float(base_nats.sum() / tokens),
        len(rows), int(tokens), missing,
    )  # fmt: skip


def recommend(remedies: Sequence[Remedy]) -> tuple[str, str]:
    """Of the ways that are not clearly worse than the best the smallest, and of these the simplest; and why.

    Clearly worse: 0 is below the interval of the difference.
    """
    best = min(remedies, key=lambda remedy: remedy.nll)
    near = [remedy for remedy in remedies if remedy is best or remedy.low <= 0]
    chosen = min(near, key=lambda remedy: remedy.bytes)
    if chosen is not best:
        saved = best.bytes - chosen.bytes
        smaller = f" and {saved / 1e6:.1f} MB smaller" if saved else " and simpler"
        return chosen.remedy, (
            f"not clearly worse than {CALLED[best.remedy]} ({chosen.worse:+.4f} nats a token, 95 % "
            f"{chosen.low:+.4f} to {chosen.high:+.4f}){smaller}"
        )
    others = [remedy for remedy in remedies if remedy is not best]
    if not others:
        return best.remedy, "nothing else could be tried"
    second = min(others, key=lambda remedy: remedy.nll)
    return best.remedy, (
        f"the least loss: {CALLED[second.remedy]} is worse by {second.worse:.4f} nats a token (95 % "
        f"{second.low:+.4f} to {second.high:+.4f})"
    )


class RoundedBase:
    """A dense base whose weights were rounded once, and what they become with an adapter in them.

    ``formats``: the layers that are stored in few bits; ``bytes``: what all arrays take then.

    Raises:
        RsgwmError: the base is quantised already.
    """

    def __init__(self, base: Base, quant: QuantFormat) -> None:
        check_rounding(base.model, quant)
        self.base, self.quant = base, quant
        self.formats = rounded_formats(base.model, quant)
        self.bytes = stored_bytes(base.model, self.formats)
        self.weights = {name: module_at(base.model, name).weight for name in self.formats}
        self.once = {name: self.formats[name].round_trip(w, w.dtype) for name, w in self.weights.items()}
        mx.eval(self.once)

    def sums(self, adapter: Adapter, grams: Mapping[str, Gram] | None = None) -> dict[str, mx.array]:
        """Q(W + ΔW), float32, of every layer that ``adapter`` adapts; by error feedback where there is a second moment.

        Raises:
            AdapterError: the adapter does not fit the base.
            RsgwmError: groups do not divide the columns of an adapted layer.
        """
        with adapted(self.base.model, *_layers(self.base, adapter)):
            check_rounding(self.base.model, self.quant)
        rounded = {}
        for name, update in _updates(adapter):
            weight, quant = module_at(self.base.model, name).weight, self.formats.get(name)
            fused = weight.astype(mx.float32) + update
            if quant is None:  # which the architecture keeps in floats
                rounded[name] = fused
            elif grams is not None and name in grams:
                rounded[name] = round_by_feedback(fused, grams[name].dense(), quant, weight.dtype).dense()
            else:
                rounded[name] = quant.round_trip(fused, weight.dtype)
            mx.eval(rounded[name])
        return rounded

    @contextmanager
    def using(self, weights: Mapping[str, mx.array], adapter: Adapter | None = None) -> Iterator[None]:
        """The base's model computes with its rounded weights inside, ``weights`` in the place of some of them, and with
        an ``adapter`` on in floats."""
        with ExitStack() as stack:
            stack.enter_context(weights_replaced(self.base.model, {**self.once, **weights}))
            if adapter is not None:
                stack.enter_context(adapted(self.base.model, *_layers(self.base, adapter)))
            yield

    def survival(self, weights: Mapping[str, mx.array], adapter: Adapter) -> tuple[float, float]:
        """⟨F − Q(W), ΔW⟩ / ‖ΔW‖² and ‖F − Q(W) − ΔW‖ / ‖ΔW‖ over all layers; F: ``weights``, ΔW the adapter's."""
        updates = dict(_updates(adapter))
        along = beside = square = 0.0
        for name, value in weights.items():
            change = value - self.once.get(name, module_at(self.base.model, name).weight)
            update = updates.get(name, mx.zeros_like(change))
            parts: Any = mx.stack([(change * update).sum(), mx.square(change - update).sum(), mx.square(update).sum()])
            along, beside, square = (a + float(b) for a, b in zip((along, beside, square), parts.tolist(), strict=True))
        return (along / square, (beside / square) ** 0.5) if square else (1.0, 0.0)


def _layers(base: Base, adapter: Adapter) -> tuple[Any, Any, Any]:
    """What :func:`~mlx_rsgwm.training.layers.adapted` takes to put ``adapter`` on ``base``, without dropout."""
    weights = {name: value.astype(mx.float32) for name, value in adapter.weights.items()}
    return fitting_modules(base, adapter), replace(adapter.spec, dropout=0.0), weights


def _updates(adapter: Adapter) -> Iterator[tuple[str, mx.array]]:
    """Module and ΔW (out, in) float32 of everything that ``adapter`` adapts."""
    for name, a, b in adapter.factors():
        yield name, adapter.spec.scale * (b.astype(mx.float32).T @ a.astype(mx.float32).T)


def _missing(quant: QuantFormat, patched: Adapter | None, grams: Mapping[str, Gram] | None) -> dict[str, str]:
    """Ways that cannot be tried, with what they need."""
    no_vector = "" if patched is not None else "no --vector (rsgwm quantvec extract)"
    no_feedback = ""
    if quant.mode != "affine":
        no_feedback = f"error feedback is for affine formats, not for {quant.mode}"
    elif grams is None:
        no_feedback = "the adapter has no directions (rsgwm directions collect ADAPTER --corpus ROWS)"
    reasons = {FEEDBACK: no_feedback, VECTOR: no_vector, BOTH: no_vector or no_feedback}
    return {name: reason for name, reason in reasons.items() if reason}


def _told(
    nats: Mapping[str, np.ndarray],
    counts: np.ndarray,
    shares: Mapping[str, tuple[float, float, float]],
    stored: int,
    adapter: Adapter,
    seed: int,
) -> tuple[Remedy, ...]:
    best = min(nats.values(), key=lambda values: float(values.sum()))
    beside = sum(value.nbytes for value in adapter.weights.values())
    remedies = []
    for name, values in nats.items():
        worse, low, high = token_weighted(values - best, counts, seed)[:3]
        size = stored + (beside if name == UNFUSED else 0)
        remedies.append(Remedy(name, float(values.sum() / counts.sum()), worse, low, high, *shares[name], size))
    return tuple(remedies)
