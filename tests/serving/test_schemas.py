"""Answers held to JSON and to schemas, each row by itself; and schemas that nothing is held to."""

import json

import pytest

from tests.serving.test_app import GREEDY, QUESTION, chunks, refused


def schema(value):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value, "strict": True}}


SUM = {
    "type": "object",
    "properties": {
        "answer": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"enum": ["pens", "böxes"]},
        "sure": {"type": "boolean"},
    },
    "required": ["answer", "unit", "sure"],
    "additionalProperties": False,
}


def test_answers_are_held_to_a_schema_each_by_itself(client):
    free = client.post("/v1/chat/completions", json={**GREEDY, "model": "a"}).json()["choices"]
    body = {"model": "a", "messages": QUESTION, "temperature": 1.5, "n": 8, "seed": 1, "response_format": schema(SUM)}
    answer = client.post("/v1/chat/completions", json=body).json()
    values = [json.loads(choice["message"]["content"]) for choice in answer["choices"]]
    assert len({str(value) for value in values}) > 4
    for value in values:
        assert set(value) == {"answer", "unit", "sure"}
        assert 0 <= value["answer"] <= 99
        assert value["unit"] in ("pens", "böxes")
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    streamed = chunks(client.post("/v1/chat/completions", json={**body, "n": 1, "stream": True}))
    text = "".join(choice["delta"].get("content") or "" for chunk in streamed for choice in chunk["choices"])
    assert json.loads(text) == values[0]
    some = {**GREEDY, "model": "a", "max_tokens": 40, "response_format": {"type": "json_object"}}
    assert client.post("/v1/chat/completions", json=some).json()["choices"][0]["message"]["content"].startswith("{")
    assert client.post("/v1/chat/completions", json={**GREEDY, "model": "a"}).json()["choices"] == free


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"type": "grammar"}, "response_format"),
        ({"type": "text", "schema": {}}, "response_format"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        (schema({"type": "nothing"}), "response_format"),
        (schema({"$ref": "http://evil.example/x"}), "response_format"),
        (schema({"dependentSchemas": {}}), "response_format"),
        (schema({"type": "string", "pattern": "("}), "response_format"),
    ],
)
def test_what_cannot_be_held_to_is_refused(client, change, param):
    body = {**GREEDY, "model": "a", "response_format": change}
    refused(client.post("/v1/chat/completions", json=body), 400, "invalid_value", param)
