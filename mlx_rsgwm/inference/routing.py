"""Which adapter of a pool a question is for, by the state of its prompt in the bare base.

A prompt's state is the mean of its tokens' hidden states after the first layers of the base, which no adapter changes.
A router is fitted on questions of every adapter's task and chooses by one of three rules; where there are none, by the
first of them, from what training kept of every task (:mod:`~mlx_rsgwm.models.prompt_statistics`):

- ``distance``: to the mean of each task's states, in the metric of their common covariance, shrunk (Ledoit and Wolf,
  2004); a linear discriminant.
- ``nearest``: votes of the nearest labelled questions, by cosine.
- ``classifier``: logistic regression on standardised states.

Its margin is the probability (or share of the votes) of the chosen adapter above that of the next. Likelihood of the
prompt is no rule here: where loss was on completions alone an adapter knows its answers and not its questions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.safetensors_io import read_safetensors, write_safetensors
from mlx_rsgwm.data.template import Template
from mlx_rsgwm.models.base import Base
from mlx_rsgwm.models.prompt_states import depth_of, prompt_states
from mlx_rsgwm.models.prompt_statistics import LEAST, PromptStatistics

RULES = ("distance", "nearest", "classifier")
FORMAT = "mlx-rsgwm/router"
NEIGHBOURS, FOLDS = 5, 5
UNTRIED_MARGIN = 0.9  # of a router that no question has tried, and whose probabilities are too sure of themselves


@dataclass(frozen=True)
class Route:
    """``name`` of the chosen adapter; ``probabilities`` (adapters,) in the router's order; ``margin`` in [0, 1]."""

    name: str
    margin: float
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Router:
    """Chooses among ``names`` by ``rule``.

    ``layer``: states are those after so many layers. ``arrays``: linear rules have weight (adapters, dims) and bias
    (adapters,), nearest has states (n, dims), unit length, and labels (n,); all float64. ``margin``: below it no
    adapter is sure. ``about``: base and template that the states depend on, the adapters' hashes, and what was measured
    when it was fitted.
    """

    names: tuple[str, ...]
    rule: str
    layer: int
    arrays: Mapping[str, np.ndarray]
    margin: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)

    def routes(self, states: np.ndarray) -> list[Route]:
        """One for each row of states (n, dims)."""
        shares = _shares(self.rule, self.arrays, states, len(self.names))
        ordered = np.sort(shares, axis=1)
        return [
            Route(self.names[int(chosen)], float(row[-1] - row[-2]), tuple(of.tolist()))
            for chosen, row, of in zip(shares.argmax(axis=1), ordered, shares, strict=True)
        ]

    def digest(self) -> str:
        """Hex SHA-256 of what its choices depend on."""
        values = {name: array.tolist() for name, array in self.arrays.items()}
        return files.sha256_json([self.names, self.rule, self.layer, self.margin, values])

    def save(self, path: Path) -> None:
        """Write one safetensors file; what is there is replaced."""
        told = {"names": list(self.names), "rule": self.rule, "layer": self.layer, "margin": self.margin}
        metadata = {"kind": FORMAT, "router": json.dumps({**told, "about": dict(self.about)})}
        write_safetensors(path, {name: _bits(array) for name, array in self.arrays.items()}, metadata)

    @staticmethod
    def load(path: Path) -> Router:
        """Read what :meth:`save` wrote.

        Raises:
            RsgwmError: no such file, or one that holds no sound router.
        """
        arrays, metadata = read_safetensors(path)
        if metadata.get("kind") != FORMAT:
            raise RsgwmError(f"{path} is no router; rsgwm pool route makes one")
        try:
            told = files.parse_json(metadata["router"])
            values = {name: _values(array) for name, array in arrays.items()}
            names, rule, layer = tuple(told["names"]), told["rule"], told["layer"]
            router = Router(names, rule, layer, values, told["margin"], dict(told["about"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RsgwmError(f"{path} is no sound router: {error}") from error
        router.check(path)
        return router

    def check(self, path: Path) -> None:
        """Raise for what cannot choose: another number of adapters than names, values that are not finite."""
        parts = ("states", "labels") if self.rule == "nearest" else ("weight", "bias")
        sound = self._has_sound_settings() and set(self.arrays) == set(parts)
        if sound:
            first, second = (self.arrays[name] for name in parts)
            rows = len(first) if self.rule == "nearest" else len(self.names)
            sound = first.ndim == 2 and first.shape[0] == rows and second.shape == (rows,)
            sound = sound and bool(np.isfinite(first).all() and np.isfinite(second).all())
            sound = sound and (self.rule != "nearest" or set(second.tolist()) <= set(range(len(self.names))))
        if not sound:
            raise RsgwmError(f"{path} is no sound router; rsgwm pool route makes one")

    def _has_sound_settings(self) -> bool:
        """Whether all but the arrays is what :meth:`save` writes: ``true`` is no number, and "1" none either."""
        names = all(isinstance(name, str) for name in self.names) and len(set(self.names)) == len(self.names) > 1
        layer = type(self.layer) is int and self.layer >= 1
        margin = type(self.margin) in (int, float) and 0 <= self.margin <= 1
        return names and layer and margin and self.rule in RULES and isinstance(self.about.get("adapters", {}), dict)

    def require(self, base: Base, template: Template) -> None:
        """Raise when states here are others than those that the router was fitted on."""
        for what, here in (("base", base.fingerprint), ("template", template.hash)):
            if self.about.get(what) != here:
                raise RsgwmError(f"the router was fitted with another {what}; fit it again: rsgwm pool route")


def _bits(array: np.ndarray) -> mx.array:
    # MLX has no float64 on a GPU, so the values travel as their bits.
    return mx.array(np.ascontiguousarray(array, dtype=np.float64).view(np.uint32))


def _values(array: mx.array) -> np.ndarray:
    return np.array(array).view(np.float64)


def fit_router(
    base: Base,
    template: Template,
    questions: Mapping[str, Sequence[str]],
    rule: str = "auto",
    layer: int | None = None,
    margin: float = 0.0,
    seed: int = 0,
) -> Router:
    """A router of the adapters that ``questions`` names, from questions of each one's task.

    ``auto`` takes the rule that is right most often on left-out questions (five folds; the first of equals). What every
    rule came to is in ``about["accuracy"]``.

    Raises:
        RsgwmError: fewer than two adapters, or than five questions of one; an unknown rule; a margin out of range.
    """
    if rule not in ("auto", *RULES):
        raise RsgwmError(f"rule must be auto or one of {', '.join(RULES)}, found {rule!r}")
    if not 0 <= margin <= 1:
        raise RsgwmError(f"margin must be in [0, 1], found {margin}")
    names = tuple(questions)
    if len(names) < 2:
        raise RsgwmError(f"a router chooses among two or more adapters, found {len(names)}")
    for name, asked in questions.items():
        if len(asked) < LEAST:
            raise RsgwmError(f"{name}: a router takes at least {LEAST} questions of each task, found {len(asked)}")
    layer = depth_of(base) if layer is None else layer
    prompts = [template.draft_prompt(base.tokenizer, text) for asked in questions.values() for text in asked]
    states = prompt_states(base, prompts, layer)
    labels = np.array([index for index, asked in enumerate(questions.values()) for _ in asked])
    accuracy = {each: _left_out_accuracy(each, states, labels, len(names), seed) for each in RULES}
    chosen = max(RULES, key=lambda each: accuracy[each]) if rule == "auto" else rule
    about = {
        "base": base.fingerprint,
        "template": template.hash,
        "questions": {name: len(asked) for name, asked in questions.items()},
        "accuracy": accuracy,
    }
    return Router(names, chosen, layer, _fit(chosen, states, labels, len(names)), margin, about)


def router_of_statistics(statistics: Mapping[str, PromptStatistics], margin: float = UNTRIED_MARGIN) -> Router:
    """A router by ``distance`` among the adapters that ``statistics`` names, without a question of any task.

    The tasks' covariances have equal parts in the common one, each shrunk, as :func:`fit_router` does with questions.

    Raises:
        RsgwmError: fewer than two adapters, a margin out of range, statistics of different bases, templates or layers
            (says whose), states that do not vary.
    """
    if not 0 <= margin <= 1:
        raise RsgwmError(f"margin must be in [0, 1], found {margin}")
    if len(statistics) < 2:
        raise RsgwmError(f"a router chooses among two or more adapters, found {len(statistics)}")
    (leader, first), *others = statistics.items()
    problems = [
        f"{name} has them of another {what} than {leader}"
        for name, other in others
        for what in ("base", "template", "layer")
        if getattr(other, what) != getattr(first, what)
    ]
    problems += [f"{name} has other dimensions than {leader}" for name, s in others if s.mean.shape != first.mean.shape]
    raise_problems("the pool's prompt states differ", problems)
    weight, bias = _discriminant(list(statistics.values()))
    about = {
        "base": first.base,
        "template": first.template,
        "questions": {name: each.questions for name, each in statistics.items()},
        "source": "kept by training",
    }
    return Router(tuple(statistics), "distance", first.layer, {"weight": weight, "bias": bias}, margin, about)


def _discriminant(statistics: Sequence[PromptStatistics]) -> tuple[np.ndarray, np.ndarray]:
    """Weight (tasks, dims) and bias (tasks,) of log-densities of normals of one covariance, less what all share."""
    means = np.stack([each.mean for each in statistics])
    shared = np.zeros((means.shape[1], means.shape[1]))
    for each in statistics:
        shared += each.covariance() / len(statistics)
    scales = np.sqrt(np.diag(shared))
    moves = scales > 0  # a dimension that never varies tells nothing
    centre, scales, shared = means.mean(axis=0), scales[moves], shared[np.ix_(moves, moves)]
    standard = ((means - centre)[:, moves] / scales).T
    try:
        solved = np.linalg.solve(shared / np.outer(scales, scales), standard)
    except np.linalg.LinAlgError:
        solved = np.full_like(standard, np.nan)
    if not (moves.any() and np.isfinite(solved).all()):
        raise RsgwmError("the pool's prompt states have no covariance that can be inverted")
    weight = np.zeros_like(means)
    weight[:, moves] = (solved / scales[:, None]).T
    return weight, -0.5 * (solved * standard).sum(axis=0) - weight @ centre


def _left_out_accuracy(rule: str, states: np.ndarray, labels: np.ndarray, count: int, seed: int) -> float:
    from sklearn.model_selection import StratifiedKFold

    right = 0
    for fitted, left in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(states, labels):
        arrays = _fit(rule, states[fitted], labels[fitted], count)
        right += int((_shares(rule, arrays, states[left], count).argmax(axis=1) == labels[left]).sum())
    return right / len(labels)


def _fit(rule: str, states: np.ndarray, labels: np.ndarray, count: int) -> dict[str, np.ndarray]:
    if rule == "nearest":
        return {"states": states / _lengths(states), "labels": labels.astype(np.float64)}
    means, scales = states.mean(axis=0), states.std(axis=0)
    scales[scales < 1e-9] = 1.0
    weight, bias = _linear(rule, (states - means) / scales, labels)
    if count == 2 and len(weight) == 1:  # what two classes are fitted as: the second against the first
        weight, bias = np.concatenate([np.zeros_like(weight), weight]), np.concatenate([np.zeros_like(bias), bias])
    weight = weight / scales
    return {"weight": weight, "bias": bias - weight @ means}


def _linear(rule: str, states: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression

    if rule == "classifier":
        model: Any = LogisticRegression(C=1.0, max_iter=1000)
    else:  # every task is as likely, however many questions of it there are
        count = len(np.unique(labels))
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=np.full(count, 1 / count))
    model.fit(states, labels)
    return np.asarray(model.coef_, dtype=np.float64), np.asarray(model.intercept_, dtype=np.float64)


def _shares(rule: str, arrays: Mapping[str, np.ndarray], states: np.ndarray, count: int) -> np.ndarray:
    """(n, adapters): probabilities, or shares of the nearest questions' votes, by their cosine where those are even."""
    if rule != "nearest":
        logits = states @ arrays["weight"].T + arrays["bias"]
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: np.ndarray = exponents / exponents.sum(axis=1, keepdims=True)
        return shares
    cosines = states / _lengths(states) @ arrays["states"].T
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :NEIGHBOURS]
    votes = np.zeros((len(states), count))
    for row, indices in enumerate(nearest):
        # Weighted by closeness, which is near 1 for all: it decides between equal numbers of votes alone.
        np.add.at(votes[row], arrays["labels"][indices].astype(int), np.maximum(cosines[row, indices], 1e-9))
    return votes / votes.sum(axis=1, keepdims=True)


def _lengths(states: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.linalg.norm(states, axis=1, keepdims=True)
    return np.maximum(lengths, 1e-30)
