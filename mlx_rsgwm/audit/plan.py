"""A merge plan: for every module a method, weights and the reason, as a YAML file that a person can read and change.

What is lopsided is rebalanced, what repeats or opposes itself is merged by sign election, what is safe is averaged
("From Diagnosis to Guarded Repair"; gradience, ``merge/recommend.py``; ``compat``: its ``plan.py``, which differs for
modules that repeat or oppose each other). The merge engine carries it out with its own methods: its sign election is
by the sum of the values, where gradience counts signs and gives every tie of two adapters to plus.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from mlx_rsgwm.audit.pair_audit import ModulePair
from mlx_rsgwm.audit.pool_audit import PoolAudit
from mlx_rsgwm.audit.verdicts import CONFLICTING, IMBALANCED, REDUNDANT, SAFE, SEVERITY, Thresholds
from mlx_rsgwm.core import files
from mlx_rsgwm.core.config import build, read_yaml
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.merging.options import MergeOptions, Override

KIND = "merge-plan"
# Compress first where directions overlap so much and so small a share of the rank has the energy.
OVERLAP_TO_COMPRESS, SHARE_TO_COMPRESS, SMALLEST_RANK, SPARE = 0.5, 0.4, 4, 1.1
HEADER = """\
# A merge plan of rsgwm audit. Change what you like; then: rsgwm merge --plan THIS_FILE --out FOLDER
# weights, in the order of the adapters; density: share of the entries that is kept; ranks: what each is cut to first.
"""


@dataclass(frozen=True)
class ModulePlan:
    """How one module is merged, and why; weights, and ranks if any, in the order of the plan's adapters."""

    method: str
    weights: tuple[float, ...]
    density: float | None = None
    ranks: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class PlannedAdapter:
    """Where an adapter of a plan was, and what tells it from others."""

    adapter: str
    fingerprint: str | None = None


@dataclass(frozen=True)
class Plan:
    """``adapters`` in the order of all weights, and ``modules`` by name; others are averaged."""

    adapters: tuple[PlannedAdapter, ...]
    modules: Mapping[str, ModulePlan] = field(default_factory=dict)
    kind: str = KIND

    def __post_init__(self) -> None:
        if self.kind != KIND:
            raise RsgwmError(f"a plan's kind is {KIND}, found {self.kind!r}")
        if len(self.adapters) < 2:
            raise RsgwmError(f"a plan is for at least two adapters, found {len(self.adapters)}")
        if not self.modules:
            raise RsgwmError("the plan names no module, so there is nothing to carry out")
        count = len(self.adapters)
        raise_problems(
            "the plan",
            [
                f"{name} has {len(values)} {what} for {count} adapters"
                for name, module in self.modules.items()
                for what, values in (("weights", module.weights), ("ranks", module.ranks or (1,) * count))
                if len(values) != count
            ],
        )

    def save(self, path: Path) -> None:
        """Write it as YAML."""
        import yaml

        entries = {name: {key: _plain(value) for key, value in _told(module)} for name, module in self.modules.items()}
        body = {"kind": KIND, "adapters": [asdict(adapter) for adapter in self.adapters], "modules": entries}
        files.write_text(path, HEADER + yaml.safe_dump(body, sort_keys=False, width=120, default_flow_style=None))

    def options(self, options: MergeOptions) -> MergeOptions:
        """``options`` for the merge that the plan is: a mean, but for its modules."""
        overrides = [
            Override(
                f"^{re.escape(name)}$",
                {} if module.density is None else {"density": module.density},
                module.weights,
                module.method,
                module.ranks,
            )
            for name, module in self.modules.items()
        ]
        return replace(options, method="linear", overrides=tuple(overrides))

    def ordered(self, fingerprints: Sequence[str | None], labels: Sequence[str]) -> list[int]:
        """Positions of the plan's adapters among those given.

        Raises:
            RsgwmError: an adapter of the plan is not among them, or others are (each is named).
        """
        places = {fingerprint: index for index, fingerprint in enumerate(fingerprints) if fingerprint is not None}
        problems = [
            f"{adapter.adapter} of the plan is not among the adapters given, or has changed since"
            for adapter in self.adapters
            if adapter.fingerprint not in places
        ]
        planned = {adapter.fingerprint for adapter in self.adapters}
        problems += [
            f"{label} is not in the plan"
            for fingerprint, label in zip(fingerprints, labels, strict=True)
            if fingerprint not in planned
        ]
        raise_problems("the plan is for other adapters; make a new one with rsgwm audit … --plan", problems)
        return [places[str(adapter.fingerprint)] for adapter in self.adapters]


def read_plan(path: Path) -> Plan:
    """The plan at ``path``. RsgwmError for what cannot be read, unknown keys, wrong types, no module."""
    values = read_yaml(files.read_text(path, files.LARGEST_YAML), str(path))
    try:
        return build(Plan, values, str(path))
    except RsgwmError as error:
        raise RsgwmError(error if str(path) in str(error) else f"{path}: {error}") from None


def plan_of(audited: PoolAudit, compat: bool = False) -> Plan:
    """What is recommended for an audited pool, from the worst of its pairs in every module.

    Raises:
        RsgwmError: fewer than two adapters.
    """
    if len(audited.adapters) < 2:
        raise RsgwmError("a plan is for a merge, and so for at least two adapters")
    adapters = tuple(PlannedAdapter(adapter.label, adapter.fingerprint) for adapter in audited.adapters)
    pairs: dict[str, list[tuple[tuple[int, int], ModulePair]]] = {}
    for pair in audited.pairs:
        for module in pair.modules:
            pairs.setdefault(module.name, []).append(((pair.first, pair.second), module))
    modules = {name: _planned(of_module, audited, compat) for name, of_module in pairs.items()}
    return Plan(adapters, modules)


def _planned(pairs: Sequence[tuple[tuple[int, int], ModulePair]], audited: PoolAudit, compat: bool) -> ModulePlan:
    (first, second), worst = max(pairs, key=lambda pair: SEVERITY.index(pair[1].verdict.name))
    count = len(audited.adapters)
    equal = (1 / count,) * count
    labels = audited.labels
    reason = f"{labels[first]} and {labels[second]}: " if count > 2 else ""
    ranks = _compressed(pairs, count, audited)
    if worst.verdict.name == IMBALANCED:
        told = f"norms {worst.frobenius_ratio:.3g}-fold apart"
        return ModulePlan("linear", _balanced(pairs, count), None, ranks, f"{reason}imbalanced, {told}")
    told = f"overlap {worst.mean_overlap:.2f}, agreement {worst.agreement:+.2f}"
    if worst.verdict.name == SAFE:
        return ModulePlan("linear", equal, None, ranks, f"{reason}safe, {told}")
    density = _density(worst, audited.thresholds, compat)
    dropped = worst.verdict.name == CONFLICTING and not compat
    return ModulePlan(
        "dare_ties" if dropped else "ties", equal, density, ranks, f"{reason}{worst.verdict.name}, {told}"
    )


def _density(pair: ModulePair, thresholds: Thresholds, compat: bool) -> float:
    """1 − trim of TIES where two adapters repeat each other, 1 − drop of DARE-TIES where they oppose each other."""
    if pair.verdict.name == REDUNDANT:
        trim = 0.0 if compat or pair.mean_overlap <= 0.5 else 0.1 + 0.4 * (pair.mean_overlap - 0.5) / 0.5
        return round(1.0 - trim, 4)
    drop = 0.2 if compat else 0.15 + 0.35 * pair.conflicts(thresholds) / len(pair.cosines)
    return round(1.0 - drop, 4)


def _balanced(pairs: Sequence[tuple[tuple[int, int], ModulePair]], count: int) -> tuple[float, ...]:
    """Weights by the inverse of the norms, so that every adapter has as much to say; of two 1/(1+ρ) and ρ/(1+ρ)."""
    norms: dict[int, float] = {}
    for positions, pair in pairs:
        norms.update(zip(positions, pair.norms, strict=True))
    inverse = [1 / norms[index] if norms.get(index) else 0.0 for index in range(count)]
    # An adapter without the module, or with one that is zero, has nothing to be balanced: it counts as in a mean.
    return tuple(round(value / sum(inverse), 6) if value else 1 / count for value in inverse)


def _compressed(pairs: Sequence[tuple[tuple[int, int], ModulePair]], count: int, audited: PoolAudit) -> tuple[int, ...]:
    """Ranks to cut the adapters to first, where they overlap and use a small part of theirs; none where nothing is."""
    targets: dict[int, int] = {}
    for positions, pair in pairs:
        for index, rank, used in zip(positions, pair.ranks, pair.energy_ranks, strict=True):
            target = max(ceil(SPARE * used), SMALLEST_RANK)
            small = pair.mean_overlap > OVERLAP_TO_COMPRESS and used / rank < SHARE_TO_COMPRESS
            if small and target < rank:
                targets[index] = target
    if not targets:
        return ()
    return tuple(targets.get(index, audited.adapters[index].rank) for index in range(count))


def _told(module: ModulePlan) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in asdict(module).items() if value not in (None, ())]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
