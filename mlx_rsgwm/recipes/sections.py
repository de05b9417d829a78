"""The sections of a recipe that need no other: averaging checkpoints, own mistakes, evaluating, exporting."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from mlx_rsgwm.core.errors import raise_problems
from mlx_rsgwm.training.average_weights import AverageOptions

MOST_CHECKPOINTS = 100


@dataclass(frozen=True)
class AverageSection(AverageOptions):
    """Every run's checkpoints are averaged; the options are ``rsgwm average``'s. ``save_every`` counts steps.

    A recipe trains without validation rows, so losses are those of training. ``last`` 0 is all, at most 100.
    """

    save_every: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.save_every < 1:
            problems.append(f"save_every must be at least 1, found {self.save_every}")
        if self.metric == "validation-loss":
            problems.append("metric is validation-loss, and a recipe trains without validation rows; take train-loss")
        raise_problems("recipe, average", problems)

    @property
    def keep(self) -> int:
        """How many checkpoints training keeps."""
        return self.last or MOST_CHECKPOINTS


@dataclass(frozen=True)
class OwnMistakesSection:
    """After the merge a verifier is trained on the drafter's own mistakes, and evaluated as a pair of its own.

    The drafter drafts ``attempts`` answers to ``items`` training questions of each task; ``rows`` of each task, half of
    them right and half wrong, are trained on for ``epochs``. With ``true_equations`` no wrong one states a false
    equation.
    """

    items: int = 48
    attempts: int = 2
    rows: int = 48
    epochs: int = 1
    true_equations: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, found {value}"
            for name in ("items", "attempts", "epochs")
            if (value := getattr(self, name)) < 1
        ]
        if self.rows < 2 or self.rows % 2:
            problems.append(f"rows must be even and at least 2, for they come in pairs, found {self.rows}")
        raise_problems("recipe, own_mistakes", problems)


@dataclass(frozen=True)
class EvaluateSection:
    """What to evaluate on: ``items`` test questions of each task (default: the trained ones), ``timed`` one by one.

    ``allow_overlap``: ask what was trained or calibrated on, too; the report says so above its figures.
    """

    tasks: tuple[str, ...] = ()
    items: int = 25
    timed: int = 12
    batch_rows: int = 32
    allow_overlap: bool = False

    def __post_init__(self) -> None:
        least = {"items": 1, "timed": 0, "batch_rows": 1}
        problems = [
            f"{name} must be at least {low}, found {value}"
            for name, low in least.items()
            if (value := getattr(self, name)) < low
        ]
        if len(set(self.tasks)) != len(self.tasks):
            problems.append(f"tasks must be named once each, found {', '.join(self.tasks)}")
        raise_problems("recipe, evaluate", problems)


@dataclass(frozen=True)
class ExportSection:
    """``peft``: write both adapters in PEFT's format. ``parity``: compare the drafter with torch + PEFT."""

    peft: bool = True
    parity: bool = True
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.tolerance < float("inf"):
            problems.append(f"tolerance must be above 0, found {self.tolerance}")
        missing = [name for name in ("torch", "peft") if find_spec(name) is None] if self.parity else []
        if missing:
            problems.append(
                f"parity needs {' and '.join(missing)}: pip install 'mlx-rsgwm[torch]', or set export.parity to false"
            )
        raise_problems("recipe, export", problems)
