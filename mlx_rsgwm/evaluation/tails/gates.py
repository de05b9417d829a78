"""Five gates that a claim about tails has to pass: enough of a tail, a fit, stability, an effect, and more than a mean.

After "EVT protocol" (arXiv 2606.16511), whose thresholds for the gates are not public; docs/methods.md gives ours. The
tail is the upper one: of scores where a high value is the bad one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.evaluation.stats.paired import Difference, holm
from mlx_rsgwm.evaluation.tails.pareto import GoodnessOfFit, goodness_of_fit, needed, standard_error
from mlx_rsgwm.evaluation.tails.resampling import Tails, resampled_tails, tail_count, tails_of

FEWEST = 200  # excesses: below, nothing is fitted
LARGEST_SCORE = 1e150  # whose square is finite
LEAST_DISTINCT, MOST_AT_CAP, LOWEST_SHAPE = 0.9, 0.01, -0.5
THRESHOLDS = (0.90, 0.925, 0.95, 0.97, 0.98)
STABLE_AT = 4  # of the five
PASS, REJECT, EQUIVALENT, INCONCLUSIVE = "PASS", "REJECT", "EQUIVALENT", "INCONCLUSIVE"


@dataclass(frozen=True)
class Settings:
    """``quantile`` where the tail begins; ``effect`` the difference in ξ that counts; ``level`` of every test."""

    quantile: float = 0.95
    effect: float = 0.10
    level: float = 0.05
    resamples: int = 999
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.5 <= self.quantile < 1:
            raise RsgwmError(f"a tail begins at a quantile from 0.5 to below 1, not at {self.quantile:g}")

    @property
    def least_excesses(self) -> int:
        """How many each arm's tail must have for ``effect`` to be found."""
        return max(FEWEST, needed(self.effect))


@dataclass(frozen=True)
class FittedTail:
    """One arm's tail: ``shape`` ξ and ``scale`` σ of its excesses over ``threshold``, and what the gates look at.

    ``expected`` is the mean of the tail's scores (CVaR). ``shapes`` are ξ by the quantiles of ``THRESHOLDS``.
    """

    name: str
    items: int
    excesses: int
    threshold: float
    shape: float
    scale: float
    standard_error: float
    distinct: float
    at_cap: float
    mean: float
    expected: float
    shapes: dict[str, float]
    fit: GoodnessOfFit

    def to_dict(self) -> dict[str, Any]:
        """JSON values by field; None for a ξ that is not there, as of a tail without spread."""
        return {name: _or_none(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Gate:
    """``passed`` None: not tried, for one before it failed or there is nothing to try it on."""

    number: int
    name: str
    passed: bool | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values by field."""
        return asdict(self)


@dataclass(frozen=True)
class TailVerdict:
    """``verdict`` PASS, REJECT, EQUIVALENT or INCONCLUSIVE; ``gate`` the number of the one that decided."""

    verdict: str
    gate: int | None
    reason: str
    gates: tuple[Gate, ...]
    arms: tuple[FittedTail, ...]
    differences: tuple[Difference, ...] = ()
    settings: Settings = field(default_factory=Settings)

    def to_dict(self) -> dict[str, Any]:
        """JSON values by field."""
        return {
            "verdict": self.verdict,
            "gate": self.gate,
            "reason": self.reason,
            "gates": [gate.to_dict() for gate in self.gates],
            "arms": [arm.to_dict() for arm in self.arms],
            "differences": [difference.to_dict() for difference in self.differences],
            "settings": asdict(self.settings),
        }


def _or_none(value: Any) -> Any:
    """NaN as None, in dictionaries too."""
    if isinstance(value, dict):
        return {name: _or_none(each) for name, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def fitted_tail(name: str, scores: np.ndarray, settings: Settings) -> FittedTail:
    """The tail of ``scores`` (n,).

    Raises:
        RsgwmError: scores that are not finite, too large to be summed or all alike, or fewer excesses than ``FEWEST``.
    """
    if not np.isfinite(scores).all():
        raise RsgwmError(f"{name}: {np.count_nonzero(~np.isfinite(scores))} of {len(scores)} scores are not finite")
    if (largest := float(np.abs(scores).max())) > LARGEST_SCORE:
        raise RsgwmError(f"{name}: scores of up to {largest:g} cannot be summed; divide them by a constant")
    if scores.min() == scores.max():
        raise RsgwmError(f"{name}: all {len(scores)} scores are {scores[0]:g}; a constant has no tail")
    count = tail_count(len(scores), settings.quantile)
    if count < FEWEST:
        least = round(FEWEST / (1 - settings.quantile))
        raise RsgwmError(
            f"{name}: {count} of {len(scores)} scores are above the {settings.quantile:g} quantile, at least {FEWEST} "
            f"are needed: {least} scores, or a lower --quantile"
        )
    tails = tails_of(scores[None], min(THRESHOLDS[0], settings.quantile))
    excesses = tails.excesses(settings.quantile)
    fits = tails.fits(settings.quantile)
    shape, scale = float(fits.shapes[0]), float(fits.scales[0])
    return FittedTail(
        name,
        len(scores),
        count,
        float(tails.thresholds(settings.quantile)[0]),
        shape,
        scale,
        standard_error(shape, count),
        len(np.unique(excesses)) / count,
        float((excesses == excesses.max()).mean()),
        float(scores.mean()),
        float(tails.expected(settings.quantile)[0]),
        {f"{quantile:g}": float(tails.fits(quantile).shapes[0]) for quantile in THRESHOLDS},
        goodness_of_fit(excesses[0], settings.seed, settings.resamples),
    )


def judge_tail(name: str, scores: np.ndarray, settings: Settings) -> TailVerdict:
    """Whether the tail of one arm's scores (n,) is fit to be spoken of: the first three gates."""
    arm = fitted_tail(name, scores, settings)
    gates = (_admissible((arm,), settings), _fits((arm,), settings), _stable((arm,)))
    failed = next((gate for gate in gates if not gate.passed), None)
    if failed is not None:
        return TailVerdict(REJECT, failed.number, failed.reason, gates, (arm,), settings=settings)
    reason = f"the tail is a generalised Pareto one with ξ = {arm.shape:+.3f} ± {1.96 * arm.standard_error:.3f}"
    return TailVerdict(PASS, None, reason, gates, (arm,), settings=settings)


def judge_tails(
    names: Sequence[str],
    arms: Sequence[np.ndarray],
    settings: Settings,
    second: Sequence[np.ndarray] | None = None,
) -> TailVerdict:
    """Whether the second arm's tail is another than the first's, by the scores of the same items (n,), which are
    resampled together; arms of other lengths by themselves.

    ``second`` are the same two arms by another scorer, on which the effect has to be found again.

    Raises:
        RsgwmError: see :func:`fitted_tail`; a second scorer that is the first.
    """
    if second is not None and all(map(np.array_equal, arms, second)):
        raise RsgwmError("--second holds the first scorer's scores; an effect is found again by another scorer")
    fitted = tuple(fitted_tail(*pair, settings) for pair in zip(names, arms, strict=True))
    tried = [_admissible(fitted, settings), _fits(fitted, settings), _stable(fitted)]
    if not all(gate.passed for gate in tried):
        return _ended(tried, fitted, settings)
    lowest = min(THRESHOLDS[0], settings.quantile)
    scorers = [resampled_tails(arms, lowest, settings.seed, settings.resamples)]
    points = [[tails_of(scores[None], lowest) for scores in arms]]
    if second is not None:
        scorers.append(resampled_tails(second, lowest, settings.seed, settings.resamples))
        points.append([tails_of(scores[None], lowest) for scores in second])
    differences = _corrected(
        [_difference(at, drawn, settings) for at, drawn in zip(points, scorers, strict=True)], settings
    )
    effect = differences[0]
    tried.append(_effect(effect, settings))
    if not tried[-1].passed:
        shapes = _shape_differences(scorers[0], settings.quantile)
        low, high = np.quantile(shapes, [settings.level, 1 - settings.level])
        return _ended(tried, fitted, settings, differences, equivalent=max(-low, high) < settings.effect)
    tried[2] = _same_at_all(points[0], scorers[0], effect)
    if tried[2].passed:
        tried.append(_increment(points[0], scorers[0], differences, second is not None, settings))
    return _ended(tried, fitted, settings, differences)


def _ended(
    tried: Sequence[Gate],
    arms: tuple[FittedTail, ...],
    settings: Settings,
    differences: tuple[Difference, ...] = (),
    equivalent: bool = False,
) -> TailVerdict:
    names = ("admissible", "fits", "stable", "effect", "increment")
    untried = tuple(Gate(number, names[number - 1], None, "not tried") for number in range(len(tried) + 1, 6))
    gates = (*tried, *untried)
    failed = next((gate for gate in tried if not gate.passed), None)
    if failed is None:
        return TailVerdict(PASS, None, tried[3].reason, gates, arms, differences, settings)
    if failed.number == 4:
        verdict = EQUIVALENT if equivalent else INCONCLUSIVE
        ends = "lies within" if equivalent else "reaches beyond"
        reason = f"{failed.reason}; its 90 % interval {ends} ±{settings.effect:g}"
        return TailVerdict(verdict, 4, reason, gates, arms, differences, settings)
    verdict = INCONCLUSIVE if failed.passed is None else REJECT
    return TailVerdict(verdict, failed.number, failed.reason, gates, arms, differences, settings)


def _admissible(arms: Sequence[FittedTail], settings: Settings) -> Gate:
    least, problems = settings.least_excesses, []
    for arm in arms:
        if arm.excesses < least:
            items = round(least / (1 - settings.quantile))
            problems.append(
                f"{arm.name} has {arm.excesses} excesses, a difference of {settings.effect:g} in ξ takes {least} "
                f"({items} scores)"
            )
        if arm.distinct < LEAST_DISTINCT:
            problems.append(f"only {arm.distinct:.0%} of {arm.name}'s excesses differ from each other")
        if arm.at_cap >= MOST_AT_CAP:
            problems.append(f"{arm.at_cap:.0%} of {arm.name}'s tail is its largest score: a cap")
        if math.isnan(arm.shape):
            problems.append(f"{arm.name}'s tail is its largest score alone and has no ξ")
        elif not arm.shape > LOWEST_SHAPE:
            problems.append(f"{arm.name} has ξ = {arm.shape:.2f}: scores that saturate; take them before the sigmoid")
    return Gate(1, "admissible", not problems, "; ".join(problems) or f"at least {least} excesses, distinct, no cap")


def _fits(arms: Sequence[FittedTail], settings: Settings) -> Gate:
    problems = [
        f"{arm.name} is no generalised Pareto tail (Anderson–Darling p = {arm.fit.anderson_darling:.3f}, Cramér–von "
        f"Mises p = {arm.fit.cramer_von_mises:.3f})"
        for arm in arms
        if min(arm.fit.anderson_darling, arm.fit.cramer_von_mises) < settings.level
    ]
    return Gate(2, "fits", not problems, "; ".join(problems) or f"p ≥ {settings.level:g} in both tests")


def _stable(arms: Sequence[FittedTail]) -> Gate:
    problems = []
    for arm in arms:
        values = list(arm.shapes.values())
        if not np.isfinite(values).all():
            problems.append(f"{arm.name} has no ξ above some thresholds")
            continue
        # The highest threshold has the fewest excesses: its error is what the others may differ by.
        error = standard_error(values[-1], tail_count(arm.items, THRESHOLDS[-1]))
        if max(values) - min(values) > 2 * error:
            problems.append(
                f"{arm.name}'s ξ goes from {min(values):.2f} to {max(values):.2f} over the thresholds, twice the "
                f"standard error is {2 * error:.2f}"
            )
    return Gate(3, "stable", not problems, "; ".join(problems) or "ξ stays within twice its standard error")


def _shape_differences(arms: Sequence[Tails], quantile: float) -> np.ndarray:
    first, second = (arm.fits(quantile).shapes for arm in arms)
    return second - first


def _difference(points: Sequence[Tails], arms: Sequence[Tails], settings: Settings) -> Difference:
    """Of ξ, second minus first, with its interval and two-sided p-value over resampled items."""
    drawn = _shape_differences(arms, settings.quantile)
    low, high = np.quantile(drawn, [settings.level / 2, 1 - settings.level / 2])
    beyond = 1 + min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    value = float(_shape_differences(points, settings.quantile)[0])
    return Difference(value, float(low), float(high), points[0].items, min(1.0, 2 * beyond / (len(drawn) + 1)))


def _corrected(differences: Sequence[Difference], settings: Settings) -> tuple[Difference, ...]:
    """The same with Holm's correction of the p-values over the scorers."""
    corrected = holm([difference.p_value or 0.0 for difference in differences])
    return tuple(
        Difference(difference.value, difference.low, difference.high, difference.n, p_value)
        for difference, p_value in zip(differences, corrected, strict=True)
    )


def _effect(difference: Difference, settings: Settings) -> Gate:
    interval = f"[{difference.low:+.3f}, {difference.high:+.3f}]"
    told = f"ξ differs by {difference.value:+.3f} {interval}, p = {difference.p_value:.3f}"
    assert difference.p_value is not None
    passed = abs(difference.value) >= settings.effect and difference.p_value < settings.level
    return Gate(4, "effect", passed, told)


def _same_at_all(points: Sequence[Tails], arms: Sequence[Tails], effect: Difference) -> Gate:
    """Whether the difference has its sign, and leaves out 0, at nearly every threshold."""
    agreeing, values = 0, []
    for quantile in THRESHOLDS:
        value = float(_shape_differences(points, quantile)[0])
        low, high = np.quantile(_shape_differences(arms, quantile), [0.025, 0.975])
        values.append(value)
        agreeing += value * effect.value > 0 and (low > 0 or high < 0)
    told = ", ".join(f"{value:+.2f}" for value in values)
    reason = f"the difference holds at {agreeing} of {len(THRESHOLDS)} thresholds ({told})"
    return Gate(3, "stable", agreeing >= STABLE_AT and all(value * effect.value > 0 for value in values), reason)


def _increment(
    points: Sequence[Tails],
    arms: Sequence[Tails],
    differences: Sequence[Difference],
    has_second: bool,
    settings: Settings,
) -> Gate:
    """Whether the tail says more than mean and expected tail, and another scorer says the same."""
    value = float((points[1].depth(settings.quantile) - points[0].depth(settings.quantile))[0])
    drawn = arms[1].depth(settings.quantile) - arms[0].depth(settings.quantile)
    low, high = np.quantile(drawn, [settings.level / 2, 1 - settings.level / 2])
    told = f"beyond mean and expected tail {value:+.3f} [{low:+.3f}, {high:+.3f}]"
    if not (value * differences[0].value > 0 and (low > 0 or high < 0)):
        return Gate(5, "increment", False, f"{told}: they say as much")
    if not has_second:
        return Gate(5, "increment", None, f"{told}; no second scorer was given to find it again (--second)")
    again = differences[1]
    assert again.p_value is not None
    passed = again.value * differences[0].value > 0 and again.p_value < settings.level
    return Gate(
        5, "increment", passed, f"{told}; by the second scorer ξ differs by {again.value:+.3f}, p = {again.p_value:.3f}"
    )
