"""A base's tokenizer, held to the base: ids have a row in the embedding, and a chat template that fails says so.

A row beyond the embedding is read from whatever memory lies there, so that no command may feed such an id.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.models.base_folder import first_line

PROBES = ("Hello, world", "a", "7", "0 1 2 3", "The answer is 12.")
POSITIONS = ("wpe", "position_embeddings", "embed_positions", "embed_tokens_per_layer")
SHOWN = 5
SAMPLE = 200  # tokens of the vocabulary tried as texts, for tokenizers that know few words


class BaseTokenizer(TokenizerWrapper):
    """mlx-lm's tokenizer, whose ids are below ``rows`` and whose failures are one line each."""

    def __init__(self, loaded: TokenizerWrapper, rows: int, where: str) -> None:
        self.__dict__.update(loaded.__dict__)
        self._rows = rows
        self._where = where

    def encode(self, text: str, *arguments: Any, **options: Any) -> Any:
        """Token ids of ``text``.

        Raises:
            RsgwmError: an id has no row in the base's embedding.
        """
        return self._in_rows(self._tokenizer.encode(text, *arguments, **options))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """transformers' batch encoding, its ids checked as :meth:`encode` does."""
        encoded = self._tokenizer(*arguments, **options)
        ids = encoded.get("input_ids") if hasattr(encoded, "get") else None
        for row in ids if isinstance(ids, list) and ids and isinstance(ids[0], list) else [ids]:
            if isinstance(row, list):
                self._in_rows(row)
        return encoded

    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
        """A conversation in the base's chat template, as ids or, with ``tokenize=False``, as text.

        Raises:
            RsgwmError: there is no template, it fails, or an id has no row in the base's embedding.
        """
        if not self.has_chat_template:
            raise RsgwmError(
                f"{self._where} has no chat template; use a template without chat (--template plain), or add "
                "chat_template.jinja to the base's folder"
            )
        try:
            rendered = super().apply_chat_template(*arguments, **options)
        except Exception as error:  # a template is a program: what it raises is up to it
            raise RsgwmError(
                f"{self._where}: its chat template fails: {type(error).__name__}: {first_line(error)[:300]}"
            ) from error
        if isinstance(rendered, list) and all(isinstance(token, int) for token in rendered):
            return self._in_rows(rendered)
        return rendered

    def _in_rows(self, ids: Any) -> Any:
        if isinstance(ids, list) and ids and isinstance(ids[0], int) and max(ids) >= self._rows:
            token = max(ids)
            raise RsgwmError(
                f"{self._where}: token {self._tokenizer.convert_ids_to_tokens(token)!r} is number {token}, and the "
                f"base's embedding has {self._rows} rows; use the tokenizer that the base was saved with"
            )
        return ids


def embedding_rows(model: nn.Module) -> int | None:
    """How many token ids a model has a row for; None where it has no embedding that can be told."""
    sizes = {
        name: module.weight.shape[0]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
        and not name.endswith(POSITIONS)
        and not any(part in name for part in ("vision", "visual", "audio"))
    }
    if not sizes:
        return None
    depth = min(name.count(".") for name in sizes)
    return max(size for name, size in sizes.items() if name.count(".") == depth)


def load_tokenizer_of(path: Path, config: Mapping[str, Any], model: nn.Module) -> tuple[BaseTokenizer, list[str]]:
    """The tokenizer in a base's folder, and what the user should be told of it.

    Raises:
        RsgwmError: it cannot be loaded, is another model's (its vocabulary has more ids than the embedding rows), or
            cuts text to nothing.
    """
    from mlx_lm.utils import load_tokenizer

    ends = config.get("eos_token_id")
    try:
        extra = {"trust_remote_code": False, "local_files_only": True, **_sound_settings(path)}
        loaded = load_tokenizer(path, extra, eos_token_ids=ends)
    except Exception as error:  # transformers and tokenizers raise bare Exception for a damaged file
        raise RsgwmError(f"the tokenizer in {path} cannot be loaded: {first_line(error)}") from error
    _name_end(loaded, ends)
    rows = embedding_rows(model)
    tokenizer = BaseTokenizer(loaded, rows if rows is not None else 1 << 62, str(path))
    notes = [] if rows is None else _beyond(tokenizer, rows, path)
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))  # these are found before anything is cut
    known = [text for text, index in tokenizer.get_vocab().items() if index not in added][:SAMPLE]
    if all(_cut_to_nothing(tokenizer, text) for text in (*PROBES, *known, " ".join(known))):
        raise RsgwmError(
            f"the tokenizer in {path} cuts text to nothing ({PROBES[0]!r} becomes no token); it is damaged or another "
            "model's: fetch it again"
        )
    return tokenizer, notes


def _cut_to_nothing(tokenizer: BaseTokenizer, text: str) -> bool:
    try:
        return not tokenizer.encode(text, add_special_tokens=False)
    except RsgwmError:
        return False


def _sound_settings(path: Path) -> dict[str, Any]:
    """``model_max_length`` as a number, where tokenizer_config.json has it as a text; transformers would compare it."""
    file = path / "tokenizer_config.json"
    longest = files.read_json_object(file).get("model_max_length") if file.is_file() else None
    if longest is None or (isinstance(longest, (int, float)) and not isinstance(longest, bool)):
        return {}
    try:
        return {"model_max_length": int(float(longest))}
    except (TypeError, ValueError, OverflowError):
        raise RsgwmError(f"{file}: model_max_length must be a number, found {longest!r}") from None


def _name_end(loaded: TokenizerWrapper, ends: Any) -> None:
    """Where the tokenizer names no end of text, the base's configuration may."""
    first = ends[0] if isinstance(ends, list) and ends else ends
    if loaded.eos_token_id is None and isinstance(first, int) and not isinstance(first, bool):
        token = loaded.convert_ids_to_tokens(first) if 0 <= first < len(loaded) else None
        if isinstance(token, str):
            loaded._tokenizer.eos_token = token


def _beyond(tokenizer: BaseTokenizer, rows: int, path: Path) -> list[str]:
    """Tokens without a row: none is as it should be, some added ones can be lived with, others are another model's."""
    beyond = sorted(
        (index, token) for token, index in tokenizer.get_vocab().items() if isinstance(index, int) and index >= rows
    )
    if not beyond:
        return []
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))
    named = {"end of text": tokenizer.eos_token_id, "begin of text": tokenizer.bos_token_id}
    wrong = [what for what, index in named.items() if index is not None and index >= rows]
    shown = ", ".join(f"{token!r} ({index})" for index, token in beyond[:SHOWN]) + ", …" * (len(beyond) > SHOWN)
    strange = [index for index, _ in beyond if index not in added]
    if strange or wrong:
        why = f"its {' and '.join(wrong)} among them; " if wrong else ""
        raise RsgwmError(
            f"{path}: the tokenizer has {len(beyond)} tokens beyond the {rows} rows of the base's embedding: {shown}; "
            f"{why}it is another model's, or tokens were added and the embedding not resized"
        )
    return [
        f"{len(beyond)} added tokens have no row in the base's embedding ({shown}): a text that holds one is refused"
    ]
