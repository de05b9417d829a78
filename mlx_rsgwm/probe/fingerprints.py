"""What drives the success of each merge method, and how much methods have in common: fingerprints compared.

A method's fingerprint is β of its fit (arXiv 2601.22285). Of two methods the overlap is the share of the five largest
|β| that both have, and the sign agreement the share of those measures that count in both in which β has one sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mlx_rsgwm.core.tables import Rows, Section
from mlx_rsgwm.probe.models import Linear
from mlx_rsgwm.probe.predictor import Predictor

TOP = 5
# What the source reports of its methods, to stand beside: overlap, sign agreement.
SOURCE_OVERLAP, SOURCE_AGREEMENT = 0.467, 0.553


@dataclass(frozen=True)
class Agreement:
    """Means over the pairs of methods; of sign agreement those that share a measure that counts (None without)."""

    overlap: float
    signs: float | None
    pairs: int


def fingerprint(predictor: Predictor) -> dict[str, float]:
    """β by measure, largest |β| first, of a predictor whose model is linear; what counts for nothing is left out."""
    assert isinstance(predictor.model, Linear)
    weights = {name: float(beta) for name, beta in zip(predictor.features, predictor.model.beta, strict=True) if beta}
    return dict(sorted(weights.items(), key=lambda each: -abs(each[1])))


def agreement(fingerprints: Mapping[str, Mapping[str, float]]) -> Agreement | None:
    """Overlap and sign agreement of methods' fingerprints; None of fewer than two that are not empty."""
    overlaps, signs = [], []
    for first, second in combinations([each for each in fingerprints.values() if each], 2):
        tops = [set(list(each)[:TOP]) for each in (first, second)]
        overlaps.append(len(tops[0] & tops[1]) / min(TOP, *map(len, tops)))
        common = first.keys() & second.keys()
        if common:
            signs.append(np.mean([np.sign(first[name]) == np.sign(second[name]) for name in common]))
    if not overlaps:
        return None
    return Agreement(float(np.mean(overlaps)), float(np.mean(signs)) if signs else None, len(overlaps))


def sections(predictors: Sequence[Predictor]) -> list[Section]:
    """Tables of a report: how well each predicts left-out tasks, fingerprints, and what these have in common."""
    tables: list[Section] = [("On left-out tasks", left_out_rows(predictors))]
    prints = {each.method: fingerprint(each) for each in predictors if each.kind == "fingerprint"}
    if prints:
        tables.append(("Fingerprints: β by measure", _fingerprint_rows(prints)))
        if common := agreement(prints):
            tables.append(("What the methods have in common", _common_rows(common)))
    return tables


def left_out_rows(predictors: Sequence[Predictor]) -> Rows:
    """A line a predictor: Spearman, R², AUC with intervals, the best baseline, the null."""
    head = ["method", "model", "sets", "Spearman", "R²", "AUC of R ≥ .95", "best baseline", "above it", "permutation p"]
    return [head, *(_left_out_row(each) for each in predictors)]


def _left_out_row(predictor: Predictor) -> list[str]:
    told = predictor.about["left_out"]
    baselines = {name: each for name, each in told["baselines"].items() if each["value"] is not None}
    best = max(baselines, key=lambda name: baselines[name]["value"], default=None)
    return [
        predictor.method,
        predictor.kind,
        str(told["sets"]),
        *(_estimate(told[name]) for name in ("spearman", "r_squared", "auc")),
        "–" if best is None else f"{best} {_estimate(baselines[best])}",
        _estimate(told["above_best_baseline"]),
        f"{told['permutation_p']:.3f}",
    ]


def _estimate(figure: Mapping[str, float | None]) -> str:
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if value is None:
        return "–"
    return f"{value:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else "")


def _fingerprint_rows(prints: Mapping[str, Mapping[str, float]]) -> Rows:
    names = list(dict.fromkeys(name for each in prints.values() for name in each))
    body = [[name, *(f"{each[name]:+.3f}" if name in each else "" for each in prints.values())] for name in names]
    return [["measure", *prints], *body]


def _common_rows(common: Agreement) -> Rows:
    return [
        ["", f"here, {common.pairs} pairs of methods", "the source's methods"],
        [f"overlap of the {TOP} largest", f"{common.overlap:.1%}", f"{SOURCE_OVERLAP:.1%}"],
        ["sign agreement", "–" if common.signs is None else f"{common.signs:.1%}", f"{SOURCE_AGREEMENT:.1%}"],
    ]
