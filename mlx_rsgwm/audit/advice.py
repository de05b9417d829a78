"""An audit in one line, for who knows none of the words: safe, merge with care, do not merge; and what to type."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from mlx_rsgwm.audit.pair_audit import PairAudit
from mlx_rsgwm.audit.pool_audit import PoolAudit, audit
from mlx_rsgwm.audit.verdicts import CONFLICTING, IMBALANCED, REDUNDANT, SAFE, SEVERITY
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.merging.pool import Pool
from mlx_rsgwm.models.adapter_sources import AdapterSource

GO, CARE, STOP = "safe", "merge with care", "do not merge"
# Of a pair's squared norm, what has to lie in modules that oppose each other before a merge is advised against: less
# than this a plan mends.
OPPOSED_SHARE = 0.10
PLAN = "plan.yaml"
# Before a merge up to so many adapters, of so many entries together, are audited: what takes three seconds at most.
MOST_AUDITED, MOST_ENTRIES = 8, 1 << 25


@dataclass(frozen=True)
class Advice:
    """``word``: safe, merge with care, do not merge; ``reason``: the one reason; ``command``: what to type next.

    ``leave_out``: of three or more adapters, the position of the one without which the rest would be better off.
    """

    word: str
    reason: str
    command: str
    leave_out: int | None = None

    @property
    def line(self) -> str:
        """Word, reason and command in one line."""
        return f"{self.word}: {self.reason}. Next: {self.command}"

    def to_dict(self, labels: Sequence[str]) -> dict[str, Any]:
        """Plain JSON values; ``labels`` of the adapters in their order."""
        left = None if self.leave_out is None else labels[self.leave_out]
        return {"verdict": self.word, "reason": self.reason, "command": self.command, "leave_out": left}


def advice_before_merge(adapters: Sequence[AdapterSource]) -> str:
    """The verdict and its reason for adapters that are about to be merged; of many or large ones that none was looked
    for, and nothing for what no audit takes: the merge says what is wrong with it.
    """
    try:
        pool = Pool.open(adapters)
        entries = sum(rank * (rows + columns) for each in pool.sources for rows, rank, columns in each.shapes.values())
        if len(adapters) < 2:
            return ""
        if len(adapters) > MOST_AUDITED or entries > MOST_ENTRIES:
            return "not looked at before the merge, it would take a while; rsgwm audit does"
        advice = advise(audit(adapters))
    except RsgwmError:
        return ""
    return f"{advice.word}: {advice.reason}"


def word_of(pair: PairAudit) -> str:
    """What a pair's verdict means for who wants to merge it."""
    if pair.share(CONFLICTING) >= OPPOSED_SHARE:
        return STOP
    return GO if pair.verdict == SAFE else CARE


def worst_first(audited: PoolAudit) -> list[PairAudit]:
    """The pairs, the one to worry about most first."""
    return sorted(audited.pairs, key=_badness, reverse=True)


def advise(audited: PoolAudit, weak: Sequence[int] = ()) -> Advice:
    """What to do with a pool; ``weak``: positions of adapters that are no better than the base on their own rows.

    Raises:
        ValueError: of a pool of one there is nothing to say.
    """
    labels = audited.labels
    if len(weak) == len(labels):
        chat = f"rsgwm chat --base {shlex.quote(audited.base)}" if audited.base else "rsgwm train --help"
        return Advice(STOP, "every adapter is worse than the base on its own rows; use neither", chat)
    if weak:
        rest = [label for index, label in enumerate(labels) if index not in weak]
        reason = f"{labels[weak[0]]} is worse than the base on its own rows"
        return Advice(CARE, reason, _without(rest), weak[0])
    if not audited.pairs:
        raise ValueError("one adapter is no pool")
    empty = [index for index, adapter in enumerate(audited.adapters) if not adapter.norm]
    if empty and len(empty) < len(labels):
        rest = [label for index, label in enumerate(labels) if index not in empty]
        return Advice(CARE, f"{labels[empty[0]]} changes nothing", _without(rest), empty[0])
    worst = worst_first(audited)[0]
    word = word_of(worst)
    if worst.verdict == REDUNDANT and _same(audited, worst):
        rest = [label for index, label in enumerate(labels) if index != worst.second]
        reason = f"{labels[worst.first]} and {labels[worst.second]} are the same adapter"
        return Advice(word, reason, _without(rest), worst.second)
    out = _left_out(audited) if len(labels) > 2 and worst.verdict in (CONFLICTING, IMBALANCED) else None
    return Advice(word, _reason(audited, worst), _command(audited, word, out), out)


def _same(audited: PoolAudit, pair: PairAudit) -> bool:
    first, second = (audited.adapters[index].fingerprint for index in (pair.first, pair.second))
    return first is not None and first == second


def _reason(audited: PoolAudit, pair: PairAudit) -> str:
    first, second = audited.labels[pair.first], audited.labels[pair.second]
    names, count = f"{first} and {second}", len(pair.modules)
    number = sum(module.verdict.name == pair.verdict for module in pair.modules)
    where = f"in {number} of {count} modules"
    if pair.verdict == CONFLICTING:
        return f"{names} change the same directions the opposite way {where}"
    if pair.verdict == IMBALANCED:
        small, large = (first, second) if pair.norms[0] < pair.norms[1] else (second, first)
        by = max(module.frobenius_ratio for module in pair.modules if module.verdict.name == IMBALANCED)
        if by == inf:
            return f"{small} changes next to nothing beside {large} {where}, and would be drowned"
        return f"{large} is up to {by:.3g} times as large as {small} {where}, and would drown it"
    if pair.verdict == REDUNDANT:
        return f"{names} change the same directions the same way {where}; much of one repeats the other"
    return "no two of them change the same directions or differ much in size"


def _command(audited: PoolAudit, word: str, out: int | None) -> str:
    labels = audited.labels
    # By directions a merge finds itself what a plan would balance or keep apart, and better (docs/lab-notes/audit.md).
    if word == GO or (word == CARE and audited.directions):
        return f"rsgwm merge {shlex.join(labels)} --out merged"
    if word == STOP:
        rest = [label for index, label in enumerate(labels) if index != out]
        return _without(rest) if out is not None else _apart(labels)
    return f"rsgwm audit {shlex.join(labels)} --plan {PLAN} && rsgwm merge --plan {PLAN} --out merged"


def _without(rest: Sequence[str]) -> str:
    if len(rest) < 2:
        return f"rsgwm chat --adapter {shlex.quote(rest[0])}"
    return f"rsgwm audit {shlex.join(rest)}"


def _apart(labels: Sequence[str]) -> str:
    """Adapters used one at a time; what follows the first is a comment to a shell."""
    return f"rsgwm chat --adapter {shlex.quote(labels[0])}  # or {shlex.join(labels[1:])}, one at a time"


def _left_out(audited: PoolAudit) -> int:
    """The adapter without which the worst pair of the rest is best."""

    def rest(index: int) -> tuple[float, ...]:
        left = [_badness(pair) for pair in audited.pairs if index not in (pair.first, pair.second)]
        return max(left)

    return min(range(len(audited.adapters)), key=rest)


def _badness(pair: PairAudit) -> tuple[float, ...]:
    """Severity, the share of the energy in modules of that verdict, then the overlap."""
    return (SEVERITY.index(pair.verdict), pair.share(pair.verdict), pair.mean_overlap)
