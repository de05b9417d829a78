"""What a merge is asked to do, as the user says it; :mod:`methods` knows what each method takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.nearest import nearest
from mlx_rsgwm.core.patterns import compile_pattern
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.data.batching import ROLES

# Means stay below the norm of the largest source. RegMean with little data, which does not, came to 8 times it, DARE
# at density .001 comes to 32, and what divides by rounding errors to 1e5 and more.
LARGEST = 40.0
AUTO = "auto"  # in the place of a method: the one that suits the pool


@dataclass(frozen=True)
class Override:
    """Another treatment of the modules whose name the regular expression ``pattern`` finds.

    ``method``: another method, with ``parameters`` of its own; or none, and ``parameters`` replace some of the merge's.
    ``weights``: others than the merge's. ``ranks``: what each adapter's update is brought to before it is merged.
    """

    pattern: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    method: str = ""
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(rank < 1 for rank in self.ranks):
            raise RsgwmError(f"merge options: ranks of {self.pattern!r} must be at least 1, found {list(self.ranks)}")
        try:
            compile_pattern(self.pattern)
        except ValueError as error:
            raise RsgwmError(f"merge options: {error}") from None

    def covers(self, module: str) -> bool:
        """Whether the pattern is found in a module's name."""
        return compile_pattern(self.pattern).search(module)


@dataclass(frozen=True)
class MergeOptions:
    """A merge: its method, for which role, and how.

    ``method``: a name of the table, or ``auto`` (:mod:`~mlx_rsgwm.merging.automatic`).
    ``role`` is a name; draft and verify are the two of the pipeline, others need a ``signal`` and a ``tau``.
    ``parameters`` are the method's own, by name; what is left out takes the method's default. ``weights``: one per
    adapter, or empty for equal ones. ``rank``: of the result; None for the method's usual one, the highest of the
    sources or, for ``cat``, their sum. ``seed`` sets random masks and sketches. ``largest``: a result of more than so
    many times the norm that its sources and weights allow is refused (:mod:`~mlx_rsgwm.merging.diagnosis`).
    """

    method: str = AUTO
    role: str = "draft"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    rank: int | None = None
    seed: int = DEFAULT_SEED
    overrides: tuple[Override, ...] = ()
    largest: float = LARGEST

    def __post_init__(self) -> None:
        problems = []
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", self.role):
            problems.append(f"role must be a lower-case name, found {self.role!r}")
        elif self.role not in ROLES and (near := nearest(self.role, ROLES)):
            problems.append(f"role {self.role!r} is much like one of the pipeline's; did you mean {near!r}?")
        if self.rank is not None and self.rank < 1:
            problems.append(f"rank must be at least 1, found {self.rank}")
        if not 0 < self.largest < float("inf"):
            problems.append(f"largest must be a number above 0, found {self.largest}")
        for weights in (self.weights, *(override.weights for override in self.overrides)):
            if any(not abs(weight) < float("inf") for weight in weights):
                problems.append("weights must be finite")
        raise_problems("merge options", problems)
