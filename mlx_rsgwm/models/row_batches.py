"""Whether a model can read prompts of several lengths as the rows of one batch, padded on the left.

Plain key–value caches are what it takes, and not all models that have them manage: mlx-lm 0.32.2's Gemma 2 fails on
the mask of a padded batch, GPT-BigCode on the rows' positions, and Ministral 3 scales the queries of the padding by the
logarithm of 0, from where it reaches every token. Names say nothing of it, so each model is tried on a few tokens.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from mlx_rsgwm.models.split import split_head

LENGTHS = (8, 5, 3)  # of the rows that are tried
TOLERANCE = 0.05  # of the states of the row that fares best: an expert chosen otherwise may take another row further
_KNOWN = "_rows_can_batch"


def can_batch(model: Any) -> bool:
    """True where rows padded on the left give what each gives by itself, and caches can be taken apart by rows.

    Found out once for a model, with what is active on it.
    """
    known: bool | None = getattr(model, _KNOWN, None)
    if known is None:
        known = all(type(cache) is KVCache for cache in make_prompt_cache(model)) and _reads_alike(model)
        setattr(model, _KNOWN, known)
    return known


def _reads_alike(model: Any) -> bool:
    hidden, _ = split_head(model)
    rows = [list(range(1, length + 1)) for length in LENGTHS]
    padding = [LENGTHS[0] - length for length in LENGTHS]
    ids = mx.array([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
    try:
        together = _read(hidden, [BatchKVCache(padding) for _ in make_prompt_cache(model)], ids)
        alone = mx.concatenate([_read(hidden, make_prompt_cache(model), mx.array([row])) for row in rows])
        apart = mx.square(together - alone).sum(axis=(1, 2)) / mx.square(alone).sum(axis=(1, 2))
        return bool(mx.any(apart[1:] <= TOLERANCE**2).item())  # of what is no number, nothing is true
    except Exception:  # whatever a model raises over such a batch
        return False


def _read(hidden: Any, caches: list[Any], ids: mx.array) -> mx.array:
    """States (rows, 2, dims) float32 of the last token of ``ids`` and of another token that follows."""
    last = hidden(ids, cache=caches)[:, -1:]
    following = hidden(mx.full((len(ids), 1), 2, dtype=ids.dtype), cache=caches)
    return mx.concatenate([last, following], axis=1).astype(mx.float32)
