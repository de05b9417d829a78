"""The two layers of a language model that have a row a token, by the last part of their names in MLX and torch."""

from __future__ import annotations

from collections.abc import Iterable

EMBEDDINGS = (
    *("embed_tokens", "wte", "embed_in", "embeddings", "tok_embeddings", "word_embeddings", "token_embeddings"),
    "embedding",
)
HEADS = ("lm_head", "embed_out", "output")


def is_embedding(module: str) -> bool:
    """Whether a module of this name is the token embedding."""
    return module.rpartition(".")[2] in EMBEDDINGS


def is_head(module: str) -> bool:
    """Whether a module of this name is the output head."""
    return module.rpartition(".")[2] in HEADS


def has_head(modules: Iterable[str]) -> bool:
    """Whether a model of these modules has an output head that is not its embedding."""
    return any(map(is_head, modules))
