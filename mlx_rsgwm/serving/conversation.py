"""Messages of a chat: what a template can be asked, and how it is asked in a model's own words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_rsgwm.data.template import Template
from mlx_rsgwm.serving.errors import RequestError
from mlx_rsgwm.serving.library import Library, ServedModel

SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Conversation:
    """A system message (empty: none), the questions and answers before, and the question that is asked."""

    system: str
    before: tuple[tuple[str, str], ...]
    question: str

    def prompt(self, library: Library, model: ServedModel) -> tuple[int, ...]:
        """Token ids of the conversation in the words that the model was trained with.

        Raises:
            RequestError: a system message, and the model's template has no place for one.
        """
        template = model.template
        if self.system:
            if not template.chat:
                raise RequestError(
                    f"the model {model.name!r} takes no system message: its template {template.name!r} has no place "
                    "for one",
                    code="unsupported_message",
                    param="messages",
                )
            template = Template(**{**vars(template), "system": self.system})
        return tuple(template.turn_prompt(library.tokenizer, self.before, self.question))


def conversation_of(messages: Any) -> Conversation:
    """The conversation that ``messages`` of a request are: a system message first, if any; the user's last.

    Messages of one role after another are one, with an empty line between them.

    Raises:
        ValueError: they are no such conversation.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("must be a list with at least one message")
    said: list[tuple[str, str]] = []
    for message in messages:
        role, content = _of(message)
        if said and said[-1][0] == role:
            content = f"{said.pop()[1]}\n\n{content}"
        said.append((role, content))
    system = said.pop(0)[1] if said[0][0] == "system" else ""
    roles = [role for role, _ in said]
    if "system" in roles:
        raise ValueError("may have a system message at their beginning only")
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise ValueError("must begin, after a system message, and end with the user's")
    texts = [content for _, content in said]
    if not texts[-1].strip():
        raise ValueError("end with a question that is empty")
    return Conversation(system, tuple(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1].strip())


def _of(message: Any) -> tuple[str, str]:
    """Role and text of a message."""
    if not isinstance(message, dict):
        raise ValueError("must be objects with role and content")
    role, content = message.get("role"), message.get("content")
    role = "system" if role in SYSTEM else role
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"have the role {role!r}; system, developer, user and assistant are supported")
    known = ("role", "content", "refusal", "annotations")  # the last two come back from clients that keep our answers
    unknown = [name for name in message if message[name] not in (None, []) and name not in known]
    if unknown:
        raise ValueError(f"have {unknown[0]!r}, which is not supported")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ValueError("have parts that are not text; only text is supported")
        content = "".join(part.get("text") if isinstance(part.get("text"), str) else "" for part in content)
    if content is None and role == "assistant":
        content = message.get("refusal") or ""
    if not isinstance(content, str):
        raise ValueError("must have a content that is a text or a list of text parts")
    return role, content
