"""What a request may ask for: every parameter is honoured, known and without effect here, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.inference.policy import MODES
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.inference.scores import SCORES
from mlx_rsgwm.serving.conversation import Conversation, conversation_of
from mlx_rsgwm.serving.errors import RequestError
from mlx_rsgwm.serving.row_sampling import MOST_TOP_LOGPROBS, RowSampling

Check = Callable[[Any], Any]  # the value as it is used; ValueError says what it must be

# Accepted and without effect: they say who asks, or how a provider bills and keeps it.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
MOST_STOPS = 16
MOST_CHOICES = 64
MOST_ATTEMPTS = 32  # of a verified answer
MOST_ANSWERS = 64  # of a question that are verified at once
LARGEST_SEED = 2**64 - 1
LEAST_SHARE = 1e-9  # of top_p
LARGEST_SCALE = 100.0  # of an adapter that a request adds


@dataclass(frozen=True)
class Asked:
    """A request for text. ``given``: the settings of :class:`RowSampling` that it names; ``seed`` None: any.

    ``logprobs``: how many alternatives are told of each token, None: nothing. ``prompts``: of ``/v1/completions``,
    texts or ids; ``conversation``: of ``/v1/chat/completions``. ``verify``: settings of a verified answer.
    ``schema``: of JSON, which the answer is held to. ``lora``: adapters that are added to the model, and how often
    each counts; None: not named.
    """

    model: str
    n: int = 1
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    conversation: Conversation | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    verify: Mapping[str, Any] | None = None
    schema: str | None = None
    lora: tuple[tuple[str, float], ...] | None = None

    @property
    def sampling(self) -> RowSampling:
        """Of rows; what the request does not say is as in ``rsgwm ask``."""
        usual = {"temperature": Sampling.temperature, "top_p": Sampling.top_p}
        return RowSampling(**{**usual, **self.given}, logprobs=self.logprobs)


class Body:
    """The parameters of a request; each that is understood is taken, and what is left over is refused.

    ``inside``: of the parameters of one parameter, its name.
    """

    def __init__(self, values: Any, inside: str = "") -> None:
        if not isinstance(values, dict):
            raise RequestError(
                f"{inside or 'the body'} must be a JSON object", code="invalid_value", param=inside or None
            )
        self._inside = f"{inside}." if inside else ""
        self._values = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, check: Check, default: Any = None) -> Any:
        """The value of a parameter as ``check`` returns it, or the default.

        Raises:
            RequestError: it is not what it must be.
        """
        if name not in self._values:
            return default
        value = self._values.pop(name)
        try:
            return check(value)
        except ValueError as error:
            full = self._inside + name
            raise RequestError(f"{full} {error}", code="invalid_value", param=full) from None

    def require(self, name: str, check: Check) -> Any:
        """As :meth:`take`, of a parameter that must be there."""
        if name not in self._values:
            full = self._inside + name
            raise RequestError(f"{full} is missing", code="missing_required_parameter", param=full)
        return self.take(name, check)

    def end(self, ignored: Sequence[str] = ()) -> None:
        """Refuse what nobody took.

        Raises:
            RequestError: a parameter that is not served, by its name.
        """
        left = [name for name in self._values if name not in ignored]
        if left:
            full = self._inside + left[0]
            raise RequestError(f"{full} is not supported here", code="unsupported_parameter", param=full)


def text(value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ValueError("must be a text")
    return value


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def integer(least: int, most: int) -> Check:
    """A whole number in a range."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return value

    return check


def number(least: float, most: float) -> Check:
    """A number in a range."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ValueError(f"must be a number from {least:g} to {most:g}")
        return float(value)

    return check


def above(least: float, most: float) -> Check:
    """A number in a range whose lower end is not in it."""
    check = number(least, most)

    def check_above(value: Any) -> float:
        if check(value) == least:
            raise ValueError(f"must be above {least:g}")
        return float(value)

    return check_above


def several(check: Check) -> Check:
    """A list of what ``check`` takes."""

    def check_all(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise ValueError("must be a list")
        return [check(each) for each in value]

    return check_all


def exactly(*allowed: Any) -> Check:
    """One of a few values."""

    def check(value: Any) -> Any:
        if not any(value is each or (value == each and type(value) is type(each)) for each in allowed):
            raise ValueError(f"must be {' or '.join(map(repr, allowed))}")
        return value

    return check


def stops(value: Any) -> tuple[str, ...]:
    """A stop text, or several."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(each, str) and each for each in listed):
        raise ValueError("must be a text or a list of texts that are not empty")
    if len(listed) > MOST_STOPS:
        raise ValueError(f"has at most {MOST_STOPS} texts")
    return tuple(listed)


def biases(value: Any) -> dict[int, float]:
    """Biases by token."""
    if not isinstance(value, dict) or not all(str(token).isascii() and str(token).isdigit() for token in value):
        raise ValueError("must be an object whose keys are token ids")
    check = number(-100, 100)
    return {int(token): check(bias) for token, bias in value.items()}


def stream_options(value: Any) -> bool:
    """Whether usage is told at the end of a stream."""
    if not isinstance(value, dict) or not set(value) <= {"include_usage"}:
        raise ValueError("must be an object with include_usage")
    return flag(value.get("include_usage", False))


def schema_of(value: Any) -> str | None:
    """The JSON schema, as a text, that a response format holds an answer to; None: a text is free."""
    if not isinstance(value, dict) or value.get("type") not in ("text", "json_object", "json_schema"):
        raise ValueError("must have the type text, json_object or json_schema")
    if value["type"] != "json_schema":
        if len(value) != 1:
            raise ValueError(f"of the type {value['type']} has nothing else")
        return None if value["type"] == "text" else '{"type": "object"}'
    body = Body(value.get("json_schema"), "response_format.json_schema")
    body.take("name", text)
    body.take("description", text)
    body.take("strict", flag)  # an answer is held to the schema either way
    schema = body.require("schema", lambda schema: schema)
    body.end()
    if not isinstance(schema, dict):
        raise ValueError("must have a JSON object as json_schema.schema")
    return json.dumps(schema)


def adapters(value: Any) -> tuple[tuple[str, float], ...]:
    """Adapters by id, and how often each counts, as llama.cpp's server takes them."""
    if not isinstance(value, list) or not all(
        isinstance(each, dict) and set(each) == {"id", "scale"} for each in value
    ):
        raise ValueError("must be a list of objects with id and scale")
    check = number(-LARGEST_SCALE, LARGEST_SCALE)
    if not all(isinstance(each["id"], str) for each in value):
        raise ValueError("must name adapters as /v1/models does")
    return tuple((each["id"], check(each["scale"])) for each in value)


def prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A prompt as text or token ids, or several of them."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return tuple(value)
        rows = value if all(isinstance(each, list) and each for each in value) else [value]
        if all(type(token) is int and token >= 0 for row in rows for token in row):
            return tuple(tuple(row) for row in rows)
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists")


SETTINGS: dict[str, Check] = {
    "temperature": number(0, 100),
    "top_p": number(0, 1),
    "top_k": integer(-1, 1 << 31),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": above(0, 10),
    "logit_bias": biases,
}


def _common(body: Body) -> dict[str, Any]:
    """What chats and completions have in common, as the fields of :class:`Asked`."""
    given = {name: value for name, check in SETTINGS.items() if (value := body.take(name, check)) is not None}
    if "top_k" in given:
        given["top_k"] = max(0, given["top_k"])  # -1 and 0: all tokens
    if "top_p" in given:
        given["top_p"] = max(LEAST_SHARE, given["top_p"])  # OpenAI allows 0: the likeliest token alone
    try:
        RowSampling(**given)
    except RsgwmError as error:
        raise RequestError(error, code="invalid_value") from None
    stream = body.take("stream", flag, False)
    usage = body.take("stream_options", stream_options)
    if usage is not None and not stream:
        raise RequestError("stream_options needs stream", code="invalid_value", param="stream_options")
    return {
        "model": body.require("model", text),
        "n": body.take("n", integer(1, MOST_CHOICES), 1),
        "seed": body.take("seed", integer(-(2**63), LARGEST_SEED)),
        "stop": body.take("stop", stops, ()),
        "given": given,
        "stream": stream,
        "include_usage": bool(usage),
        "lora": body.take("lora", adapters),
    }


def verify_settings(value: Any) -> dict[str, Any]:
    """Settings of a verified answer: those of the loop, what is told of drafts, the false-accept rate to keep."""
    body = Body(value, "verify")
    checks: dict[str, Check] = {
        "attempts": integer(1, MOST_ATTEMPTS),
        "threshold": number(0, 1),
        "target_far": number(0, 1),
        "score": exactly(*SCORES),
        "mode": exactly(*MODES),
        "abstain": flag,
        "drafts": exactly("none", "summary", "full"),
    }
    settings = {name: value for name, check in checks.items() if (value := body.take(name, check)) is not None}
    body.end()
    return settings


def chat_request(values: Any) -> Asked:
    """The request of ``POST /v1/chat/completions``.

    Raises:
        RequestError: a parameter that is missing, not what it must be, or not served.
    """
    body = Body(values)
    common = _common(body)
    wanted = body.take("logprobs", flag, False)
    top = body.take("top_logprobs", integer(0, MOST_TOP_LOGPROBS))
    if top is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs", code="invalid_value", param="top_logprobs")
    most = body.take("max_tokens", integer(1, 1 << 31))
    written = body.take("max_completion_tokens", integer(1, 1 << 31), most)
    if most not in (None, written):
        message = "max_tokens and max_completion_tokens differ; give the second alone"
        raise RequestError(message, code="invalid_value", param="max_tokens")
    schema = body.take("response_format", schema_of)
    verify = body.take("verify", verify_settings)
    conversation = body.require("messages", conversation_of)
    body.end(IGNORED)
    return Asked(
        **common,
        max_tokens=written,
        logprobs=(top or 0) if wanted else None,
        conversation=conversation,
        verify=verify,
        schema=schema,
    )


def completion_request(values: Any) -> Asked:
    """The request of ``POST /v1/completions``; as :func:`chat_request`."""
    body = Body(values)
    common = _common(body)
    logprobs = body.take("logprobs", integer(0, MOST_TOP_LOGPROBS))
    most = body.take("max_tokens", integer(1, 1 << 31))
    texts = body.require("prompt", prompts)
    body.take("echo", exactly(False))
    body.take("best_of", exactly(*dict.fromkeys((1, common["n"]))))
    body.end(IGNORED)
    return Asked(**common, max_tokens=most, logprobs=logprobs, prompts=texts)


def verification_request(values: Any) -> tuple[str, str, tuple[str, ...], dict[str, Any], float | None]:
    """The request of ``POST /v1/verifications``: model, question, answers, settings of the loop, false-accept rate."""
    body = Body(values)
    model, question = body.require("model", text), body.require("question", text)
    answers = body.require("answers", several(text))
    if not 1 <= len(answers) <= MOST_ANSWERS:
        raise RequestError(f"answers must be 1 to {MOST_ANSWERS} texts", code="invalid_value", param="answers")
    if not question.strip():
        raise RequestError("question is empty", code="invalid_value", param="question")
    checks: dict[str, Check] = {"threshold": number(0, 1), "score": exactly(*SCORES)}
    changes = {name: value for name, check in checks.items() if (value := body.take(name, check)) is not None}
    target = body.take("target_far", number(0, 1))
    body.end(IGNORED)
    return model, question.strip(), tuple(answers), changes, target
