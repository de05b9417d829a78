"""Every endpoint through the application: what is honoured, what is refused and how it is said."""

import asyncio
import gzip
import json
from urllib.parse import unquote

import pytest

from mlx_rsgwm.serving.guard import Guard
from mlx_rsgwm.serving.settings import ServerSettings
from tests.serving.conftest import until_idle

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
GREEDY = {"messages": QUESTION, "temperature": 0, "max_tokens": 8}
SCHEMA = "response_format.json_schema"


def refused(response, status, code, param=None):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    return error["message"]


def chunks(response):
    """The chunks of a stream, which ends as OpenAI's do."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_chat_is_answered_whole_and_in_parts(client):
    answer = client.post("/v1/chat/completions", json={**GREEDY, "model": "a"}).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "a"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert (choice["finish_reason"], choice["logprobs"], choice["message"]["refusal"]) == ("length", None, None)
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 8

    streamed = client.post(
        "/v1/chat/completions", json={**GREEDY, "model": "a", "stream": True, "stream_options": {"include_usage": True}}
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    first, *parts, last, usage = chunks(streamed)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == choice["message"]["content"]
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert (usage["choices"], usage["usage"]) == ([], answer["usage"])
    assert {part["usage"] for part in (first, *parts, last)} == {None}
    assert len({part["id"] for part in (first, *parts, last, usage)}) == 1


def test_each_model_answers_for_itself_and_by_its_full_name(client):
    base = client.get("/v1/models").json()["data"][0]["id"]

    def said(model):
        return client.post("/v1/chat/completions", json={**GREEDY, "model": model}).json()["choices"][0]["message"]

    texts = [said(model)["content"] for model in (base, "a", "b")]
    assert len(set(texts)) == 3
    assert said(f"{base}:a")["content"] == texts[1]


def test_choices_seeds_and_streams_of_several(client):
    body = {"model": "a", "messages": QUESTION, "max_tokens": 6, "n": 3, "seed": 7}
    whole = client.post("/v1/chat/completions", json=body).json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    again = client.post("/v1/chat/completions", json={**body, "stream": True})
    parts = ["", "", ""]
    for chunk in chunks(again):
        for choice in chunk["choices"]:
            parts[choice["index"]] += choice["delta"].get("content") or ""
    assert parts == texts
    assert client.post("/v1/chat/completions", json={**body, "seed": 8}).json()["choices"] != whole["choices"]


def test_no_share_of_the_mass_is_the_likeliest_token(client):
    body = {"model": "a", "messages": QUESTION, "max_tokens": 8}
    likeliest = client.post("/v1/chat/completions", json={**body, "temperature": 0}).json()["choices"]
    assert (
        client.post("/v1/chat/completions", json={**body, "temperature": 2, "top_p": 0}).json()["choices"] == likeliest
    )


def test_completions_take_texts_and_ids(client):
    ids = client.post("/tokenize", json={"model": "a", "prompt": "Name a number."}).json()["tokens"]
    body = {"model": "a", "temperature": 0, "max_tokens": 6}
    texts = [
        choice["text"]
        for prompt in ("Name a number.", ["Name a number.", "And"], ids, [ids, ids])
        for choice in client.post("/v1/completions", json={**body, "prompt": prompt}).json()["choices"]
    ]
    assert len(texts) == 6
    assert {texts[0], texts[1], texts[3], texts[4], texts[5]} == {texts[0]}
    streamed = chunks(client.post("/v1/completions", json={**body, "prompt": "Name a number.", "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == texts[0]
    told = client.post("/v1/completions", json={**body, "prompt": ids, "logprobs": 2}).json()["choices"][0]["logprobs"]
    assert [len(told[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [6] * 4
    assert all(
        value == max(top.values()) for value, top in zip(told["token_logprobs"], told["top_logprobs"], strict=True)
    )


def test_log_probabilities_of_a_chat(client):
    body = {**GREEDY, "model": "a", "logprobs": True, "top_logprobs": 3}
    (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 8
    for token in content:
        assert len(token["top_logprobs"]) == 3
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0
    streamed = chunks(client.post("/v1/chat/completions", json={**body, "stream": True}))
    told = [chunk["choices"][0]["logprobs"] for chunk in streamed if chunk["choices"][0]["logprobs"]]
    assert [token for part in told for token in part["content"]] == content


def test_stop_texts_and_biases_are_honoured(client):
    plain = client.post("/v1/chat/completions", json={**GREEDY, "model": "b", "max_tokens": 20}).json()["choices"][0]
    text = plain["message"]["content"]
    stop = text[4:6]
    body = {**GREEDY, "model": "b", "max_tokens": 20, "stop": stop}
    cut = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert cut["message"]["content"] == text[: text.index(stop)].strip()
    assert cut["finish_reason"] == "stop"
    biased = client.post(
        "/v1/completions", json={"model": "a", "prompt": "x", "max_tokens": 3, "logit_bias": {"66": 100}}
    )
    letter = client.post("/detokenize", json={"model": "a", "tokens": [66]}).json()["prompt"]
    assert biased.json()["choices"][0]["text"] == letter * 3


def test_several_turns_and_system_messages_go_through_the_models_template(client, start):
    base = client.get("/v1/models").json()["data"][0]["id"]
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": [{"type": "text", "text": "Two"}, {"type": "text", "text": "?"}]},
    ]
    tokens = client.post("/tokenize", json={"model": base, "messages": turns}).json()
    text = client.post("/detokenize", json={"model": base, "tokens": tokens["tokens"]}).json()["prompt"]
    assert text == "system: Be brief.\nuser: One?\nassistant: 1\nuser: Two?\nassistant:"
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), 512)
    assert client.post("/v1/chat/completions", json={**GREEDY, "model": base, "messages": turns}).status_code == 200
    plain = client.post("/v1/chat/completions", json={**GREEDY, "model": "a", "messages": turns})
    assert "takes no system message" in refused(plain, 400, "unsupported_message", "messages")
    tokens = client.post("/tokenize", json={"model": "a", "messages": turns[1:]}).json()["tokens"]
    text = client.post("/detokenize", json={"model": "a", "tokens": tokens}).json()["prompt"]
    assert text == "Q: One?\nA: 1\nQ: Two?\nA:"


def test_models_are_described(client):
    listed = client.get("/v1/models").json()
    base, *adapters = listed["data"]
    assert [model["id"] for model in adapters] == ["a", "b"]
    assert (base["parent"], base["x_rsgwm"]["kind"]) == (None, "base")
    described = client.get("/v1/models/a").json()
    assert described == adapters[0]
    assert described["parent"] == base["id"]
    assert described["x_rsgwm"]["rank"] == 4
    assert len(described["x_rsgwm"]["sha256"]) == 64
    assert client.get(f"/v1/models/{base['id']}").json() == base  # with slashes in it
    refused(client.get("/v1/models/c"), 404, "model_not_found", "model")


IGNORED = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s",
           "prompt_cache_key": "k"}  # fmt: skip


def test_what_has_no_effect_is_accepted(client):
    plain = client.post("/v1/chat/completions", json={**GREEDY, "model": "a"}).json()["choices"]
    extra = {**IGNORED, "tools": None, "response_format": {"type": "text"}, "stream": False}
    assert client.post("/v1/chat/completions", json={**GREEDY, "model": "a", **extra}).json()["choices"] == plain


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"functions": []}, "unsupported_parameter", "functions"),
        ({"audio": {}}, "unsupported_parameter", "audio"),
        ({"adapters": "/somewhere"}, "unsupported_parameter", "adapters"),
        ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort"),
        ({"echo": True}, "unsupported_parameter", "echo"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"max_completion_tokens": 9}, "invalid_value", "max_tokens"),  # and max_tokens is another
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "missing_required_parameter",
            f"{SCHEMA}.schema",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": 1}}, "invalid_value", SCHEMA),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 1000}, "invalid_value", "n"),
        ({"n": True}, "invalid_value", "n"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"top_p": 1.1}, "invalid_value", "top_p"),
        ({"seed": 1.5}, "invalid_value", "seed"),
        ({"stop": [""]}, "invalid_value", "stop"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "invalid_value", "logit_bias"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "4"}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "invalid_value", "messages"),
        ({"messages": None}, "missing_required_parameter", "messages"),
        ({"model": None}, "missing_required_parameter", "model"),
        ({"max_tokens": 10_000}, "context_length_exceeded", "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "context_length_exceeded", "messages"),
    ],
)
def test_what_is_not_served_is_refused_by_name(client, change, code, param):
    refused(client.post("/v1/chat/completions", json={**GREEDY, "model": "a", **change}), 400, code, param)
    stream = {**GREEDY, "model": "a", "stream": True, **change}
    if "stream_options" not in change:
        refused(client.post("/v1/chat/completions", json=stream), 400, code, param)


def test_unknown_models_paths_and_methods(client):
    for name in ("A", "a ", "", "nobody", "x:a"):
        refused(client.post("/v1/chat/completions", json={**GREEDY, "model": name}), 404, "model_not_found", "model")
    refused(client.get("/v1/nothing"), 404, "not_found")
    response = client.get("/v1/chat/completions")
    refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'{"model": "a", "model": "b"}', b"\xff", b"[" * 20_000, b'"\\ud800"']
)
def test_bodies_that_are_no_json_objects_are_refused(client, body):
    response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_body_that_is_too_large_or_not_json_is_refused_before_it_is_read(client):
    refused(client.post("/v1/completions", content=b"x" * (9 << 20), headers={"content-type": "application/json"}),
            413, "body_too_large")  # fmt: skip

    def endless():
        for _ in range(10):
            yield b" " * (1 << 20)

    refused(client.post("/v1/completions", content=endless(), headers={"content-type": "application/json"}),
            413, "body_too_large")  # fmt: skip
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/json; charset=utf-16"):
        response = client.post("/v1/completions", content=b"{}", headers={"content-type": kind})
        refused(response, 415, "unsupported_media_type")
    zipped = {"content-type": "application/json", "content-encoding": "gzip"}
    refused(client.post("/v1/completions", content=gzip.compress(b"{}"), headers=zipped), 415, "unsupported_media_type")
    told = {"content-type": 'application/json; x-charset=latin-1; charset="UTF-8"', "content-encoding": ""}
    asked = json.dumps({"model": "a", "prompt": "x", "max_tokens": 1}).encode()
    assert client.post("/v1/completions", content=asked, headers=told).status_code == 200


def test_the_server_is_called_by_its_names_alone(start):
    client, _ = start(allowed_hosts=("mac.local",))
    for host in ("127.0.0.1:8080", "localhost:1", "[::1]:8080", "192.168.1.5", "mac.local", "MAC.local:80"):
        assert client.get("/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "a b", "mac.local@evil"):
        refused(client.get("/v1/models", headers={"host": host}), 403, "bad_host", "Host")


def test_keys_are_asked_for_everywhere_but_at_the_doors(start):
    client, _ = start(api_keys=("reader-key",), admin_keys=("admin-key",), host="0.0.0.0")
    for path in ("/health", "/ready"):
        assert client.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/health/", "//health", "/nothing"):
        response = client.request("GET", f"http://127.0.0.1:8080{path}")
        refused(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    asked = {**GREEDY, "model": "a"}
    for key in ("", "Bearer", "Bearer wrong", "Basic reader-key", "Bearer reader-key2", "Bearer reader-ke"):
        response = client.post("/v1/chat/completions", json=asked, headers={"authorization": key})
        refused(response, 401, "invalid_api_key")
    for key in ("reader-key", "admin-key"):
        response = client.post("/v1/chat/completions", json=asked, headers={"authorization": f"Bearer {key}"})
        assert response.status_code == 200
    body = {"lora_name": "c", "lora_path": "c"}
    for key, status in (("reader-key", 401), ("admin-key", 403)):
        headers = {"authorization": f"Bearer {key}"}
        assert client.post("/v1/load_lora_adapter", json=body, headers=headers).status_code == status
        assert client.delete("/v1/models/a", headers=headers).status_code == status


@pytest.mark.parametrize("raw", [b"/%68ealth", b"/v1/../health", b"/health%2f..", b"/health;/v1/models", b"/HEALTH"])
def test_only_the_path_as_it_was_sent_opens_a_door(raw):
    sent = []

    async def behind(scope, receive, send):
        sent.append("let through")

    async def send(message):
        sent.append(message)

    guard = Guard(behind, ServerSettings(api_keys=("reader-key",)))
    scope = {"type": "http", "method": "GET", "path": "/health", "raw_path": raw, "headers": [(b"host", b"localhost")]}
    asyncio.run(guard(scope, None, send))
    assert sent[0]["status"] == 401
    asyncio.run(guard({**scope, "raw_path": b"/health"}, None, send))
    assert sent[-1] == "let through"


@pytest.mark.parametrize(
    "raw", [b"/v1/load_lora_adapter", b"/v1/load%5Flora_adapter", b"/%76%31/unload_lora%5fadapter"]
)
@pytest.mark.parametrize("keys", [(), ("reader-key",)])
def test_an_encoded_path_loads_no_adapter_without_the_admins_key(raw, keys):
    sent = []

    async def behind(scope, receive, send):
        sent.append("let through")

    async def send(message):
        sent.append(message)

    guard = Guard(behind, ServerSettings(api_keys=keys, admin_keys=("admin-key",)))
    for key, outcome in ((b"reader-key", 401), (b"admin-key", "let through")):
        sent.clear()
        headers = [
            (b"host", b"localhost"), (b"content-type", b"application/json"), (b"authorization", b"Bearer " + key)
        ]  # fmt: skip
        scope = {"type": "http", "method": "POST", "path": unquote(raw.decode()), "raw_path": raw, "headers": headers}
        asyncio.run(guard(scope, None, send))
        assert (sent[0] if outcome == "let through" else sent[0]["status"]) == outcome


def test_pages_of_other_servers_ask_where_they_may(start):
    client, _ = start(cors_origins=("http://page.example",))
    headers = {"origin": "http://page.example", "access-control-request-method": "POST"}
    assert client.options("/v1/completions", headers=headers).headers["access-control-allow-origin"]
    other = client.options("/v1/completions", headers={**headers, "origin": "http://other.example"})
    assert "access-control-allow-origin" not in other.headers
    plain, _ = start()
    assert "access-control-allow-origin" not in plain.get("/health", headers=headers).headers


def test_health_and_metrics(start):
    client, engine = start()
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    client.post("/v1/chat/completions", json={**GREEDY, "model": "a"})
    client.post("/v1/chat/completions", json={**GREEDY, "model": "c"})
    text = client.get("/metrics").text
    assert 'rsgwm_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
    assert 'rsgwm_requests_total{path="/v1/chat/completions",status="404"} 1.0' in text
    assert "rsgwm_engine_written_tokens_total 8.0" in text
    assert "rsgwm_first_token_seconds_count 1.0" in text
    assert "rsgwm_models 3.0" in text
    engine.stop()
    assert client.get("/ready").status_code == 503
    response = client.post("/v1/chat/completions", json={**GREEDY, "model": "a"})
    refused(response, 503, "not_ready")
    assert response.headers["retry-after"]


def test_a_full_queue_and_a_long_answer_are_told(start):
    client, engine = start(limits={"rows": 1, "queue": 1}, timeout=0.3)
    endless = {"model": "a", "prompt": "x", "max_tokens": 490, "logit_bias": {"0": -100}}
    refused(client.post("/v1/completions", json=endless), 504, "timeout")
    engine.limits = type(engine.limits)(1, -1)  # as if another request had the row
    response = client.post("/v1/completions", json={**endless, "max_tokens": 3})
    refused(response, 429, "queue_full")
    assert response.headers["retry-after"] == "1"
    until_idle(engine)


def test_what_fails_in_the_engine_is_told_without_saying_how(start, monkeypatch):
    client, engine = start()
    monkeypatch.setattr(engine._decoder, "draw", lambda: 1 // 0)
    message = refused(client.post("/v1/chat/completions", json={**GREEDY, "model": "a"}), 500, "internal_error")
    assert "zero" not in message
    response = client.post("/v1/chat/completions", json={**GREEDY, "model": "a", "stream": True})
    assert response.status_code == 200
    assert (
        json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "internal_error"
    )
