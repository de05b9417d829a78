"""The table of pairs: a file of JSON lines whose first says what all rows depend on, and a row for every pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.json_lines import read_json_lines
from mlx_rsgwm.core.tables import aligned

TABLE = "pair-table"
VERSION = 1


@dataclass(frozen=True)
class PairRow:
    """Two adapters as they were named, what each was trained on, how many modules both change, and every measure."""

    adapters: tuple[str, str]
    tasks: tuple[str, str]
    modules: int
    measures: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> PairRow:
        """Raises ValueError, KeyError or TypeError for what is no row of a table."""
        names, tasks = ([str(name) for name in row[field]] for field in ("adapters", "tasks"))
        measures = {str(name): float(value) for name, value in dict(row["measures"]).items()}
        if len(names) != 2 or len(tasks) != 2 or names[0] == names[1] or not measures:
            raise ValueError("not two adapters with measures")
        if not all(map(math.isfinite, measures.values())):
            raise ValueError("a measure that is not finite")
        return cls((names[0], names[1]), (tasks[0], tasks[1]), int(row["modules"]), measures)


@dataclass(frozen=True)
class Table:
    """``about``: base, share of training, adapters and data; ``rows`` in the order of the file."""

    about: Mapping[str, Any]
    rows: tuple[PairRow, ...]

    @property
    def at(self) -> float:
        """The share of training that the adapters were measured at."""
        return float(self.about["at"])

    @property
    def columns(self) -> list[str]:
        """Measures that every row has, in order."""
        return [name for name in self.rows[0].measures if all(name in row.measures for row in self.rows)]

    def by_pair(self) -> dict[frozenset[str], PairRow]:
        """Rows by the two adapters, whose order does not count."""
        return {frozenset(row.adapters): row for row in self.rows}

    def in_order(self) -> list[PairRow]:
        """Rows in the order of the adapters that the table names."""
        places = {name: place for place, name in enumerate(self.about["adapters"])}
        return sorted(self.rows, key=lambda row: [places[name] for name in row.adapters])

    def chosen(self, adapters: Mapping[str, str], at: float) -> Table:
        """The table of some of its adapters.

        Args:
            adapters: identities by name, as in ``about``.
            at: the share of training that they are at.

        Raises:
            RsgwmError: it is of other adapters, or of another share.
        """
        if self.at != at:
            raise RsgwmError(f"the table is at {self.at:g} of training, the adapters are at {at:g}")
        for name, digest in adapters.items():
            if self.about["adapters"].get(name) != digest:
                raise RsgwmError(f"the table was measured without {name} as it is now; measure it again")
        rows = tuple(row for row in self.rows if adapters.keys() >= set(row.adapters))
        return Table({**self.about, "adapters": dict(adapters)}, rows)

    def require_pairs(self, adapters: Sequence[str]) -> None:
        """Raises RsgwmError unless every two of ``adapters`` are in it."""
        known = self.by_pair()
        for place, first in enumerate(adapters):
            for second in adapters[place + 1 :]:
                if frozenset((first, second)) not in known:
                    raise RsgwmError(f"the table has no row of {first} and {second}; measure them")


def read_table(path: Path) -> Table:
    """A table that ``rsgwm probe measure`` wrote.

    Raises:
        RsgwmError: it cannot be read, is no table, has no rows, or one that is damaged.
    """
    numbered = read_json_lines(path)
    head = numbered[0].value if numbered else None
    about = head.get("about") if isinstance(head, Mapping) else None
    if not isinstance(about, Mapping) or about.get("kind") != TABLE or about.get("version") != VERSION:
        raise RsgwmError(f"{path} is no table of rsgwm probe measure")
    at = about.get("at")
    if isinstance(at, bool) or not isinstance(at, (int, float)) or not 0 < at <= 1:
        raise RsgwmError(f"{path} does not say what share of training its adapters are at")
    rows = []
    for row in numbered[1:]:
        try:
            rows.append(PairRow.from_dict(row.value))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RsgwmError(f"{path} line {row.number} is damaged ({error})") from None
    if not rows:
        raise RsgwmError(f"{path} has no pairs")
    return Table(about, tuple(rows))


def render_rows(rows: Sequence[PairRow]) -> str:
    """What a person looks at first of every pair."""
    shown = {
        "cosine": "task_vector_cosine",
        "norm ratio": "task_vector_norm_ratio",
        "overlap": "audit_overlap",
        "sign disagreement": "sign_disagreement.mean",
        "over-amplification": "overamplification.mean",
    }
    return aligned(
        [
            ["pair", *shown, "modules"],
            *(
                [" × ".join(row.adapters), *(f"{row.measures[name]:.3f}" for name in shown.values()), str(row.modules)]
                for row in rows
            ),
        ]
    )
