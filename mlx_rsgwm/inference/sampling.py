"""Sampling with one uniform number a token, so that a draft depends on its own random stream and nothing else.

Every attempt of an item draws from a stream named by (seed, question, attempt). Whether drafts are made one by one or
many in a batch, in whatever order, the same uniforms meet the same probabilities.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_rsgwm.core.errors import RsgwmError, raise_problems
from mlx_rsgwm.core.random_streams import DEFAULT_SEED
from mlx_rsgwm.models.linux_cpu import exp, largest

CANDIDATES = 128
TAIL_KEY = 0x7A11  # the second half of the keys of draws beyond the candidates
COLDEST = (1e-37, 3e38)  # what logits are multiplied by, at least and at most


@dataclass(frozen=True)
class Sampling:
    """Decoding settings. Temperature 0 is greedy; the paper drafts at 0.7 with top-p 0.9."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 256
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature must be 0 or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be in (0, 1], found {self.top_p}")
        if self.max_tokens < 1:
            problems.append(f"max_tokens must be at least 1, found {self.max_tokens}")
        raise_problems("sampling", problems, RsgwmError)


def uniforms(seed: int, question: str, attempt: int, count: int) -> np.ndarray:
    """The first ``count`` numbers in [0, 1) of one attempt's stream, float32."""
    digest = hashlib.sha256(f"{seed}/{attempt}/{question}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))
    return generator.random(count, dtype=np.float32)


def choose(
    logits: mx.array, uniform: mx.array, temperature: float, top_p: float, rows: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Next tokens (n,) for logits (n, vocabulary) by inverse transform, and whether each is certain (n,).

    With ``rows`` (n,), number i of ``uniform`` (n,) chooses from row ``rows[i]`` of the logits, of which there may be
    fewer.

    The nucleus is the smallest set of most probable tokens whose mass reaches ``top_p``. It is searched among the
    ``CANDIDATES`` best, which spares sorting the vocabulary; a row whose candidates do not reach ``top_p`` comes back
    uncertain and must go through :func:`choose_exact`.
    """
    if temperature == 0:
        best = mx.argmax(logits, axis=-1)
        return best if rows is None else best[rows], mx.ones(uniform.shape[0], dtype=mx.bool_)
    wide = logits.astype(mx.float32)
    best = largest(wide, min(CANDIDATES, wide.shape[-1]))
    nucleus = _nucleus(wide, best, uniform, temperature, top_p, rows)
    return nucleus.tokens(), nucleus.certain


def choose_exact(
    logits: mx.array, uniform: mx.array, temperature: float, top_p: float, rows: mx.array | None = None
) -> mx.array:
    """:func:`choose` over the whole vocabulary, for flat distributions: next tokens (n,).

    A draw that falls beyond the ``CANDIDATES`` best is made anew among those there, by the largest log p + Gumbel
    noise, the noise of each token from the bits of the draw. Inverse transform would go through thousands of tokens
    whose order, and with it the choice, hangs on the last bits of the logits, which batches and cached prompts change.
    """
    wide = logits.astype(mx.float32)
    everything = mx.broadcast_to(mx.arange(wide.shape[-1]), wide.shape)
    nucleus = _nucleus(wide, everything, uniform, temperature, top_p, rows)
    chosen = nucleus.tokens()
    if wide.shape[-1] <= CANDIDATES or not mx.any(nucleus.chosen >= CANDIDATES).item():
        return chosen
    noise = mx.stack([mx.random.gumbel((wide.shape[-1],), key=key) for key in _keys(uniform)])
    tail = (mx.arange(wide.shape[-1]) >= CANDIDATES) & (nucleus.mass > 0)
    noisy = mx.log(nucleus.mass) + mx.take_along_axis(noise, nucleus.candidates, axis=-1)
    best = mx.argmax(mx.where(tail, noisy, -mx.inf), axis=-1)
    drawn = mx.take_along_axis(nucleus.candidates, best[:, None], axis=-1)[:, 0]
    return mx.where(nucleus.chosen < CANDIDATES, chosen, drawn)


def _keys(uniform: mx.array) -> mx.array:
    """A key of MLX's random numbers for each draw (n, 2)."""
    bits = uniform.astype(mx.float32).view(mx.uint32)
    return mx.stack([bits, mx.full(bits.shape, TAIL_KEY, dtype=mx.uint32)], axis=-1)


@dataclass(frozen=True, eq=False)
class _Nucleus:
    """Of every draw, n of them: the ``candidates`` (n, c), likeliest first, their probability ``mass``, 0 outside the
    nucleus, the place ``chosen`` (n,) that inverse transform chooses, and whether candidates reach ``top_p``."""

    candidates: mx.array
    mass: mx.array
    chosen: mx.array
    certain: mx.array

    def tokens(self) -> mx.array:
        """What the indices stand for (n,)."""
        return mx.take_along_axis(self.candidates, self.chosen[:, None], axis=-1)[:, 0]


def _nucleus(
    logits: mx.array,
    candidates: mx.array,
    uniform: mx.array,
    temperature: float,
    top_p: float,
    rows: mx.array | None,
) -> _Nucleus:
    values = mx.take_along_axis(logits, candidates, axis=-1)
    # Ties are broken by token id, so that the order does not depend on how the candidates were found.
    order = mx.argsort(candidates, axis=-1)
    candidates, values = (mx.take_along_axis(x, order, axis=-1) for x in (candidates, values))
    order = mx.argsort(-values, axis=-1)
    candidates, values = (mx.take_along_axis(x, order, axis=-1) for x in (candidates, values))
    highest = mx.max(logits, axis=-1, keepdims=True)
    colder = min(
        max(1 / temperature, COLDEST[0]), COLDEST[1]
    )  # as float32 it would be 0 or infinite, and 0·∞ no number
    probabilities = exp((values - highest) * colder) / exp((logits - highest) * colder).sum(axis=-1, keepdims=True)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    nucleus = mx.where(before < top_p, probabilities, 0.0)
    cumulative = mx.cumsum(nucleus, axis=-1)
    if rows is not None:
        candidates, nucleus, cumulative = candidates[rows], nucleus[rows], cumulative[rows]
    mass = cumulative[:, -1:]
    index = mx.sum(cumulative <= uniform[:, None] * mass, axis=-1)
    index = mx.minimum(index, mx.sum(nucleus > 0, axis=-1) - 1)
    certain = mass[:, 0] >= min(top_p, 1.0) - 1e-6 if candidates.shape[-1] < logits.shape[-1] else mass[:, 0] >= 0
    return _Nucleus(candidates, nucleus, index, certain)
