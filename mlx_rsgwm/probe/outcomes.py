"""What merges did to the adapters that went into them: the retention that predictors are fitted to.

A utility is measured on rows of each adapter's own task that it was not trained on, of the merge, of the adapter alone
and of the base. Retention R is the merge's over the adapter's; with the base as floor R̃ = (merge − base)/(adapter −
base), where the adapter is above the base by more than twice the difference's standard error, else nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.json_lines import read_json_lines

OUTCOMES, VERSION = "merge-outcomes", 1
SINGLE, BASE = "single", "base"
NLL, TOKENS, ANSWERS = "nll", "tokens", "answers"
UTILITIES = (NLL, TOKENS, ANSWERS)


@dataclass(frozen=True)
class Scores:
    """Of the rows of one task: loss in nats, likeliest tokens and all trained tokens; of questions that were answered
    greedily as well, right answers and all (0 where none were). ``margins``: of an adapter alone, twice the standard
    error of its difference from the base, by utility."""

    nats: float
    right: int
    tokens: int
    correct: int = 0
    items: int = 0
    margins: Mapping[str, float] | None = None

    def value(self, utility: str) -> float | None:
        """The utility, higher better; nll as exp(−nats a token), the geometric mean of the tokens' probabilities."""
        if utility == NLL:
            return math.exp(-self.nats / self.tokens)
        if utility == TOKENS:
            return self.right / self.tokens
        return self.correct / self.items if self.items else None

    def above(self, base: Scores, utility: str) -> float | None:
        """How much the utility is above the base's: of nll in nats a token, else in shares."""
        if utility == NLL:
            return base.nats / base.tokens - self.nats / self.tokens
        mine, other = self.value(utility), base.value(utility)
        return None if mine is None or other is None else mine - other


@dataclass(frozen=True)
class OutcomeRow:
    """``members`` merged by ``method`` (or ``single``, or ``base``), and the scores of each on its task; ``refused``:
    why the merge was not made, without scores then."""

    members: tuple[str, ...]
    method: str
    scores: Mapping[str, Scores]
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> OutcomeRow:
        """Raises ValueError, KeyError or TypeError for what is no row of outcomes."""
        members = tuple(str(name) for name in row["members"])
        scores = {str(name): Scores(**values) for name, values in dict(row["scores"]).items()}
        refused = str(row["refused"])
        if not members or (not refused and set(scores) != set(members)):
            raise ValueError("scores are not those of the members")
        for each in scores.values():
            if not each.tokens > 0 or not math.isfinite(each.nats) or not 0 <= each.right <= each.tokens:
                raise ValueError("scores out of range")
        return cls(members, str(row["method"]), scores, refused)


@dataclass(frozen=True)
class Retention:
    """Of one merge: ``shares`` R by member, and ``floored`` R̃ of those whose gain over the base is no accident."""

    members: tuple[str, ...]
    method: str
    shares: Mapping[str, float]
    floored: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Of R over the members."""
        return float(np.mean(list(self.shares.values())))

    @property
    def worst(self) -> float:
        """The least R of the members."""
        return min(self.shares.values())


@dataclass(frozen=True)
class Outcomes:
    """``about``: adapters and data; ``rows`` by members and method."""

    about: Mapping[str, Any]
    rows: Mapping[tuple[frozenset[str], str], OutcomeRow]

    @property
    def tasks(self) -> dict[str, str]:
        """By adapter."""
        return {str(name): str(task) for name, task in dict(self.about["tasks"]).items()}

    @property
    def methods(self) -> list[str]:
        """Of the merges, in the order in which they were made."""
        return list(dict.fromkeys(row.method for row in self.rows.values() if row.method not in (SINGLE, BASE)))

    def retentions(self, utility: str = NLL, size: int | None = None) -> list[Retention]:
        """Of every merge that was made, of ``size`` adapters or all.

        Raises:
            RsgwmError: no scores of this utility, or of the adapters alone.
        """
        merged = []
        for row in self.rows.values():
            if row.method in (SINGLE, BASE) or row.refused or size not in (None, len(row.members)):
                continue
            merged.append(self._retention(row, utility))
        if not merged:
            raise RsgwmError("the outcomes hold no merge" + (f" of {size} adapters" if size else ""))
        return merged

    def _retention(self, row: OutcomeRow, utility: str) -> Retention:
        shares, floored = {}, {}
        for name in row.members:
            single, base = (self._alone(name, method) for method in (SINGLE, BASE))
            value, alone = row.scores[name].value(utility), single.value(utility)
            if value is None or alone is None:
                raise RsgwmError(f"the outcomes hold no {utility} of {name}; give --items to have questions answered")
            shares[name] = value / alone if alone else 0.0
            gain, remaining = single.above(base, utility), row.scores[name].above(base, utility)
            if gain is not None and remaining is not None and gain > (single.margins or {}).get(utility, 0.0) > 0:
                floored[name] = remaining / gain
        return Retention(row.members, row.method, shares, floored)

    def _alone(self, name: str, method: str) -> Scores:
        row = self.rows.get((frozenset((name,)), method))
        if row is None or name not in row.scores:
            raise RsgwmError(f"the outcomes do not say what {name} does alone; run rsgwm probe outcomes to its end")
        return row.scores[name]


def read_outcomes(path: Path) -> Outcomes:
    """What ``rsgwm probe outcomes`` wrote, shards of other processes included.

    Raises:
        RsgwmError: it cannot be read, is none, or a row is damaged.
    """
    shards = sorted(each for each in path.parent.glob(f"{path.stem}.*{path.suffix}") if each != path)
    rows: dict[tuple[frozenset[str], str], OutcomeRow] = {}
    about: Mapping[str, Any] | None = None
    for file in (path, *shards):
        numbered = read_json_lines(file)
        head = numbered[0].value if numbered else None
        told = head.get("about") if isinstance(head, Mapping) else None
        if not isinstance(told, Mapping) or told.get("kind") != OUTCOMES or told.get("version") != VERSION:
            raise RsgwmError(f"{file} is no file of rsgwm probe outcomes")
        if about is not None and told != about:
            raise RsgwmError(f"{file} is of other adapters or data than {path}")
        about = told
        for row in numbered[1:]:
            try:
                parsed = OutcomeRow.from_dict(row.value)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RsgwmError(f"{file} line {row.number} is damaged ({error})") from None
            rows[frozenset(parsed.members), parsed.method] = parsed
    assert about is not None
    return Outcomes(about, rows)


def random_sets(names: Sequence[str], sizes: Sequence[int], count: int, seed: int) -> list[tuple[str, ...]]:
    """``count`` different sets of adapters, or as many as there are, sizes in turns; the same for the same seed."""
    rng = np.random.default_rng(seed)
    drawn: dict[tuple[str, ...], None] = {}
    fitting = [size for size in sizes if size <= len(names)]
    for turn in range(50 * count if fitting else 0):
        chosen = sorted(rng.choice(len(names), fitting[turn % len(fitting)], replace=False).tolist())
        drawn.setdefault(tuple(names[place] for place in chosen))
        if len(drawn) == count:
            break
    return list(drawn)
