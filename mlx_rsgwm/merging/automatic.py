"""``auto``: the merge that suits a pool by what its adapters have kept, and why, in one line.

Second moments of the layers' inputs say most of how updates get along, importance less, norms least; so the first of
``regmean``, ``rsgwm``, ``norm_equalised`` and ``linear`` is taken that every adapter has what it needs for, and that
takes the parameters and weights that were given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_rsgwm.core.errors import AdapterError, RsgwmError
from mlx_rsgwm.core.nearest import nearest
from mlx_rsgwm.data.batching import ROLES
from mlx_rsgwm.merging.families.linear import survey_norms
from mlx_rsgwm.merging.methods import METHODS, method_for, weight_problems
from mlx_rsgwm.merging.options import AUTO, MergeOptions
from mlx_rsgwm.merging.pool import Pool
from mlx_rsgwm.models.directions import ALL

UNEQUAL = 2.0  # norms further apart than this are brought to one: a mean would give up the small ones


@dataclass(frozen=True)
class _Offer:
    """A method that a pool has all for, parameters that go with it, and why it is taken."""

    method: str
    reason: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


def choose_method(pool: Pool, options: MergeOptions) -> tuple[MergeOptions, str]:
    """``options`` with a method in the place of ``auto``, and the reason; other options come back as they are.

    Raises:
        RsgwmError: no method of them takes the parameters or weights that were given.
    """
    if options.method != AUTO:
        return options, ""
    changed = (override for override in options.overrides if not override.method)
    given = {*options.parameters, *(name for override in changed for name in override.parameters)}
    refusals: list[str] = []
    for offer in _offers(pool, options.role):
        offered = replace(options, method=offer.method, parameters={**offer.parameters, **options.parameters})
        problem = _refusal(offered, given, len(pool.sources))
        if problem is None:
            passed = f"{' and '.join(refusals)} would not take what was given; " if refusals else ""
            return offered, passed + offer.reason
        refusals.append(offer.method)
    raise RsgwmError("; ".join([f"merge options: {problem}", *([_advice(given)] if given else [])]))


def _offers(pool: Pool, role: str) -> Iterator[_Offer]:
    """What could be done with the pool, the best first; norms are looked at only when nothing better was taken."""
    lacking = []
    if has_directions(pool, role if role in ROLES else ALL):
        yield _Offer("regmean", "every adapter has directions of its layers' inputs")
    else:
        lacking.append("directions")
    signals = frozenset.intersection(*(source.signals for source in pool.sources))
    if signal := next((signal for signal in (role, ALL) if signal in signals), None):
        parameters = {} if signal == role else {"signal": "shared"}
        reason = "every adapter has importance" + ", and not every one directions" * bool(lacking)
        if pool.factor_problems():
            parameters["space"] = "product"
            reason += "; products are merged, since the factors do not share modules, ranks and initialisation"
        yield _Offer("rsgwm", reason, parameters)
    else:
        lacking.append("importance")
    norms: Any = survey_norms(pool, {}).tolist()
    ratio = max(norms) / min(norms)
    without = f"not every adapter has {' or '.join(lacking)}, and " if lacking else ""
    if ratio > UNEQUAL:
        yield _Offer("norm_equalised", f"{without}their norms are {ratio:.3g}-fold apart")
    yield _Offer("linear", f"{without}their norms are {ratio:.2f}-fold apart")


def has_directions(pool: Pool, role: str) -> bool:
    """Whether a merge by directions of ``role`` could begin; a damaged file is an error and no reason to go on."""
    try:
        pool.grams(role)
    except AdapterError:
        raise
    except RsgwmError:
        return False
    return True


def _refusal(options: MergeOptions, given: set[str], count: int) -> str | None:
    """Why the method of ``options`` cannot take them."""
    unknown = sorted(given - METHODS[options.method].parameters.keys())
    if unknown:
        return f"{options.method}, which auto comes to here, has no parameter {', '.join(map(repr, unknown))}"
    try:
        for override in options.overrides:
            method_for(options, override)
        problems = weight_problems(options, count)
    except RsgwmError as error:
        return str(error).removeprefix("merge options: ")
    return problems[0] if problems else None


def _advice(given: set[str]) -> str:
    """Methods that take the parameters, or the nearest names of some."""
    takers = [name for name, method in METHODS.items() if given and given <= method.parameters.keys()]
    if takers:
        return f"name one that has: --method {', '.join(takers[:4])}"
    known = sorted({name for method in METHODS.values() for name in method.parameters})
    near = {name: nearest(name, known) for name in sorted(given - set(known))}
    hints = [f"did you mean {close!r} in the place of {name!r}?" for name, close in near.items() if close]
    return " ".join(hints) or "name the method with --method (rsgwm merge --list)"
