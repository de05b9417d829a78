"""Next tokens of rows of which each has settings of its own: penalties, biases, nucleus, random stream.

Rows without penalties go through :func:`~mlx_rsgwm.inference.sampling.choose` as drafts do, those of equal temperature
and nucleus together, so that a request alone and one among others draw the same tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.inference.sampling import choose, choose_exact

MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class RowSampling:
    """Decoding settings of one row; the defaults are those of OpenAI's API.

    ``top_k`` 0 and ``min_p`` 0 leave all tokens. ``presence_penalty`` and ``frequency_penalty`` count what the row has
    written, ``repetition_penalty`` (1: none) what it has read, too. ``logit_bias``: added to logits, by token.
    ``logprobs``: how many alternatives are told of each token beside itself; None: nothing is told.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        limits = (
            ("temperature", 0, 100),
            ("min_p", 0, 1),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
            ("logprobs", 0, MOST_TOP_LOGPROBS),
        )
        problems = [
            f"{name} must be from {least} to {most}, found {value}"
            for name, least, most in limits
            if (value := getattr(self, name)) is not None and not least <= value <= most
        ]
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be in (0, 1], found {self.top_p}")
        if self.top_k < 0:
            problems.append(f"top_k must be 0 or more, found {self.top_k}")
        if not 0 < self.repetition_penalty <= 10:
            problems.append(f"repetition_penalty must be in (0, 10], found {self.repetition_penalty}")
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            problems.append("logit_bias must be from -100 to 100")
        raise_problems("sampling", problems, RsgwmError)

    @property
    def plain(self) -> bool:
        """Whether logits are drawn from as they are."""
        moved = self.logit_bias or self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return not moved and not self.top_k and not self.min_p


@dataclass(frozen=True)
class Pick:
    """A token that was drawn; ``logprob`` in nats by the model itself, before temperature and penalties, and the
    ``top`` tokens by theirs, where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def pick(
    logits: mx.array,
    settings: Sequence[RowSampling],
    uniforms: Sequence[float],
    read: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
    allowed: Sequence[np.ndarray | None],
) -> list[Pick]:
    """One token for each row of logits (rows, vocabulary).

    Args:
        settings: of each row.
        uniforms: one number in [0, 1) for each row.
        read, written: the prompt of each row, and its tokens so far.
        allowed: which tokens each may write, (vocabulary,) bool; None: all.
    """
    moved = _moved(logits, settings, read, written, allowed)
    groups: dict[tuple[float, float], list[int]] = {}
    for place, setting in enumerate(settings):
        groups.setdefault((setting.temperature, setting.top_p), []).append(place)
    drawn: dict[int, int] = {}
    for (temperature, top_p), places in groups.items():
        chosen = moved if len(groups) == 1 else moved[mx.array(places)]
        uniform = mx.array(np.array([uniforms[place] for place in places], dtype=np.float32))
        tokens, certain = choose(chosen, uniform, temperature, top_p)
        mx.eval(tokens, certain)
        if not mx.all(certain).item():
            tokens = choose_exact(chosen, uniform, temperature, top_p)
        listed: Any = tokens.tolist()
        drawn.update(zip(places, listed, strict=True))
    told = _logprobs(logits, [(place, row.logprobs) for place, row in enumerate(settings)], drawn)
    return [told.get(place, Pick(drawn[place])) for place in range(len(settings))]


def _moved(
    logits: mx.array,
    settings: Sequence[RowSampling],
    read: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
    allowed: Sequence[np.ndarray | None],
) -> mx.array:
    """Logits (rows, vocabulary) after penalties and biases, −∞ where a token cannot be drawn."""
    as_it_is = [setting.plain and mask is None for setting, mask in zip(settings, allowed, strict=True)]
    if all(as_it_is):
        return logits
    rows = [
        logits[place]
        if as_it_is[place]
        else _of_row(logits[place], setting, read[place], written[place], allowed[place])
        for place, setting in enumerate(settings)
    ]
    return mx.stack([row.astype(mx.float32) for row in rows])


def _of_row(
    row: mx.array, setting: RowSampling, read: Sequence[int], written: Sequence[int], allowed: np.ndarray | None
) -> mx.array:
    values = np.array(row.astype(mx.float32))
    if allowed is not None:
        values[: len(allowed)][~allowed] = -np.inf
        values[len(allowed) :] = -np.inf
    if setting.repetition_penalty != 1:
        seen = np.array(sorted({*read, *written}), dtype=np.int64)
        penalty = setting.repetition_penalty
        values[seen] = np.where(values[seen] > 0, values[seen] / penalty, values[seen] * penalty)
    for token, times in Counter(written).items():
        values[token] -= setting.presence_penalty + times * setting.frequency_penalty
    for token, bias in setting.logit_bias.items():
        values[token] += bias
    if 0 < setting.top_k < len(values):
        best = np.argsort(-values, kind="stable")[: setting.top_k]  # of equals the first, as everywhere here
        left = np.full_like(values, -np.inf)
        left[best] = values[best]
        values = left
    if setting.min_p and setting.temperature:
        values[values < values.max() + setting.temperature * np.log(setting.min_p)] = -np.inf
    return mx.array(values)


def _logprobs(logits: mx.array, asked: Sequence[tuple[int, int | None]], drawn: Mapping[int, int]) -> dict[int, Pick]:
    """Picks of the rows that asked for log-probabilities, by their places."""
    picks = {}
    for place, count in asked:
        if count is None:
            continue
        row = np.array(logits[place].astype(mx.float32)).astype(np.float64)
        row -= row.max()
        row -= np.log(np.exp(row).sum())
        best = np.argsort(-row, kind="stable")[:count]
        top = tuple((int(token), float(row[token])) for token in best)
        picks[place] = Pick(drawn[place], float(row[drawn[place]]), top)
    return picks
