"""A conversation as the chat template renders it, and where in that text the assistant's answers stand.

A template may render a prompt differently once an answer follows (Gemma 4 opens an empty thought channel, DeepSeek-R1
a ``<think>``), so the prompt alone is no measure of where the answer begins. The conversation is rendered whole; where
the prompt's rendering is not its beginning, the answer is found by rendering again with a marker in its place. Any
template is its model's own program: what it leaves out of a row is found by looking for it in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.template import MARKER, Tokenizer

Message = Mapping[str, Any]
THINKING = re.compile(r"(?s)(?:<think>)?(.*)</think>(.*)")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Conversation:
    """A rendered row: its text, the character spans to train (empty: everything), and what should be told of it.

    ``prompt`` is the rendering of what stands before the only span, where the text begins with it.
    """

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    prompt: str = ""
    notes: tuple[str, ...] = ()


class ChatRenderer:
    """Renders the rows of one tokenizer's chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def conversation(self, messages: Sequence[Message], tools: Any, train: str) -> Conversation:
        """Render a row; ``train`` is ``all`` tokens, the ``last`` answer, or the answers of every ``turn``.

        Raises:
            RsgwmError: an answer that the template leaves out, content that is no text, no answer to train.
            Exception: whatever the template raises.
        """
        if train != "all" and (last := messages[-1].get("role")) != "assistant":
            raise RsgwmError(
                f"its last message is the {last}'s, so that no answer is left to train; end it with the assistant's, "
                "or leave mask_prompt off"
            )

        def render(chosen: Sequence[Message], ask: bool = False, with_tools: bool = True) -> str:
            options = {"add_generation_prompt": True} if ask else {}
            offered = tools if with_tools else None
            text: str = self.tokenizer.apply_chat_template(list(chosen), tools=offered, tokenize=False, **options)
            return text

        messages, text, notes = _readable_form(render, messages)
        spans, prompt = [], ""
        if train != "all":
            numbers = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
            for number in numbers if train == "turns" else numbers[-1:]:
                start, prompt = _start(render, messages, number, text)
                spans.append((start, _end(render, messages, number, text)))
            notes += self._header_note
        notes += _left_out(text, spans[-1][0] if spans else 0, messages)
        notes += _without_effect(render, text, messages, tools)
        return Conversation(text, tuple(spans), prompt if len(spans) == 1 else "", tuple(dict.fromkeys(notes)))

    @cached_property
    def _header_note(self) -> list[str]:
        """What to tell of a template that asks for no answer by a header: the model must write the header itself."""

        def render(chosen: Sequence[Message], ask: bool = False) -> str:
            text: str = self.tokenizer.apply_chat_template(list(chosen), tokenize=False, add_generation_prompt=ask)
            return text

        question = {"role": "user", "content": "Question"}
        text = _attempt(render, [question, {"role": "assistant", "content": MARKER}]) or ""
        prompt = _attempt(render, [question], True)
        if not prompt or not text.startswith(prompt) or not text[len(prompt) :].partition(MARKER)[0].strip():
            return []
        if prompt != _attempt(render, [question]):
            return []
        return ["the chat template has no generation prompt, so the header of the answer is trained, too"]

    def tokens(self, conversation: Conversation) -> tuple[list[int], int, tuple[int, ...]]:
        """Token ids, how many of them stand before the first trained one (at least 1), and those untrained after it."""
        ids = list(self.tokenizer.encode(conversation.text, add_special_tokens=False))
        if not conversation.spans:
            return ids, 1, ()
        if conversation.prompt:
            before = list(self.tokenizer.encode(conversation.prompt, add_special_tokens=False))
            if ids[: len(before)] == before:
                return ids, max(1, len(before)), ()
        bounds = [self._token_range(conversation.text, ids, span) for span in conversation.spans]
        first = max(1, bounds[0][0])
        trained = {index for start, end in bounds for index in range(start, end)}
        return ids, first, tuple(index for index in range(first, len(ids)) if index not in trained)

    def _token_range(self, text: str, ids: list[int], span: tuple[int, int]) -> tuple[int, int]:
        """First token of ``ids`` that reaches into the characters of ``span``, and the first that lies behind it."""
        start, end = span
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        encoding = backend.encode(text, add_special_tokens=False) if hasattr(backend, "encode") else None
        if encoding is not None and list(encoding.ids) == ids:
            offsets = encoding.offsets
            first = next((index for index, (_, until) in enumerate(offsets) if until > start), len(ids))
            return first, next((index for index in range(first, len(ids)) if offsets[index][0] >= end), len(ids))
        # A tokenizer without offsets: the tokens that the text has in common with its beginning.
        shared = [_shared(ids, list(self.tokenizer.encode(text[:at], add_special_tokens=False))) for at in span]
        return shared[0], len(ids) if end == len(text) else shared[1]


Render = Callable[..., str]


def _start(render: Render, messages: Sequence[Message], number: int, text: str) -> tuple[int, str]:
    """Where the answer ``messages[number]`` begins in ``text``, and the prompt's rendering if it is what precedes."""
    prompt = _attempt(render, messages[:number], True)
    if prompt and text.startswith(prompt):
        return len(prompt), prompt
    return _content_span(render, messages, number, text)[0], ""


def _end(render: Render, messages: Sequence[Message], number: int, text: str) -> int:
    """Where the turn of ``messages[number]``, its end-of-turn text included, ends in ``text``."""
    if number == len(messages) - 1:
        return len(text)
    alone = _attempt(render, messages[: number + 1])
    if alone and text.startswith(alone):
        return len(alone)
    end = _content_span(render, messages, number, text)[1]
    marked = _attempt(render, [*messages[:number], {"role": "assistant", "content": MARKER}]) or ""
    tail = marked.partition(MARKER)[2]
    shared = tail[: _shared(text[end:], tail)]
    if shared != tail:  # half a tag that two headers have in common is no end of turn
        shared = shared[: max(shared.rfind(">"), shared.rfind("]"), shared.rfind("\n")) + 1]
    return end + len(shared)


def _content_span(render: Render, messages: Sequence[Message], number: int, text: str) -> tuple[int, int]:
    """Start and end in ``text`` of what ``messages[number]`` says, by rendering again with a marker in its place."""
    marker = MARKER
    while marker in text:
        marker += "7"
    plain = {"role": messages[number].get("role"), "content": marker}
    following = messages[number + 1 :]
    content = messages[number].get("content")
    said = content.strip() if isinstance(content, str) else ""
    for changed in (plain, {**messages[number], "content": marker}):
        marked = _attempt(render, [*messages[:number], changed, *following])
        if marked is None or marker not in marked:
            continue
        before, _, after = marked.partition(marker)
        start = _shared(text, before)
        end = len(text) - _shared(text[start:][::-1], after[::-1])
        if start == len(before) or set(messages[number]) > set(plain):  # thinking and tool calls belong to the answer
            return start, end
        # What precedes the answer is another at every rendering (the time of day) or depends on it (its length).
        if said and text[:end].rstrip().endswith(said):
            return text.rindex(said, 0, end), end
    if said and text.count(said) == 1:
        return text.index(said), text.index(said) + len(said)
    raise RsgwmError("the assistant's answer cannot be told from its prompt in what the chat template makes of it")


def _attempt(render: Render, messages: Sequence[Message], ask: bool = False) -> str | None:
    """The rendering, or None where the template refuses these messages (an empty list, an unanswered tool call)."""
    try:
        return render(messages, ask)
    except Exception:  # a template may raise anything; the row itself was rendered without an error
        return None


def _readable_form(render: Render, messages: Sequence[Message]) -> tuple[list[Message], str, list[str]]:
    """The messages in a form that the template can write as text, that text, and what was changed for it.

    Some templates take content as a list of parts, some as a string alone; tool-call arguments as an object or as JSON.
    The wrong form is written as Python's or JSON's notation of it, or raises.
    """
    problem: Exception | None = None
    for form, notes in _forms(messages):
        try:
            text = render(form)
        except Exception as error:  # see _attempt
            problem = problem or error
            continue
        if not (wrong := _written_as_notation(text, form)):
            return form, text, notes
        problem = problem or RsgwmError(f"the chat template writes {wrong} as program text, in no form as it is meant")
    assert problem is not None
    raise problem


def _forms(messages: Sequence[Message]) -> Iterator[tuple[list[Message], list[str]]]:
    yield list(messages), []
    empty = ["a content of null is given to the chat template as an empty text"] if None in _contents(messages) else []
    if empty:
        messages = _emptied(messages)
        yield messages, empty
    joined = [_joined(message) for message in messages]
    other = [_other_arguments(message) for message in joined]
    parts = "the parts of a content are joined, since the chat template takes text alone"
    arguments = "tool-call arguments are given to the chat template as the other of JSON text and object"
    if joined != list(messages):
        yield joined, [*empty, parts]
    if other != joined:
        again = [_other_arguments(message) for message in messages]
        yield again, [*empty, arguments]
        if joined != list(messages):
            yield other, [*empty, parts, arguments]


def _contents(messages: Sequence[Message]) -> list[Any]:
    return [message.get("content", "") for message in messages]


def _emptied(messages: Sequence[Message]) -> list[Message]:
    """The messages with an empty text for a content of null, which some templates cannot join to others."""
    return [{**message, "content": ""} if message.get("content", "") is None else message for message in messages]


def _joined(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": "".join(_parts(content))} if isinstance(content, list) else message


def _parts(content: Any) -> list[str]:
    """The texts of a content: of its parts, which must all be text."""
    if not isinstance(content, list):
        return [content] if content else []
    for part in content:
        if isinstance(part, str):
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            raise RsgwmError(f"a content part of type {kind!r} cannot be trained here; only text can")
    return [part if isinstance(part, str) else part["text"] for part in content]


def _calls(message: Message) -> list[Mapping[str, Any]]:
    """Name and arguments of every tool call of a message."""
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
    return [function for function in functions if isinstance(function, Mapping)]


def _other_arguments(message: Message) -> Message:
    """The message with its tool calls' arguments as objects where they are JSON text, and the other way round."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "arguments" not in function:
            calls.append(call)
            continue
        arguments = function["arguments"]
        changed = _parsed(arguments) if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": changed}})
    return {**message, "tool_calls": calls}


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _written_as_notation(text: str, messages: Sequence[Message]) -> str:
    """What of the messages stands in ``text`` as Python's or JSON's notation of a value; empty if nothing does."""
    squeezed = _squeezed(text)
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and content:
            _parts(content)
            if any(_squeezed(form) in squeezed for form in (repr(content), json.dumps(content, ensure_ascii=False))):
                return "the parts of a content"
        for function in _calls(message):
            arguments = function.get("arguments")
            quoted = json.dumps(arguments, ensure_ascii=False)[1:-1] if isinstance(arguments, str) else repr(arguments)
            plain = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            if arguments and quoted != plain and _squeezed(quoted) in squeezed:
                return "the arguments of a tool call"
    return ""


def _without_effect(render: Render, text: str, messages: Sequence[Message], tools: Any) -> list[str]:
    """Fields of a row without which its rendering is the same: the template does not know them."""
    notes = []
    for key in ("tool_calls", "function_call", *REASONING_KEYS):
        if any(message.get(key) for message in messages):
            without = [{name: value for name, value in message.items() if name != key} for message in messages]
            if _attempt(render, without) == text:
                notes.append(f"the chat template leaves out the {key}")
    if tools and _attempt(partial(render, with_tools=False), messages) == text:
        notes.append("the chat template leaves out the tools")
    return notes


def _left_out(text: str, start: int, messages: Sequence[Message]) -> list[str]:
    """What of a row is not in its rendering ``text``; of the last message, not behind ``start``.

    Raises:
        RsgwmError: nothing at all of the answer is.
    """
    everywhere, answer = _squeezed(text), _squeezed(text[start:])
    notes = []
    for number, message in enumerate(messages):
        last = number == len(messages) - 1
        role = message.get("role")
        place = answer if last else everywhere
        pieces = list(_pieces(message))
        missing = [name for name, said in pieces if _squeezed(said) not in place]
        if last and role == "assistant" and not pieces:
            notes.append("the answer is empty: the end of the turn alone is trained")
        if last and role == "assistant" and pieces and len(missing) == len(pieces) and not _some_of(message, place):
            raise RsgwmError(f"the chat template leaves out the whole answer ({', '.join(dict.fromkeys(missing))})")
        whose = "the answer" if last and role == "assistant" else f"an earlier {role} message" if not last else role
        notes += [f"the chat template leaves out or changes the {name} of {whose}" for name in dict.fromkeys(missing)]
    return notes


def _some_of(message: Message, place: str) -> bool:
    """Whether any line of what the message says is in ``place``: changed, but not gone."""
    lines = [_squeezed(line) for part in _parts(message.get("content")) for line in part.splitlines()]
    return any(line in place for line in lines if line)


def _pieces(message: Message) -> Iterator[tuple[str, str]]:
    """(name, text) of everything that a message says and a rendering should hold."""
    for part in _parts(message.get("content")):
        split = THINKING.fullmatch(part.strip()) if message.get("role") == "assistant" else None
        for name, said in (("thinking", split[1]), ("text", split[2])) if split else (("text", part),):
            if said.strip():
                yield name, said
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str) and message[key].strip():
            yield key, message[key]
    for function in _calls(message):
        key = "tool_calls" if message.get("tool_calls") else "function_call"
        yield key, str(function.get("name"))
        arguments = function.get("arguments")
        for value in _leaves(_parsed(arguments) if isinstance(arguments, str) else arguments):
            yield key, value


def _leaves(value: Any) -> Iterator[str]:
    """The texts and numbers of a JSON value that every notation writes alike."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, str) and re.fullmatch(r"[\w .,:-]+", value):
        yield value


def _shared(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (token, others) in pairs if token != others), min(len(left), len(right)))


def _squeezed(text: str) -> str:
    """Without case and white space, which templates change."""
    return "".join(text.casefold().split())
