"""A head in the checkpoint of a model that mlx-lm builds with tied embeddings: its values must be the embedding's.

transformers 5 loads a head that differs and leaves embedding and head apart, whatever ``tie_word_embeddings`` says;
mlx-lm drops it without a word and computes another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.files import open_regular
from mlx_rsgwm.models.base_folder import tensor_entries, weight_files
from mlx_rsgwm.models.token_layers import HEADS, has_head

PREFIX = r"(?:(?:model|language_model|transformer|gpt_neox|backbone)\.)*"
HEAD = re.compile(PREFIX + r"(?:" + "|".join(HEADS) + r")\.weight")
EMBEDDING = re.compile(PREFIX + r"(?:embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|embeddings)\.weight")
PIECE = 1 << 22
ArrayPlace = tuple[Path, Mapping[str, Any], int]  # file, header entry, start of its data


def refuse_other_head(path: Path, modules: Iterable[str]) -> None:
    """Refuse a stored head that mlx-lm's model, of these ``modules``, has no place for and that is no copy.

    Raises:
        RsgwmError: head and embedding in the checkpoint in ``path`` differ.
    """
    if has_head(modules):
        return
    arrays = {name: (file, entry, start) for file in weight_files(path) for name, entry, start in tensor_entries(file)}
    heads = [name for name in arrays if HEAD.fullmatch(name)]
    embeddings = [name for name in arrays if EMBEDDING.fullmatch(name)]
    if len(heads) != 1 or len(embeddings) != 1 or _same_bytes(arrays[heads[0]], arrays[embeddings[0]]):
        return
    raise RsgwmError(
        f"{path}: {heads[0]} in the checkpoint differs from {embeddings[0]}, which config.json ties it to "
        "(tie_word_embeddings): transformers 5 uses this head and mlx-lm drops it; set tie_word_embeddings to false "
        "if the head is meant, or remove it from the checkpoint"
    )


def _same_bytes(stored: ArrayPlace, other: ArrayPlace) -> bool:
    """Whether two arrays on disk have the same dtype, shape and bits, read a piece at a time."""
    if any(stored[1][key] != other[1][key] for key in ("dtype", "shape")):
        return False
    begin, end = stored[1]["data_offsets"]
    with open_regular(stored[0]) as left, open_regular(other[0]) as right:
        left.seek(stored[2] + begin)
        right.seek(other[2] + other[1]["data_offsets"][0])
        sizes = (min(PIECE, end - place) for place in range(begin, end, PIECE))
        return all(left.read(size) == right.read(size) for size in sizes)
