"""Prompts: one Template object turns questions and answers into token ids, in training and at answer time alike.

A template has a hash; adapters record it, so that a verifier is never asked in words it was not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from mlx_rsgwm.core.config import build
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.files import sha256_json


class Tokenizer(Protocol):
    """The part of a tokenizer that a template needs (mlx-lm's wrapper and transformers' tokenizers both have it)."""

    @property
    def eos_token_id(self) -> int: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


MARKER = "81529037464"  # digits come through templates that trim, change the case, or cut at a tag


@dataclass(frozen=True)
class Template:
    """How a question becomes a drafting prompt, and a question with a candidate answer a verifying prompt.

    ``draft`` holds ``{question}``; ``verify`` holds ``{question}`` and ``{answer}``. With ``chat`` both are sent as the
    user's message through the tokenizer's own chat template (``system`` as the system message when it is not empty).
    ``yes`` and ``no`` are the verdict texts; each must start with a different token. ``stop`` are texts of one token
    each that end a draft, as the end of text does. ``thinking`` is handed to chat templates as
    ``enable_thinking``; None leaves it to them.
    """

    name: str
    draft: str
    verify: str
    yes: str = " Yes"
    no: str = " No"
    answer_prefix: str = " "
    chat: bool = False
    system: str = ""
    stop: tuple[str, ...] = ()
    thinking: bool | None = None

    def __post_init__(self) -> None:
        if "{question}" not in self.draft:
            raise RsgwmError(f"template {self.name}: draft has no {{question}}")
        if "{question}" not in self.verify or "{answer}" not in self.verify:
            raise RsgwmError(f"template {self.name}: verify needs {{question}} and {{answer}}")
        if self.system and not self.chat:
            raise RsgwmError(f"template {self.name}: a system prompt needs a chat template")

    @property
    def hash(self) -> str:
        """SHA-256 over every field but the name: equal wording is equal, whatever it is called.

        ``stop`` and ``thinking`` count only where they are set: templates were hashed before there were such fields.
        """
        fields = asdict(self)
        del fields["name"]
        for name, unset in (("stop", ()), ("thinking", None)):
            if fields[name] == unset:
                del fields[name]
        return sha256_json(fields)

    def describe(self) -> dict[str, Any]:
        """For manifests: all fields and the hash."""
        return {**asdict(self), "stop": list(self.stop), "hash": self.hash}

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Template:
        """The template a manifest recorded; its stored hash must still be the one of its fields."""
        if not isinstance(description, Mapping):
            raise RsgwmError(f"template description not understood: found {type(description).__name__}")
        fields = {key: value for key, value in description.items() if key != "hash"}
        template = build(cls, fields, "template description not understood")
        if description.get("hash", template.hash) != template.hash:
            raise RsgwmError(f"template {template.name}: its recorded hash is not that of its fields")
        return template

    def draft_prompt(self, tokenizer: Tokenizer, question: str) -> list[int]:
        """Token ids up to where the drafter starts writing."""
        return self._encode(tokenizer, self.draft.replace("{question}", question))

    def turn_prompt(self, tokenizer: Tokenizer, before: Sequence[tuple[str, str]], question: str) -> list[int]:
        """As :meth:`draft_prompt`, after the questions and answers ``before`` it, the earliest first."""
        asked = [self.draft.replace("{question}", text) for text in (*(earlier for earlier, _ in before), question)]
        answers = [answer for _, answer in before]
        if self.chat:
            return self._encode(tokenizer, asked[-1], list(zip(asked, answers, strict=False)))
        said = [f"{text}{self.answer_prefix}{answer}\n" for text, answer in zip(asked, answers, strict=False)]
        return self._encode(tokenizer, "".join(said) + asked[-1])

    def verify_prompt(self, tokenizer: Tokenizer, question: str, answer: str) -> list[int]:
        """Token ids up to where the verifier says yes or no."""
        # One pass, so that a question holding "{answer}" stays as it is.
        before, after = self.verify.split("{answer}", 1)
        text = before.replace("{question}", question) + answer + after.replace("{question}", question)
        return self._encode(tokenizer, text)

    def completion(self, tokenizer: Tokenizer, answer: str) -> list[int]:
        """Token ids of an answer as the drafter should write it, end of text included."""
        if tokenizer.eos_token_id is None:
            raise RsgwmError(
                "the base's tokenizer has no end-of-text token, so that a drafter could not learn to stop; "
                "set eos_token in its tokenizer_config.json"
            )
        ids = tokenizer.encode(self.answer_prefix + answer, add_special_tokens=False)
        return [*ids, tokenizer.eos_token_id]

    def verdict_ids(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """First token of the yes and of the no verdict."""
        yes, no = (tokenizer.encode(text, add_special_tokens=False)[0] for text in (self.yes, self.no))
        if yes == no:
            raise RsgwmError(f"template {self.name}: {self.yes!r} and {self.no!r} start with the same token")
        return yes, no

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Ids of the stop texts; each must be one token, since drafting stops at a token."""
        encoded = {text: tokenizer.encode(text, add_special_tokens=False) for text in self.stop}
        longer = [repr(text) for text, ids in encoded.items() if len(ids) != 1]
        if longer:
            raise RsgwmError(f"template {self.name}: stop texts must be one token each, not {', '.join(longer)}")
        return frozenset(ids[0] for ids in encoded.values())

    def _encode(self, tokenizer: Tokenizer, text: str, before: Sequence[tuple[str, str]] = ()) -> list[int]:
        if not self.chat:
            return list(tokenizer.encode(text, add_special_tokens=True))
        options: dict[str, Any] = {"add_generation_prompt": True}
        if self.thinking is not None:
            options["enable_thinking"] = self.thinking
        # What a template does with a text may depend on it; whether it writes it at all does not.
        if MARKER not in tokenizer.apply_chat_template(self._messages(MARKER), tokenize=False, **options):
            raise RsgwmError("the base's chat template leaves out the question; use a template without chat")
        messages = self._messages(text, before)
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))

    def _messages(self, text: str, before: Sequence[tuple[str, str]] = ()) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answer in before:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": text}]


# Wordings were compared by how much of a base model's next-token mass falls on the two verdicts: for SmolLM2-135M 0.38
# with this one, 0.001 with "Is the answer correct?" and " yes", which then takes many rows to unlearn.
_CHECK = "Is the answer correct, yes or no?"

TEMPLATES = {
    "plain": Template(
        name="plain",
        draft="Q: {question}\nA:",
        verify="Q: {question}\nA: {answer}\nQ: " + _CHECK + "\nA:",
        yes=" Yes",
        no=" No",
    ),
    "chat": Template(
        name="chat",
        draft="{question}\nEnd with a line '#### answer'.",
        verify="{question}\n\nProposed answer:\n{answer}\n\n" + _CHECK,
        yes="Yes",
        no="No",
        answer_prefix="",
        chat=True,
    ),
}


def bare_template(chat: bool, system: str = "") -> Template:
    """The question in nobody's words but the user's: through the model's own chat template, where it has one."""
    return Template("own", "{question}", "{question}\n{answer}", answer_prefix="", chat=chat, system=system)


def find_template(name: str) -> Template:
    """A shipped template by name."""
    if name not in TEMPLATES:
        raise RsgwmError(f"unknown template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
