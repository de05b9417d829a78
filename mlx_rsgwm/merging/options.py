"""What a merge is asked to do: the method's name and its parameters, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from mlx_rsgwm.errors import RsgwmError, raise_problems
from mlx_rsgwm.merging.masks import NORMALISATIONS, SCOPES

# A role is a name, and here its quantile: the drafter keeps the top 70 %, the verifier the top 50 % (SPEC 8).
ROLE_TAU: Mapping[str, float] = MappingProxyType({"draft": 0.30, "verify": 0.50})
SIGNAL_CHOICES = ("per_role", "shared")
REFERENCES = ("init", "zero")


@dataclass(frozen=True)
class MergeOptions:
    """Parameters of a merge; methods ignore what they have no use for and say so in their docstring.

    ``role``: draft or verify. ``tau``: quantile of the mask, None for the role's own. ``signal``: which importance is
    used, the role's own (``per_role``) or the one over all batches (``shared``, the paper's letter). ``scope``: over
    what the quantile is taken. ``reference``: deltas are taken from the shared initialisation (``init``) or from zero.
    ``normalise``: how importances of different tasks are brought to one scale. ``weights``: one per adapter, or empty
    for equal ones.
    """

    method: str = "rsgwm"
    role: str = "draft"
    tau: float | None = None
    signal: str = "per_role"
    scope: str = "tensor"
    reference: str = "init"
    normalise: str = "mean"
    epsilon: float = 1e-8
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        for name, choices in (
            ("role", tuple(ROLE_TAU)),
            ("signal", SIGNAL_CHOICES),
            ("scope", SCOPES),
            ("reference", REFERENCES),
            ("normalise", NORMALISATIONS),
        ):
            if getattr(self, name) not in choices:
                problems.append(f"{name} must be one of {', '.join(choices)}, found {getattr(self, name)!r}")
        if self.tau is not None and not 0 < self.tau < 1:
            problems.append(f"tau must be in (0, 1), found {self.tau}")
        if not 0 < self.epsilon < 1:
            problems.append(f"epsilon must be in (0, 1), found {self.epsilon}")
        if any(not abs(weight) < float("inf") for weight in self.weights):
            problems.append("weights must be finite")
        elif self.weights and sum(self.weights) == 0:
            problems.append("weights must not sum to zero")
        raise_problems("merge options", problems, RsgwmError)

    @property
    def quantile(self) -> float:
        """τ in force."""
        return ROLE_TAU[self.role] if self.tau is None else self.tau

    def describe(self) -> dict[str, Any]:
        """JSON object for the manifest, with τ resolved."""
        return {**asdict(self), "tau": self.quantile, "weights": list(self.weights)}
