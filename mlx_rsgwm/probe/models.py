"""The models that predict retention from features: ridge, gradient-boosted trees, their mean, and the fingerprint fit.

All are plain numbers after fitting, so that a file of them runs nothing when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from mlx_rsgwm.core.errors import RsgwmError

CONSTANT = 1e-12
# The fingerprint fit's, as its authors run it (arXiv 2601.22285): Adam, and what ends it.
RATE, STEPS, PATIENCE, IMPROVEMENT, NOTHING = 0.01, 1000, 50, 1e-4, 1e-3
RIDGE_STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class Linear:
    """ŷ = intercept + Σ β (x − centre) / spread. Arrays (d,) float64; what does not vary has β 0."""

    centre: np.ndarray
    spread: np.ndarray
    beta: np.ndarray
    intercept: float

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(n,) of features (n, d)."""
        scaled = (x - self.centre) / self.spread
        predicted: np.ndarray = self.intercept + scaled @ self.beta
        return predicted

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        arrays = {name: getattr(self, name).tolist() for name in ("centre", "spread", "beta")}
        return {**arrays, "intercept": self.intercept}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Linear:
        """Raises ValueError, KeyError or TypeError for what is none."""
        arrays = [np.array(value[name], np.float64) for name in ("centre", "spread", "beta")]
        if len({each.shape for each in arrays}) > 1 or arrays[0].ndim != 1:
            raise ValueError("centre, spread and beta differ in length")
        if not all(np.isfinite(each).all() for each in arrays) or (arrays[1] <= 0).any():
            raise ValueError("centre, spread or beta out of range")
        return cls(arrays[0], arrays[1], arrays[2], float(value["intercept"]))


@dataclass(frozen=True)
class Trees:
    """A sum of regression trees. ``nodes``: of each tree, per node the feature (−1 in a leaf), the threshold, the
    places of its left and right child, and its value; a value up to the threshold goes left."""

    start: float
    rate: float
    nodes: tuple[tuple[tuple[float, ...], ...], ...]

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(n,) of features (n, d)."""
        total = np.full(len(x), self.start)
        for tree in self.nodes:
            for place, row in enumerate(x.astype(np.float32)):
                node = tree[0]
                while node[0] >= 0:
                    node = tree[int(node[2] if row[int(node[0])] <= node[1] else node[3])]
                total[place] += self.rate * node[4]
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"start": self.start, "rate": self.rate, "nodes": [list(map(list, tree)) for tree in self.nodes]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Trees:
        """Raises ValueError, KeyError, TypeError or IndexError for what is none."""
        nodes = tuple(tuple(tuple(map(float, node)) for node in tree) for tree in value["nodes"])
        for tree in nodes:
            for place, (feature, _, left, right, _) in enumerate(tree):
                # Children come after their parents, so that a walk ends.
                if feature >= 0 and not (place < left < len(tree) and place < right < len(tree)):
                    raise ValueError("a tree's nodes are out of order")
        return cls(float(value["start"]), float(value["rate"]), nodes)


@dataclass(frozen=True)
class Blend:
    """The mean of what ridge and trees predict: a line's reach, and bends where there is enough to see them."""

    ridge: Linear
    trees: Trees

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(n,) of features (n, d)."""
        mean: np.ndarray = (self.ridge.predict(x) + self.trees.predict(x)) / 2
        return mean

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"ridge": self.ridge.to_dict(), "trees": self.trees.to_dict()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Blend:
        """Raises ValueError, KeyError, TypeError or IndexError for what is none."""
        return cls(Linear.from_dict(value["ridge"]), Trees.from_dict(value["trees"]))


Model = Linear | Trees | Blend


def fit_ridge(x: np.ndarray, y: np.ndarray) -> Linear:
    """Ridge on standardised features (n, d), y (n,); its strength by leaving one row out within these."""
    from sklearn.linear_model import RidgeCV

    spread = x.std(axis=0)
    centre, spread = x.mean(axis=0), np.where(spread > CONSTANT, spread, 1.0)
    model = RidgeCV(RIDGE_STRENGTHS).fit((x - centre) / spread, y)
    return Linear(centre, spread, np.asarray(model.coef_, np.float64), float(model.intercept_))


def fit_trees(x: np.ndarray, y: np.ndarray) -> Trees:
    """Gradient-boosted regression trees of depth 2, 100 of them at a rate of .05, on half of the rows each."""
    from sklearn.ensemble import GradientBoostingRegressor

    model = GradientBoostingRegressor(
        n_estimators=100, max_depth=2, learning_rate=0.05, subsample=0.5, min_samples_leaf=3, random_state=0
    ).fit(x.astype(np.float32), y)
    nodes = []
    for (tree,) in model.estimators_:
        inner = tree.tree_
        features = np.where(inner.children_left < 0, -1, inner.feature)
        columns = (features, inner.threshold, inner.children_left, inner.children_right, inner.value[:, 0, 0])
        nodes.append(tuple(tuple(map(float, node)) for node in zip(*columns, strict=True)))
    return Trees(float(np.ravel(model.init_.constant_)[0]), float(model.learning_rate), tuple(nodes))


def fit_blend(x: np.ndarray, y: np.ndarray) -> Blend:
    """Ridge and trees, each as by itself."""
    return Blend(fit_ridge(x, y), fit_trees(x, y))


def fit_fingerprint(x: np.ndarray, y: np.ndarray, strength: float = 1.0) -> Linear:
    """The fingerprint of a method: β on features brought to [−1, 1] that gives −Pearson(Xβ, y) + λ‖β‖₁ its least.

    Adam at .01 for 1000 steps, ended after 50 without 1e-4 of improvement; |β| below 1e-3 is 0. A correlation has
    neither place nor scale, so the line from Xβ to y is fitted afterwards. λ is 1.0 (arXiv 2601.22285).
    """
    low, high = x.min(axis=0), x.max(axis=0)
    centre, spread = (low + high) / 2, np.where(high - low > CONSTANT, (high - low) / 2, 1.0)
    beta = _correlating((x - centre) / spread, y, strength)
    score = ((x - centre) / spread) @ beta
    if not beta.any() or np.ptp(score) < CONSTANT:
        return Linear(centre, spread, np.zeros_like(beta), float(y.mean()))
    slope = float(((score - score.mean()) @ (y - y.mean())) / np.square(score - score.mean()).sum())
    return Linear(centre, spread, slope * beta, float(y.mean() - slope * score.mean()))


def _correlating(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """β (d,) by Adam on −Pearson(xβ, y) + λ‖β‖₁ of x (n, d)."""
    target = y - y.mean()
    norm = np.sqrt(target @ target)
    if norm < CONSTANT:
        return np.zeros(x.shape[1])
    centred = x - x.mean(axis=0)
    beta = centred.T @ target / (norm * np.sqrt(len(y)))  # nothing is random: begins at the single correlations
    best, best_loss, waited = beta, np.inf, 0
    first, second = np.zeros_like(beta), np.zeros_like(beta)
    for step in range(1, STEPS + 1):
        score = centred @ beta
        length = max(float(np.sqrt(score @ score)), CONSTANT)
        correlation = float(score @ target) / (length * norm)
        loss = -correlation + strength * np.abs(beta).sum()
        if loss < best_loss - IMPROVEMENT:
            best, best_loss, waited = beta, loss, 0
        elif (waited := waited + 1) >= PATIENCE:
            break
        along = centred.T @ (target / norm - correlation * score / length) / length
        gradient = -along + strength * np.sign(beta)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * np.square(gradient)
        beta = beta - RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return np.where(np.abs(best) < NOTHING, 0.0, best)


Fit = Callable[[np.ndarray, np.ndarray], Model]
MODELS: Mapping[str, Fit] = MappingProxyType(
    {"ridge": fit_ridge, "trees": fit_trees, "blend": fit_blend, "fingerprint": fit_fingerprint}
)
KINDS: Mapping[str, type[Linear] | type[Trees] | type[Blend]] = MappingProxyType(
    {"ridge": Linear, "trees": Trees, "blend": Blend, "fingerprint": Linear}
)


def find_model(name: str) -> Fit:
    """Raises RsgwmError for an unknown one."""
    if name not in MODELS:
        raise RsgwmError(f"model {name!r} is unknown; there are {', '.join(MODELS)}")
    return MODELS[name]
