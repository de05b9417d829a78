"""Names of PEFT's arrays and what each of them is; the order and place of a module in its model."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from mlx_rsgwm.models.token_layers import is_embedding

PREFIX = "base_model.model."
TOKENS = "token_adapter.trainable_tokens_delta"
LORA_BIAS = "lora_B.bias"
SAVED = ".saved"  # ends the name of an array that is kept because PEFT's file holds it with the base's own values
OTHER_TOWERS = re.compile(
    r"(?:^|\.)(?:\w*(?:vision|visual|image|audio|projector|multi_?modal)\w*|connector|aligner|merger|mm_\w+)(?:\.|$)"
)
BLOCK_MODULE = re.compile(r"(?P<stem>(?:.+\.)?(?:layers|h))\.(?P<layer>\d+)\.(?P<key>.+)")
LEAVES = {  # in PEFT's files, after the module's name: what we call it
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    LORA_BIAS: "lora_bias",
    TOKENS: "tokens",
    "base_layer.weight": "base_weight",
    "base_layer.bias": "base_bias",
    "weight": "weight",
    "bias": "bias",
}
# Older PEFT and tools that save a bare state dict: the adapter's name, or where its module stood.
VARIANTS = {
    "lora_A.default.weight": "lora_A.weight",
    "lora_B.default.weight": "lora_B.weight",
    "lora_embedding_A.default": "lora_embedding_A",
    "lora_embedding_B.default": "lora_embedding_B",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "lora_magnitude_vector.default.weight": "lora_magnitude_vector",
    "modules_to_save.weight": "weight",
    "modules_to_save.bias": "bias",
    "modules_to_save.default.weight": "weight",
    "modules_to_save.default.bias": "bias",
}
LONGEST_FIRST = sorted([*VARIANTS, *LEAVES], key=len, reverse=True)
HINTS = {
    "hada_": "this is LoHa",
    "lokr_": "this is LoKr",
    "lora_E": "this is AdaLoRA",
    "ia3_": "this is IA3",
    "internal_xlora": "this is X-LoRA",
    "oft_r": "this is OFT",
    "vera_lambda": "this is VeRA",
}


class PeftName(NamedTuple):
    """An array's name taken apart: the module as transformers calls it, and which of :data:`LEAVES` it is."""

    module: str
    leaf: str


@lru_cache(maxsize=1 << 13)  # adapters of one base have the same names
def parse_name(name: str) -> PeftName | None:
    """The module and leaf of a PEFT array, or None for a name that PEFT's LoRA does not write."""
    if not name.startswith(PREFIX):
        return None
    name = name[len(PREFIX) :]
    leaf = next((candidate for candidate in LONGEST_FIRST if name.endswith("." + candidate)), None)
    if leaf is None or ".lora_" in name[: -len(leaf)]:
        return None
    return PeftName(name[: -len(leaf) - 1], LEAVES[VARIANTS.get(leaf, leaf)])


def explain_name(name: str) -> str:
    """A hint, in brackets, at what an unknown array is."""
    hint = next((text for part, text in HINTS.items() if part in name), None)
    if hint is None and not name.startswith(PREFIX):
        hint = f"PEFT's names begin with {PREFIX}"
    return f" ({hint})" if hint else ""


def layer_of(module: str) -> int | None:
    """The number of the block a module sits in, or None outside of the blocks."""
    match = BLOCK_MODULE.fullmatch(module)
    return int(match["layer"]) if match else None


def key_of(module: str) -> str:
    """A module's name inside its block; its full name outside of the blocks."""
    match = BLOCK_MODULE.fullmatch(module)
    return match["key"] if match else module


def model_order(module: str) -> tuple[int, int, str]:
    """Sorts modules as a model runs through them: embeddings, blocks by number, then the rest."""
    layer = layer_of(module)
    if layer is not None:
        return 1, layer, key_of(module)
    return (0 if is_embedding(module) else 2), 0, module


def is_other_tower(module: str) -> bool:
    """Whether a module of a model of images or sound is outside of its language model, by the names they go by."""
    return OTHER_TOWERS.search(module) is not None
