"""Training in rounds (ATM, arXiv 2411.03055): the settings, and which steps of a run belong to which round.

What happens between rounds, the merging, is :mod:`mlx_rsgwm.merging.alternate`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError, raise_problems, range_problems

AVG_PRODUCT, AVG_FACTORS, FREEZE_A, ACCUMULATE = MODES = ("avg_product", "avg_factors", "freeze_a", "accumulate")
MOST_ALPHA = 100.0  # a step so many times as long as the merged update leads nowhere already
SCHEDULES = ("round", "run")
BY_PRODUCTS = (AVG_PRODUCT, ACCUMULATE)  # these merge by any method


@dataclass(frozen=True)
class Rounds:
    """``count`` rounds that share out a run's steps; after each all tasks' updates are merged, and all start there.

    ``mode``: ``avg_product`` merges products and brings them back to the rank; ``avg_factors`` averages factors;
    ``freeze_a`` trains lora_b alone, whose mean is exact; ``accumulate`` lays each round's merge under the next, with
    fresh factors on top. ``method`` and ``parameters`` are a merge's, for the two that merge products. ``alpha`` is
    the length of the step towards the merged update. ``schedule`` is what the learning rate's spans: each ``round``
    anew, or the whole ``run``, whose last round so has the least rate. ``number`` is which round a run is, 0 for all.
    """

    count: int
    mode: str = AVG_PRODUCT
    method: str = "linear"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    alpha: float = 1.0
    schedule: str = "round"
    number: int = 0

    def __post_init__(self) -> None:
        rules = {
            "count": (1 <= self.count <= 10_000, "from 1 to 10000"),
            "mode": (self.mode in MODES, f"of {', '.join(MODES)}"),
            "alpha": (0 < self.alpha <= MOST_ALPHA, f"above 0, at most {MOST_ALPHA:g}"),
            "schedule": (self.schedule in SCHEDULES, f"of {', '.join(SCHEDULES)}"),
            "number": (0 <= self.number <= self.count, "of a round, or 0 for all"),
        }
        problems = range_problems(self, rules)
        if self.mode not in BY_PRODUCTS and (self.method != "linear" or self.parameters):
            problems.append(
                f"mode {self.mode} averages factors; method and parameters are for {', '.join(BY_PRODUCTS)}"
            )
        raise_problems("rounds", problems)

    @property
    def last(self) -> bool:
        """Whether this is the last round."""
        return self.number == self.count

    def place(self, step: int, total: int) -> tuple[int, int]:
        """Where the schedule is at 0-based ``step`` of a round of ``total`` steps, and of how many steps it is."""
        if self.schedule == "round" or not self.number:
            return step, total
        return (self.number - 1) * total + step, self.count * total

    def at(self, number: int) -> Rounds:
        """Round ``number`` of them, from 1."""
        return replace(self, number=number)


def round_steps(plan: Sequence[list[int]], roles: Sequence[str], rounds: Rounds) -> list[list[int]]:
    """The steps of round ``rounds.number`` of a plan, whose steps are of ``roles``: as many in each round.

    Every role's steps are spread evenly, its last one in the last round, which so has all roles.

    Raises:
        RsgwmError: the steps cannot be dealt out alike, which numbers of rounds would do is said; a round has fewer
            steps than there are roles.
    """
    if len(plan) % rounds.count:
        divisors = [str(count) for count in range(2, len(plan) + 1) if len(plan) % count == 0]
        more = rounds.count * (len(plan) // rounds.count + 1)
        raise RsgwmError(
            f"{len(plan)} steps cannot be shared out among {rounds.count} rounds alike; take "
            f"{', '.join(divisors[:6]) or 'no'} rounds, or {more} steps"
        )
    each = len(plan) // rounds.count
    counts = {role: list(roles).count(role) for role in roles}
    if each < len(counts):
        raise RsgwmError(
            f"{rounds.count} rounds of {each} step each have no room for {' and '.join(counts)} in the last; "
            f"take at most {len(plan) // len(counts)} rounds"
        )
    seen = dict.fromkeys(counts, 0)
    places = []
    for step, role in zip(plan, roles, strict=True):
        seen[role] += 1
        places.append((seen[role] / counts[role], step))
    ordered = [step for _, step in sorted(places, key=lambda place: place[0])]
    return ordered[(rounds.number - 1) * each : rounds.number * each]
