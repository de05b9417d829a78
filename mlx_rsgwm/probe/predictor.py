"""A fitted predictor: what it was fitted to, what it says of new sets, how sure it is, and where it does not speak."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.versions import versions
from mlx_rsgwm.probe.features import Examples, examples_of, set_features
from mlx_rsgwm.probe.measures import FINGERPRINTS, MEASURES
from mlx_rsgwm.probe.models import KINDS, Model, find_model
from mlx_rsgwm.probe.outcomes import Outcomes
from mlx_rsgwm.probe.table import Table
from mlx_rsgwm.probe.validation import PERMUTATIONS, RESAMPLES, Validation, lower_margin, validate

KIND, VERSION = "merge-predictor", 1
SUFFIX = ".predictor.json"
COVERAGE = 0.8
# A feature may lie outside what was fitted to by as much as that spans; farther away nothing is said.
SLACK = 1.0
PROVENANCE = {"base", "at", "utility", "target", "left_out", "left_out_sets"}


class PredictorRefusal(RsgwmError):
    """A predictor is not for what it was asked about."""


@dataclass(frozen=True)
class Forecast:
    """Predicted retention of a set, and what at least 80 % of such sets keep."""

    value: float
    low: float


@dataclass(frozen=True)
class Predictor:
    """``model`` of a ``kind`` on ``features``, for merges by ``method``.

    ``margin``: what the 80 % bound lies below a prediction; ``ranges`` (d, 2): of the features it was fitted to;
    ``about``: provenance: base, share of training, data, tasks, utility, target, sets, figures on left-out tasks.
    """

    kind: str
    method: str
    features: tuple[str, ...]
    model: Model
    margin: float
    ranges: np.ndarray
    about: Mapping[str, Any]

    def forecast(self, table: Table, members: Sequence[str]) -> Forecast:
        """Of a set whose pairs the table has.

        Raises:
            RsgwmError: a table of another base, share of training or measures, a pair that it has not, or a measure
                far outside what the predictor was fitted to (it is named).
        """
        self.check(table)
        table.require_pairs(members)
        known = set_features(members, table.by_pair(), table.columns)
        x = np.array([known[name] for name in self.features])
        self._check_ranges(x, members)
        value = float(self.model.predict(x[None])[0])
        if not np.isfinite(value):
            raise PredictorRefusal(f"the predictor of {self.method} forecasts no number for {' and '.join(members)}")
        return Forecast(value, value - self.margin)

    @property
    def residuals(self) -> np.ndarray:
        """Measured − predicted (n,) of the sets on left-out tasks: how wrong a forecast may be."""
        return np.array([measured - predicted for _, predicted, measured in self.about["left_out_sets"]])

    def check(self, table: Table) -> None:
        """Raise unless the predictor may be used on what a table was measured on."""
        base, other = self.about["base"], table.about.get("base")
        if base and other and base != other:
            raise PredictorRefusal(
                f"the predictor was fitted on another base ({str(base)[:12]}, here {str(other)[:12]})"
            )
        if table.at != self.about["at"]:
            raise PredictorRefusal(
                f"the predictor was fitted at {self.about['at']:g} of training, the table is at {table.at:g}"
            )
        known = set_features(table.rows[0].adapters, table.by_pair(), table.columns)
        if missing := [name for name in self.features if name not in known]:
            raise PredictorRefusal(
                f"the predictor was fitted on other measures: the table has no {missing[0]}"
                + (f", and {len(missing) - 1} more are missing" if len(missing) > 1 else "")
            )

    def _check_ranges(self, x: np.ndarray, members: Sequence[str]) -> None:
        low, high = self.ranges.T
        slack = SLACK * (high - low)
        outside = np.flatnonzero((x < low - slack) | (x > high + slack))
        if len(outside):
            place = int(outside[0])
            raise PredictorRefusal(
                f"{' and '.join(members)} are far outside what the predictor was fitted to: "
                f"{self.features[place]} is {x[place]:.3g}, there it was {low[place]:.3g} to {high[place]:.3g}"
            )

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        files.write_json(
            path,
            {
                "kind": KIND,
                "version": VERSION,
                "model": self.kind,
                "method": self.method,
                "features": list(self.features),
                "margin": self.margin if np.isfinite(self.margin) else None,
                "ranges": self.ranges.tolist(),
                "fitted": self.model.to_dict(),
                "about": dict(self.about),
            },
        )

    @classmethod
    def load(cls, path: Path) -> Predictor:
        """Raises RsgwmError for what is no predictor."""
        value = files.read_json_object(path)
        if value.get("kind") != KIND or value.get("version") != VERSION:
            raise RsgwmError(f"{path} is no predictor of rsgwm probe fit")
        try:
            return cls._from_dict(value)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise RsgwmError(f"{path} is a damaged predictor ({error})") from None

    @classmethod
    def _from_dict(cls, value: Mapping[str, Any]) -> Predictor:
        features = tuple(str(name) for name in value["features"])
        ranges = np.array(value["ranges"], np.float64)
        model = KINDS[value["model"]].from_dict(value["fitted"])
        margin = float("inf") if value["margin"] is None else float(value["margin"])
        at = value["about"]["at"]
        if isinstance(at, bool) or not isinstance(at, (int, float)) or not 0 < at <= 1 or np.isnan(margin):
            raise ValueError("share of training or margin out of range")
        about = dict(value["about"])
        if ranges.shape != (len(features), 2) or (ranges[:, 0] > ranges[:, 1]).any() or not about.keys() >= PROVENANCE:
            raise ValueError("ranges or provenance do not fit")
        model.predict(np.zeros((1, len(features))))  # another number of features, a tree that asks for one beyond them
        predictor = cls(str(value["model"]), str(value["method"]), features, model, margin, ranges, about)
        if not len(predictor.residuals) or not np.isfinite(predictor.residuals).all():
            raise ValueError("no predictions on left-out tasks")
        return predictor


@dataclass(frozen=True)
class Fitted:
    """A predictor with how it did on left-out tasks, set by set."""

    predictor: Predictor
    validation: Validation
    examples: Examples


def fit_predictor(
    table: Table,
    outcomes: Outcomes,
    method: str,
    kind: str = "ridge",
    utility: str = "nll",
    target: str = "mean",
    seed: int = 0,
    permutations: int = PERMUTATIONS,
    resamples: int = RESAMPLES,
) -> Fitted:
    """Fit one model to one method's outcomes; it is judged on left-out tasks, and then fitted to all.

    ``kind``: ridge, trees or their blend on everything, fingerprint on the 28 (those of them that the table has) of
    pairs alone.

    Raises:
        RsgwmError: an unknown model or method, too few sets or tasks, a table of other adapters.
    """
    fit = find_model(kind)
    examples = examples_of(table, outcomes, method, utility, target, 2 if kind == "fingerprint" else None)
    examples = chosen_features(examples, fingerprint=kind == "fingerprint")
    checked = validate(examples, fit, seed, resamples=resamples, permutations=permutations)
    about = {
        "made_by": versions()["mlx-rsgwm"],
        "base": table.about.get("base"),
        "at": table.at,
        "data": table.about.get("data"),
        "utility": utility,
        "target": target,
        "tasks": sorted({task for tasks in examples.tasks for task in tasks}),
        "sets": len(examples.y),
        "retention": [float(examples.y.min()), float(np.median(examples.y)), float(examples.y.max())],
        "left_out": checked.to_dict(),
        "left_out_sets": [
            [list(members), float(predicted), float(measured)]
            for members, predicted, measured in zip(examples.sets, checked.predicted, examples.y, strict=True)
        ],
    }
    predictor = Predictor(
        kind,
        method,
        examples.features,
        fit(examples.x, examples.y),
        lower_margin(checked.predicted, checked.measured, COVERAGE),
        np.stack([examples.x.min(axis=0), examples.x.max(axis=0)], axis=1),
        about,
    )
    return Fitted(predictor, checked, examples)


def chosen_features(examples: Examples, fingerprint: bool) -> Examples:
    """Without features that do not vary or repeat another; of the fingerprints' measures alone, if asked for."""
    wanted = {name for name, measure in MEASURES.items() if measure.source == FINGERPRINTS}
    places: list[int] = []
    for place, name in enumerate(examples.features):
        values = examples.x[:, place]
        repeats = any(np.array_equal(values, examples.x[:, other]) for other in places)
        if np.ptp(values) > 0 and not repeats and (not fingerprint or name in wanted):
            places.append(place)
    if not places:
        raise RsgwmError("no measure varies between the sets; there is nothing to predict by")
    names = tuple(examples.features[place] for place in places)
    return Examples(names, examples.x[:, places], examples.y, examples.sets, examples.tasks)


def read_predictors(folder: Path) -> list[Predictor]:
    """The predictors that a folder holds, or the one in a file, sorted by name.

    Raises:
        RsgwmError: there is none, or one is damaged.
    """
    files_there = [folder] if folder.is_file() else sorted(folder.glob(f"*{SUFFIX}"))
    if not files_there:
        raise RsgwmError(f"{folder} holds no predictor; rsgwm probe fit makes them")
    return [Predictor.load(path) for path in files_there]


def file_name(method: str, kind: str) -> str:
    """What the file of a predictor is called."""
    return f"{re.sub(r'[^A-Za-z0-9.=_-]+', '-', method)}.{kind}{SUFFIX}"
