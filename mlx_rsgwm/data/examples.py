"""mlx-lm's training data: JSON lines of chats, completions or plain text, as ``mlx_lm.lora --data`` reads them.

A folder with ``train.jsonl`` (and ``valid.jsonl``, the held-out rows), or one ``.jsonl`` file. Prompts go through the
tokenizer's chat template as in mlx-lm 0.32.2, so the token ids are the same. All rows are draft rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_rsgwm import files
from mlx_rsgwm.data.batching import TokenRow
from mlx_rsgwm.data.corpus import fit_row
from mlx_rsgwm.data.template import Template, Tokenizer
from mlx_rsgwm.errors import RsgwmError, raise_problems
from mlx_rsgwm.json_lines import read_json_rows

FORMATS = {"completions": ("prompt", "completion"), "chat": ("messages",), "text": ("text",)}


@dataclass(frozen=True)
class Examples:
    """Rows of one format. With ``mask_prompt`` only the last message (the completion) is trained, else every token.

    ``numbers`` are the rows' lines in the file (or places in its array), from 1, by which errors name them.
    """

    path: Path
    format: str
    rows: tuple[Mapping[str, Any], ...]
    mask_prompt: bool
    file_hash: str
    numbers: tuple[int, ...]
    template: Template | None = None

    @property
    def hash(self) -> str:
        return files.sha256_json([self.file_hash, self.mask_prompt])

    def describe(self) -> dict[str, Any]:
        """For an adapter's manifest."""
        return {"hash": self.hash, "format": self.format, "mask_prompt": self.mask_prompt, "file": self.path.name}

    def token_rows(self, tokenizer: Tokenizer, max_tokens: int, long_rows: str) -> tuple[list[TokenRow], int]:
        """Token rows, and how many were left out because they exceed ``max_tokens`` (see ``corpus.tokenize``)."""
        if self.format != "text" and not getattr(tokenizer, "chat_template", None):
            raise RsgwmError(f"{self.path}: {self.format} rows need a chat template, and the base's tokenizer has none")
        rows, dropped, empty = [], 0, []
        for number, row in zip(self.numbers, self.rows, strict=True):
            name = f"{self.path.name}:{number}"
            try:
                tokens, prompt = self._tokens(tokenizer, row)
            except Exception as error:  # a chat template is the model's own program and may raise anything
                raise RsgwmError(f"{name} cannot be rendered by the base's chat template: {error}") from error
            if len(tokens) <= prompt:
                empty.append(name)
                continue
            fitted = fit_row("draft", tokens[:prompt], tokens[prompt:], name, max_tokens, long_rows)
            if fitted is None:
                dropped += 1
            else:
                rows.append(fitted)
        raise_problems(str(self.path), [f"{name} has nothing to train" for name in empty])
        if not rows:
            raise RsgwmError(f"every row of {self.path} is longer than {max_tokens} tokens; raise max_tokens")
        return rows, dropped

    def _tokens(self, tokenizer: Tokenizer, row: Mapping[str, Any]) -> tuple[list[int], int]:
        """Token ids of a row and how many of them are prompt; at least 1, for nothing predicts the first token."""
        if self.format == "text":
            tokens = list(tokenizer.encode(row["text"]))
            if not tokens or tokens[-1] != tokenizer.eos_token_id:
                tokens.append(tokenizer.eos_token_id)
            return tokens, 1
        messages: Sequence[Mapping[str, Any]] = (
            row["messages"]
            if self.format == "chat"
            else [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        )
        options = {"tools": row.get("tools"), "tokenize": True, "return_dict": False}
        tokens = list(tokenizer.apply_chat_template(messages, **options))
        if not self.mask_prompt or len(messages) == 1:
            return tokens, 1
        asks = messages[-1].get("role") == "assistant"
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=asks, **options)
        return tokens, max(1, len(prompt))


def load_examples(path: Path, mask_prompt: bool) -> Examples:
    """Read and check a ``.jsonl`` file, or one JSON array; the first row decides the format, as in mlx-lm.

    Raises:
        RsgwmError: no such file, no rows, lines that are not JSON or of another format, a masked prompt in plain text.
    """
    rows: list[Mapping[str, Any]] = []
    numbers: list[int] = []
    problems = []
    found = ""
    unit, read = read_json_rows(path)
    for number, row in read:
        if isinstance(row, ValueError):
            problems.append(f"{unit} {number}: {row}")
            continue
        kind = _format_of(row)
        found = found or kind
        if not kind or kind != found:
            problems.append(f"{unit} {number} is no row of {found or 'a known format'}")
            continue
        problems += [f"{unit} {number}: {problem}" for problem in _row_problems(kind, row)]
        rows.append(row)
        numbers.append(number)
    if not found and problems:
        known = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in FORMATS.items())
        problems.append(f"the formats are {known}")
    raise_problems(str(path), problems)
    if not rows:
        raise RsgwmError(f"{path} holds no rows")
    if found == "text" and mask_prompt:
        raise RsgwmError(f"{path} holds plain text, which has no prompt to mask; leave mask_prompt off")
    return Examples(path, found, tuple(rows), mask_prompt, files.sha256_file(path), tuple(numbers))


def example_files(path: Path) -> tuple[Path, Path | None]:
    """The files of training and of held-out rows at ``path``, a folder or one ``.jsonl`` file."""
    if path.is_dir():
        valid = path / "valid.jsonl"
        return path / "train.jsonl", valid if valid.is_file() and valid.stat().st_size else None
    return path, None


def is_examples(path: Path) -> bool:
    """Whether ``path`` looks like mlx-lm's data (a file, or a folder with one) rather than a corpus folder."""
    named = not path.is_dir() and path.suffix in (".jsonl", ".json", ".ndjson")
    return named or path.is_file() or (path / "train.jsonl").is_file()


def _format_of(row: Any) -> str:
    if not isinstance(row, Mapping):
        return ""
    return next((name for name, keys in FORMATS.items() if all(key in row for key in keys)), "")


def _row_problems(kind: str, row: Mapping[str, Any]) -> list[str]:
    if kind != "chat":
        return [f"{key} is not text" for key in FORMATS[kind] if not isinstance(row[key], str)]
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return ["messages is not a list of messages"]
    if not all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages):
        return ["a message has no role"]
    if not all(isinstance(message.get("content") or "", (str, list)) for message in messages):
        return ["the content of a message is not text"]
    return [] if isinstance(row.get("tools") or [], list) else ["tools is not a list"]
