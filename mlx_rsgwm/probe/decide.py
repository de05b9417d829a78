"""What to do with adapters: merge, reweight, prune, or route between them, in pairs and in groups of a pool.

The choice is the action of least cost_a + λ E[max(0, τ − R_a)] (MergeProbe, arXiv 2606.19549): R_a is what the best of
the action's methods is forecast to keep, with the errors that its predictor made on left-out tasks. Without predictors
a rule of the measures alone decides, and nothing is said of retention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from math import exp
from types import MappingProxyType
from typing import Any

import numpy as np

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.merging.methods import find_method, needs_directions
from mlx_rsgwm.models.adapter import Adapter
from mlx_rsgwm.probe.predictor import Forecast, Predictor, PredictorRefusal
from mlx_rsgwm.probe.table import PairRow, Table

MERGE, REWEIGHT, PRUNE, ROUTE = "merge", "reweight", "prune", "route"
COSTS: Mapping[str, float] = MappingProxyType({MERGE: 0.0, REWEIGHT: 0.01, PRUNE: 0.02, ROUTE: 0.10})
WEIGHT, WORTH = 1.0, 0.95
# The plan of the audit, in the place of a method: each module gets its own.
PLAN = "audit plan"
PRUNING = (
    *("ties", "dare_linear", "dare_ties", "della", "della_linear"),
    *("breadcrumbs", "breadcrumbs_ties", "magnitude_prune"),
)
# Methods by what they do to a pool; what is not here merges.
ACTION_OF: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("norm_equalised", PLAN), REWEIGHT),
        **dict.fromkeys(PRUNING, PRUNE),
    }
)
TIE = 1e-12  # costs that differ by rounding alone
# Of the rule: norms apart, entries opposed, a sum much longer than its parts.
NORM_RATIO, OPPOSED, AMPLIFIED = 3.0, 0.4, 1.3
RULE_MEASURES = ("log_norm_ratio.mean", "sign_disagreement.mean", "overamplification.mean")
LARGEST_LOG = 700.0  # of which exp is a float still
STATISTICS = ("importance", "directions")  # what a method may need beside the weights


@dataclass(frozen=True)
class Choice:
    """What to do with ``members``. ``method``: of the merge, empty where they are routed. ``retention``, ``bound``:
    forecast, and what four of five such sets keep; None where nothing was forecast. ``cost``: what the choice is by;
    ``others``: those of the other actions. ``reason``: in words."""

    members: tuple[str, ...]
    action: str
    method: str = ""
    retention: float | None = None
    bound: float | None = None
    cost: float = 0.0
    others: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a bound that is infinitely low is None."""
        bound = None if self.bound is None or not np.isfinite(self.bound) else self.bound
        return {**asdict(self), "bound": bound}


@dataclass(frozen=True)
class Decision:
    """``groups``: every adapter in one; of several groups routing chooses. ``pairs``: each pair by itself.
    ``predicted``: whether predictors decided, or the rule; then ``reason`` says why, if that was not asked for."""

    groups: tuple[Choice, ...]
    pairs: tuple[Choice, ...]
    predicted: bool
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "predicted": self.predicted,
            "reason": self.reason,
            "groups": [each.to_dict() for each in self.groups],
            "pairs": [each.to_dict() for each in self.pairs],
        }


def decide(table: Table, predictors: Sequence[Predictor] = ()) -> Decision:
    """What to do with the adapters of a table, pair by pair and together.

    Raises:
        RsgwmError: a predictor that does not fit the table, or measures far outside what it was fitted to.
    """
    for predictor in predictors:
        predictor.check(table)
    names = list(table.about["adapters"])
    require_different(table)
    table.require_pairs(names)
    pairs = tuple(choose(table, pair, predictors) for pair in combinations(names, 2))
    return Decision(tuple(grouped(table, names, predictors)), pairs, bool(predictors))


def choose(table: Table, members: Sequence[str], predictors: Sequence[Predictor] = ()) -> Choice:
    """The action for two or more adapters by themselves."""
    if not predictors:
        return _by_rule(table, tuple(members))
    best: dict[str, tuple[float, str, Forecast]] = {}
    for predictor in predictors:
        action = action_of(predictor.method)
        forecast = predictor.forecast(table, members)
        cost = COSTS[action] + WEIGHT * shortfall(forecast.value, predictor.residuals)
        if action not in best or cost < best[action][0]:
            best[action] = (cost, predictor.method, forecast)
    costs = {action: each[0] for action, each in best.items()} | {ROUTE: COSTS[ROUTE]}
    action = min(costs, key=lambda name: costs[name])
    others = {name: cost for name, cost in costs.items() if name != action}
    if action == ROUTE:
        least = max(forecast.value for _, _, forecast in best.values())
        reason = f"the best merge is forecast to keep {least:.3f}, which costs more than routing"
        return Choice(tuple(members), ROUTE, "", 1.0, 1.0, costs[ROUTE], others, reason)
    cost, method, forecast = best[action]
    reason = f"{method} is forecast to keep {forecast.value:.3f}"
    return Choice(tuple(members), action, method, forecast.value, forecast.low, cost, others, reason)


def shortfall(forecast: float, residuals: np.ndarray, worth: float = WORTH) -> float:
    """E[max(0, τ − R)] of R = the forecast + an error, whose values (n,) are equally likely."""
    return float(np.maximum(worth - (forecast + residuals), 0.0).mean())


def grouped(table: Table, names: Sequence[str], predictors: Sequence[Predictor]) -> list[Choice]:
    """Greedy clustering: every adapter by itself; then the two groups whose union costs least more than they do are
    joined, again and again, and of all these groupings the cheapest is taken, of equal ones that with fewest groups.

    What a merge costs counts for each of its adapters, and each group costs what routing does, where there are several
    to route between. Unions that are better routed, or that the predictors do not know, are not joined.
    """
    groups = [_alone(name) for name in names]
    known: dict[tuple[str, ...], Choice | None] = {}
    best, least = groups, _total(groups)
    while len(groups) > 1:
        unions = []
        for first, second in combinations(groups, 2):
            members = tuple(name for name in names if name in first.members + second.members)
            if members not in known:
                known[members] = _union(table, members, predictors)
            union = known[members]
            if union is not None:
                unions.append((_merging(union) - _merging(first) - _merging(second), first, second, union))
        if not unions:
            break
        _, first, second, joined = min(unions, key=lambda each: each[0])
        groups = [each for each in groups if each not in (first, second)] + [joined]
        if _total(groups) <= least + TIE:
            best, least = groups, _total(groups)
    return best


def _union(table: Table, members: tuple[str, ...], predictors: Sequence[Predictor]) -> Choice | None:
    """The merge of a group, or None where it is not to be made."""
    try:
        chosen = choose(table, members, predictors)
    except PredictorRefusal:
        return None
    return None if chosen.action == ROUTE else chosen


def require_different(table: Table) -> None:
    """Raise if two adapters of a table are one under two names."""
    by_content: dict[str, str] = {}
    for name, digest in table.about["adapters"].items():
        if digest and by_content.setdefault(digest, name) != name:
            raise RsgwmError(f"{by_content[digest]} and {name} are the same adapter; name it once")


def feasible(predictors: Sequence[Predictor], adapters: Sequence[Adapter]) -> list[Predictor]:
    """The predictors of methods that have what they need of ``adapters``, which are to be merged.

    Raises:
        RsgwmError: there are none, or one is of no method.
    """
    lacking = {need for need in STATISTICS if not all(getattr(adapter, need) for adapter in adapters)}
    chosen = [each for each in predictors if not lacking & _needs(each.method)]
    if not chosen:
        raise RsgwmError(
            f"the adapters have no {' and '.join(sorted(lacking))}, which every method with a predictor needs"
        )
    return chosen


def _needs(label: str) -> set[str]:
    name, parameters = variant(label)
    method = find_method(name)
    return {*method.needs, *(("directions",) if needs_directions(method, parameters) else ())}


def action_of(label: str) -> str:
    """What a method does to a pool, by its name as the outcomes have it."""
    return ACTION_OF.get(variant(label)[0], MERGE)


def variant(label: str) -> tuple[str, dict[str, Any]]:
    """Method and parameters of a name as the outcomes have it, ``ties:density=0.2``."""
    method, _, pairs = label.partition(":") if "=" in label else (label, "", "")
    parameters = dict(pair.partition("=")[::2] for pair in pairs.split(",") if pair)
    return method, {name: files.parse_json(value) if _is_json(value) else value for name, value in parameters.items()}


def _is_json(text: str) -> bool:
    try:
        files.parse_json(text)
    except ValueError:
        return False
    return True


def apart(decision: Decision) -> list[str]:
    """The adapters that no pair of the decision merges, reweights or prunes: they can only be routed to."""
    merges = {name for pair in decision.pairs if pair.action != ROUTE for name in pair.members}
    names = dict.fromkeys(name for pair in decision.pairs for name in pair.members)
    return [name for name in names if name not in merges]


def _total(groups: Sequence[Choice]) -> float:
    routing = COSTS[ROUTE] * len(groups) if len(groups) > 1 else 0.0
    return routing + sum(map(_merging, groups))


def _merging(choice: Choice) -> float:
    """What a group's merge costs, all its adapters together."""
    return 0.0 if len(choice.members) == 1 else choice.cost * len(choice.members)


def _alone(name: str) -> Choice:
    return Choice((name,), ROUTE, "", 1.0, 1.0, COSTS[ROUTE], {}, "by itself")


def _by_rule(table: Table, members: tuple[str, ...]) -> Choice:
    """The rule of the measures' worst pair; its costs stand for no forecast and only order the actions."""
    known = table.by_pair()
    actions = [rule(known[frozenset(pair)]) for pair in combinations(members, 2)]
    action, reason = max(actions, key=lambda each: COSTS[each[0]])
    method = {MERGE: "linear", REWEIGHT: PLAN, PRUNE: "ties"}[action]
    return Choice(members, action, method, None, None, COSTS[action], {}, reason)


def rule(row: PairRow) -> tuple[str, str]:
    """What a pair's measures ask for, and why."""
    if missing := [name for name in RULE_MEASURES if name not in row.measures]:
        raise RsgwmError(f"the table has no {missing[0]}, which the rule goes by; measure the adapters again")
    ratio = exp(min(row.measures["log_norm_ratio.mean"], LARGEST_LOG))
    if ratio > NORM_RATIO:
        return REWEIGHT, f"norms are {ratio:.1f} times apart"
    if (opposed := row.measures["sign_disagreement.mean"]) > OPPOSED:
        return PRUNE, f"{opposed:.0%} of what both change is opposed"
    if (amplified := row.measures["overamplification.mean"]) > AMPLIFIED:
        return PRUNE, f"the sum is {amplified:.2f} times as long as orthogonal updates'"
    return MERGE, "norms are alike, few entries are opposed, and the sum is not too long"


def only_method(predictors: Sequence[Predictor], kind: str) -> list[Predictor]:
    """The predictors of one kind of model, one a method.

    Raises:
        RsgwmError: there are none, or they forecast different things.
    """
    chosen = [each for each in predictors if each.kind == kind]
    if not chosen:
        there = ", ".join(sorted({each.kind for each in predictors}))
        raise RsgwmError(f"no predictor is a {kind}; there are {there}; name one of them with --decide-by")
    asked = {(each.about["utility"], each.about["target"]) for each in chosen}
    if len(asked) > 1:
        raise RsgwmError(f"the predictors forecast different things: {', '.join(map(' of '.join, sorted(asked)))}")
    return chosen
