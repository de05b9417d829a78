"""Embedding and head of a PEFT adapter on a base that ties them: equal ones become one, others stay apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_rsgwm.converters.base_layers import BaseLayers
from mlx_rsgwm.converters.peft.config import scale_of
from mlx_rsgwm.converters.peft.folder import Groups
from mlx_rsgwm.converters.peft.layout import Layout
from mlx_rsgwm.converters.peft.uniform import Update, same_bits
from mlx_rsgwm.models.token_layers import is_embedding, is_head


def head_problems(updates: list[Update], groups: Groups, layout: Layout, base: BaseLayers | None) -> list[str]:
    """Embedding and head: apart in PEFT, one in mlx-lm where the base ties them. Equal adapters become one."""
    embedding = next((update for update in updates if is_embedding(update.module)), None)
    head = next((update for update in updates if is_head(update.module)), None)
    modules = {name.rpartition(".")[0] for name in groups.full if name.endswith(".weight")}
    whole_embedding = next((name for name in modules if is_embedding(name)), None)
    whole_head = next((name for name in modules if is_head(name)), None)
    if embedding is None and head is None and whole_embedding is None and whole_head is None:
        return []
    if base is None:
        return ["an adapted embedding or head means something else on a tied base; give the base model"]
    if not base.tied:
        return []
    if embedding is not None and head is not None and _same_update(embedding, head):
        updates.remove(head)
        layout.tied = True
        return []
    if whole_embedding and whole_head and embedding is None and head is None:
        embedding_weight, other = f"{whole_embedding}.weight", f"{whole_head}.weight"
        if same_bits(groups.full[embedding_weight], groups.full[other]):
            del groups.full[other]
            layout.tied = True
            return []
    names = [update.source for update in (embedding, head) if update] + [n for n in (whole_embedding, whole_head) if n]
    return [
        f"{' and '.join(names)}: ensure_weight_tying says that embedding and head are one, but their arrays are not "
        "equal, so which is meant is not known (without ensure_weight_tying they are converted apart)"
    ]


def head_trained_apart(groups: Groups, config: Mapping[str, Any]) -> bool:
    """Whether head and embedding of a tied base are not the same any more once the adapter is in them."""
    if config.get("ensure_weight_tying"):
        return False
    pairs = {module: pair for module, pair in groups.pairs.items() if is_head(module)}
    heads = {name: value for name, value in groups.full.items() if is_head(name.removesuffix(".weight"))}
    embeddings = [name for name in groups.full if is_embedding(name.removesuffix(".weight"))]
    if not (pairs or heads or groups.embeddings or embeddings):
        return False
    if len(pairs) == len(groups.embeddings) == 1 and not heads and not embeddings:
        (head, head_pair), (embedding, other) = next(iter(pairs.items())), next(iter(groups.embeddings.items()))
        same = same_bits(head_pair["a"], other["b"].T) and same_bits(head_pair["b"], other["a"].T)
        return not same or scale_of(config, head) != scale_of(config, embedding)
    if len(heads) == len(embeddings) == 1 and not pairs and not groups.embeddings:
        return not same_bits(groups.full[embeddings[0]], next(iter(heads.values())))
    return True


def hold_other(groups: Groups, base: BaseLayers, layout: Layout) -> None:
    """Where embedding or head alone was trained, hold the head as it was: loaders that would tie them refuse it then.

    PEFT loads the weight below LoRA into the matrix that both share in the base; where it was resized, both have it.
    """
    head = next(f"{module}.weight" for module in base.layers if is_head(module))
    embedding = next(f"{module}.weight" for module in base.layers if is_embedding(module))
    saved = groups.saved_names(base.names)
    names = {module: saved.get(module, base.names.transformers_parameter(module)) for module in (embedding, head)}
    modules = {module: name.removesuffix(".weight") for module, name in names.items()}
    for lacking, other in ((head, embedding), (embedding, head)):
        if modules[lacking] in groups.copies or names[lacking] in groups.full:
            continue
        below = groups.copies.get(modules[other])
        if below is not None and below.shape[0] != base.layers[other.removesuffix(".weight")].shape[0]:
            groups.full[names[lacking]] = below
            layout.derived.append(lacking)
    if any(map(is_head, (*groups.pairs, *(name.removesuffix(".weight") for name in groups.full)))):
        return
    link, value = base.names.link(head), base.read_arrays({head})[head]
    groups.full[names[head]] = value if link is None else link.undo(value)
    layout.derived.append(head)


def _same_update(embedding: Update, head: Update) -> bool:
    """Whether the head's update is the embedding's, with factors swapped as its matrix is used the other way."""
    same_scale = embedding.scale == head.scale
    return same_scale and same_bits(embedding.a, head.b.T) and same_bits(embedding.b, head.a.T)
