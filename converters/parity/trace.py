"""What one framework computes with a base and an adapter, as arrays that can be compared with the other's."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

TRACED_TOKENS = 16  # of the first text, through every adapted layer


@dataclass(frozen=True)
class Probe:
    """An adapted layer seen alone: the input MLX gave it, what the adapter adds to its output.

    ``inputs``: (tokens, in), token ids of an embedding, or one vector (in,) that every expert of a layer gets.
    ``added``: (tokens, out), or (experts, out). ``size``: the largest value of the layer's whole output, which rounding
    goes by.
    """

    inputs: np.ndarray
    added: np.ndarray
    size: float


@dataclass(frozen=True)
class Logits:
    """One framework's answer: float32 arrays (tokens, vocabulary), the texts one after the other."""

    base: np.ndarray
    adapted: np.ndarray
    modules: int

    @property
    def effect(self) -> float:
        """The largest change the adapter makes to a logit."""
        return largest_size(self.adapted - self.base)


@dataclass(frozen=True)
class Trace:
    """``blocks``: the bare base's state after every block, for the first tokens of the first text. ``probes``: by
    mlx-lm's module. ``continuations``: greedy tokens after every text, with how far ahead of the second each was.
    """

    logits: Logits
    blocks: list[np.ndarray] = field(default_factory=list)
    probes: dict[str, Probe] = field(default_factory=dict)
    continuations: list[list[int]] = field(default_factory=list)
    margins: list[list[float]] = field(default_factory=list)


def largest_size(values: np.ndarray) -> float:
    """Largest absolute value, huge where anything is not finite (NaN is not JSON, and agrees with nothing)."""
    size = float(np.max(np.abs(values))) if values.size else 0.0
    return size if np.isfinite(size) else float(np.finfo(np.float64).max)


def perplexity(logits: np.ndarray, texts: list[list[int]]) -> float | None:
    """exp of the mean negative log-likelihood of every token but a text's first; None where it is not finite.

    ``logits`` (tokens, vocabulary), those of all texts one after another.
    """
    losses = []
    start = 0
    for text in texts:
        rows = logits[start : start + len(text) - 1].astype(np.float64)
        start += len(text)
        if len(rows):
            top = rows.max(axis=1, keepdims=True)
            normaliser = top[:, 0] + np.log(np.exp(rows - top).sum(axis=1))
            losses.append(normaliser - rows[np.arange(len(rows)), text[1:]])
    mean = float(np.concatenate(losses).mean()) if losses else float("nan")
    return float(np.exp(mean)) if np.isfinite(mean) and mean < 700 else None
