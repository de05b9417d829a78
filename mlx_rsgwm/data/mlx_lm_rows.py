"""mlx-lm's training data: JSON lines of chats, completions or plain text, as ``mlx_lm.lora --data`` reads them.

A folder with ``train.jsonl`` (and ``valid.jsonl``, the held-out rows), or one ``.jsonl`` file. Prompts go through the
tokenizer's chat template as in mlx-lm 0.32.2, so the token ids are the same. All rows are draft rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError, grouped, raise_problems
from mlx_rsgwm.core.json_lines import read_json_rows
from mlx_rsgwm.data.asked import said_by
from mlx_rsgwm.data.batching import NO_KEYS, TokenRow
from mlx_rsgwm.data.corpus import fit_row
from mlx_rsgwm.data.disputed import same_answer
from mlx_rsgwm.data.question_files import TABLE_SUFFIXES
from mlx_rsgwm.data.rendered_chat import ChatRenderer
from mlx_rsgwm.data.row_hashes import KEY, RowKeys, RowRecord, contents_hash, folded, row_hash, row_keys
from mlx_rsgwm.data.template import Template, Tokenizer

FORMATS = {"completions": ("prompt", "completion"), "chat": ("messages",), "text": ("text",)}


@dataclass(frozen=True)
class Examples:
    """Rows of one format. With ``mask_prompt`` only the answer at the end is trained, with ``all_turns`` every answer
    of the assistant, else every token.

    ``numbers`` are the rows' lines in the file (or places in its array), from 1, by which errors name them.
    """

    path: Path
    format: str
    rows: tuple[Mapping[str, Any], ...]
    mask_prompt: bool
    file_hash: str
    numbers: tuple[int, ...]
    template: Template | None = None
    all_turns: bool = False

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the file and of which of its tokens are trained."""
        return files.sha256_json([self.file_hash, "turns" if self.all_turns else self.mask_prompt])

    def describe(self) -> dict[str, Any]:
        """For an adapter's manifest."""
        turns = {"all_turns": True} if self.all_turns else {}
        return {
            "hash": self.hash,
            "format": self.format,
            "mask_prompt": self.mask_prompt,
            **turns,
            "file": self.path.name,
            KEY: self.record().describe(),
        }

    def record(self) -> RowRecord:
        """What the rows are recognised by: prompts, user's messages, whole texts, and parts that may be questions."""
        return RowRecord.of_keys(self.keys)

    @cached_property
    def keys(self) -> tuple[RowKeys, ...]:
        """What each row is recognised by."""
        return tuple(map(_keys, self.rows))

    def contents(self) -> frozenset[bytes]:
        """Hashes of what the rows ask and answer, by which files of the same rows are recognised."""
        return frozenset(map(_contents, self.rows))

    def token_rows(self, tokenizer: Tokenizer, max_tokens: int, long_rows: str) -> tuple[list[TokenRow], int]:
        """Token rows, and how many were left out because they exceed ``max_tokens`` (see ``corpus.tokenize``)."""
        if self.format != "text" and not getattr(tokenizer, "chat_template", None):
            raise RsgwmError(f"{self.path}: {self.format} rows need a chat template, and the base's tokenizer has none")
        render = self._text_row if self.format == "text" else partial(self._chat_row, ChatRenderer(tokenizer))
        disputed = self._disputed()
        rows, dropped, problems = [], 0, []
        for number, row, keys in zip(self.numbers, self.rows, self.keys, strict=True):
            name = f"{self.path.name}:{number}"
            try:
                tokens, prompt, untrained, notes = render(tokenizer, row)
                notes = (*notes, DISPUTED) if number in disputed else notes
            except RsgwmError as error:
                problems.append((name, str(error)))
                continue
            except Exception as error:  # a chat template is the model's own program and may raise anything
                reason = str(error) or type(error).__name__
                problems.append((name, f"it cannot be rendered by the base's chat template: {reason}"))
                continue
            if len(tokens) <= prompt:
                problems.append((name, "there is nothing to train"))
                continue
            fitted = fit_row(
                "draft", tokens[:prompt], tokens[prompt:], name, max_tokens, long_rows, untrained, tuple(notes),
                keys,
            )  # fmt: skip
            if fitted is None:
                dropped += 1
            else:
                rows.append(fitted)
        raise_problems(str(self.path), grouped(problems))
        if not rows:
            raise RsgwmError(f"every row of {self.path} is longer than {max_tokens} tokens; raise max_tokens")
        return rows, dropped

    def _disputed(self) -> set[int]:
        """Numbers of rows that ask what another one asks and are answered in another way."""
        firsts: dict[str, tuple[int, str]] = {}
        disputed: set[int] = set()
        for number, row in zip(self.numbers, self.rows, strict=True) if self.format != "text" else ():
            asked, answer = _asked_and_answer(row)
            first, other = firsts.setdefault(asked, (number, answer))
            if not same_answer(answer, other):
                disputed |= {first, number}
        return disputed

    def _text_row(self, tokenizer: Tokenizer, row: Mapping[str, Any]) -> Rendered:
        tokens, end = list(tokenizer.encode(row["text"])), tokenizer.eos_token_id
        if end is None:
            return tokens, 1, (), ("the tokenizer has no end-of-text token, so no row ends with it",)
        if not tokens or tokens[-1] != end:
            tokens.append(end)
        return tokens, 1, (), ()

    def _chat_row(self, renderer: ChatRenderer, tokenizer: Tokenizer, row: Mapping[str, Any]) -> Rendered:
        messages: Sequence[Mapping[str, Any]] = (
            row["messages"]
            if self.format == "chat"
            else [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        )
        train = "turns" if self.all_turns else "last" if self.mask_prompt else "all"
        conversation = renderer.conversation(messages, row.get("tools"), train)
        return *renderer.tokens(conversation), conversation.notes


# Token ids, how many of them are prompt (at least 1: nothing predicts the first token), untrained ones after it, notes.
Rendered = tuple[list[int], int, tuple[int, ...], tuple[str, ...]]


DISPUTED = "the same prompt has two different answers, and all of them are trained"
_CORPUS = "a corpus is made of questions and answers with: rsgwm data build"


def load_examples(
    path: Path, mask_prompt: bool, all_turns: bool = False, features: Mapping[str, str] | None = None
) -> Examples:
    """Read and check a ``.jsonl`` file, or one JSON array; the first row decides the format, as in mlx-lm.

    ``features`` name the fields of the rows that hold the ``prompt``, ``completion``, ``messages`` or ``text``.

    Raises:
        RsgwmError: no such file, no rows, lines that are not JSON or of another format, a masked prompt in plain text.
    """
    rows: list[Mapping[str, Any]] = []
    numbers: list[int] = []
    problems: list[tuple[str, str]] = []
    form = ""
    if path.suffix.lower() in TABLE_SUFFIXES:
        raise RsgwmError(f"{path} is a table, and training rows are JSON lines; {_CORPUS} --task {path}")
    unit, read = read_json_rows(path)
    for number, row in read:
        if isinstance(row, ValueError):
            problems.append((f"{unit} {number}", str(row)))
            continue
        row = _renamed(row, features or {})
        kind = _format_of(row)
        form = form or kind
        if not kind or kind != form:
            problems.append((f"{unit} {number}", f"no row of {form or 'a known format'}"))
            continue
        problems += [(f"{unit} {number}", problem) for problem in _row_problems(kind, row)]
        rows.append(row)
        numbers.append(number)
    lines = grouped(problems)
    if not form and problems:
        known = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in FORMATS.items())
        lines.append(f"the formats are {known}")
        if all(isinstance(row.value, Mapping) and row.value.keys() >= {"question", "answer"} for row in read):
            lines = [f"questions and answers, and no training rows; {_CORPUS} --task {path}"]
    raise_problems(str(path), lines)
    if not rows:
        raise RsgwmError(f"{path} holds no rows")
    if form == "text" and (mask_prompt or all_turns):
        raise RsgwmError(f"{path} holds plain text, which has no prompt to mask; pass --no-mask-prompt")
    digest = files.sha256_file(path)
    return Examples(path, form, tuple(rows), mask_prompt or all_turns, digest, tuple(numbers), None, all_turns)


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


def _renamed(row: Any, features: Mapping[str, str]) -> Any:
    """The row with its fields under our names; those of another name that ``features`` replaces are not read."""
    if not isinstance(row, Mapping) or not features:
        return row
    others = {name: value for name, value in row.items() if name not in features}
    return {**others, **{name: row[feature] for name, feature in features.items() if feature in row}}


def _keys(row: Mapping[str, Any]) -> RowKeys:
    """What a row is recognised by: its prompt, all that the user says in its chat, or its whole text."""
    if "messages" not in row:
        return row_keys(row["prompt"] if "prompt" in row else row["text"])
    turns = said_by(row["messages"], "user")
    return row_keys("\n".join(turns), turns if len(turns) > 1 else ()) if turns else NO_KEYS


def _contents(row: Mapping[str, Any]) -> bytes:
    """What a row asks and answers, in any of the formats."""
    if "messages" not in row:
        return contents_hash(row["prompt"], row["completion"]) if "prompt" in row else row_hash(row["text"])
    messages = row["messages"]
    calls = [json.dumps(message["tool_calls"], sort_keys=True) for message in messages if message.get("tool_calls")]
    question, answers = (said_by(messages, role) for role in ("user", "assistant"))
    return contents_hash("\n".join(question), "\n".join([*answers, *calls]))


def _asked_and_answer(row: Mapping[str, Any]) -> tuple[str, str]:
    """All that a row's last answer is an answer to, and that answer; without one that is text, "" answers."""
    if "messages" not in row:
        return folded(row["prompt"]), row["completion"]
    *before, last = row["messages"]
    answer = last.get("content")
    asked = json.dumps([before, row.get("tools")], sort_keys=True, ensure_ascii=False)
    plain = isinstance(answer, str) and not last.get("tool_calls")
    return folded(asked), answer if plain else ""


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
