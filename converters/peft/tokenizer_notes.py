"""What to tell of a tokenizer or chat template that came with a PEFT adapter and is not its base's."""

from __future__ import annotations

from pathlib import Path

from mlx_rsgwm.converters.base_layers import BaseLayers
from mlx_rsgwm.converters.resized_vocabulary import count_ids
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.token_layers import is_embedding
from mlx_rsgwm.models.tokenizer_hash import chat_template_hash, tokenizer_hash

TOKENIZER_FILE = "tokenizer.json"


def tokenizer_notes(folder: Path, base: BaseLayers) -> list[str]:
    """Notes on an adapter whose vocabulary was not resized, so that every command uses the base's own tokenizer."""
    try:
        notes = [_vocabulary_note(folder, base), _template_note(folder, base.path)]
    except RsgwmError as error:  # nothing is converted from these files
        return [f"its tokenizer is not compared with the base's: {error}"]
    return [note for note in notes if note]


def _vocabulary_note(folder: Path, base: BaseLayers) -> str:
    if not (folder / TOKENIZER_FILE).is_file() or not (base.path / TOKENIZER_FILE).is_file():
        return ""
    rows = [layer.inputs for name, layer in base.layers.items() if layer.kind == "embedding" and is_embedding(name)]
    count = count_ids(folder)
    if rows and count > max(rows):
        return (
            f"its tokenizer has {count} tokens, the base {max(rows)} rows, and PEFT saved none for the others "
            "(save_embedding_layers=True does): what was trained on those tokens is lost; the base's tokenizer is used"
        )
    if tokenizer_hash(folder) != tokenizer_hash(base.path):
        return "its tokenizer is not the base's, which is used here: token ids, cuts or end tokens differ"
    return ""


def _template_note(folder: Path, base: Path) -> str:
    tokenizer_template = chat_template_hash(folder)
    if not tokenizer_template or tokenizer_template == chat_template_hash(base):
        return ""
    return "its chat template is not the base's, which --template chat uses; copy it into the base's folder to use it"
