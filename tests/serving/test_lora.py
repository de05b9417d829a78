"""Adapters that a request scales and adds: a row of a sum says what one adapter that holds the sum says."""

import json
import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.models.adapter import Adapter, LoraSpec
from mlx_rsgwm.serving.completion import Completion, Writing
from mlx_rsgwm.serving.errors import ModelNotFound
from mlx_rsgwm.serving.row_sampling import RowSampling
from tests.serving.conftest import SECONDS, Told, encoded, evaluated, until_idle
from tests.serving.test_app import GREEDY, chunks, refused

MODELS = {"a": 1, "b": 2, "c": 3}
SUMS = [
    ("a", [("a", 0.5), ("b", 1.5)], {1: 0.5, 2: 1.5}),
    ("a", [("c", -1.0)], {1: 1.0, 3: -1.0}),
    ("b", [("b", 2.0)], {2: 2.0}),
    ("c", [("a", 1.0), ("b", 1.0), ("c", 1.0)], {1: 1.0, 2: 1.0, 3: 1.0}),
]


def listed(parts):
    return [{"id": name, "scale": scale} for name, scale in parts]


@pytest.fixture
def sum_of(make_adapter):
    """One adapter that holds a sum, by the seeds of its parts: their factors side by side."""

    def make(weights):
        parts = {seed: make_adapter(seed) for seed in weights}
        first = next(iter(parts.values()))
        arrays = {}
        for module in first.modules():
            left = [np.array(part.weights[f"{module}.lora_a"], np.float64) for part in parts.values()]
            right = [
                weights[seed] * part.spec.scale * np.array(part.weights[f"{module}.lora_b"], np.float64)
                for seed, part in parts.items()
            ]
            arrays[f"{module}.lora_a"] = mx.array(np.concatenate(left, axis=1).astype(np.float32))
            arrays[f"{module}.lora_b"] = mx.array(np.concatenate(right, axis=0).astype(np.float32))
        rank = sum(part.spec.rank for part in parts.values())
        spec = LoraSpec(rank, 1.0, 0.0, first.spec.keys, first.spec.num_layers)
        return evaluated(Adapter(spec, arrays, manifest=first.manifest))

    return make


def add(engine, name, adapter):
    engine.call(lambda library: library.add_adapter(name, adapter, adapter.content_hash())).result(SECONDS)


def answer(client, model, **more):
    body = {**GREEDY, "model": model, "max_tokens": 16, "logprobs": True, "top_logprobs": 3, **more}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    values = [top["logprob"] for token in choice["logprobs"]["content"] for top in token["top_logprobs"]]
    return choice["message"]["content"], values


def test_a_sum_says_what_one_adapter_of_the_same_weights_says(start, sum_of):
    client, engine = start(MODELS, {"rows": 6, "queue": 200})
    texts, expected = set(), {}
    for place, (model, parts, weights) in enumerate(SUMS):
        add(engine, f"sum{place}", sum_of(weights))
        expected[place] = answer(client, f"sum{place}")
        text, values = answer(client, model, lora=listed(parts))
        assert text == expected[place][0]
        assert values == pytest.approx(expected[place][1], abs=1e-4)
        texts.add(text)
    alone = {name: answer(client, name)[0] for name in MODELS}
    assert len(texts | set(alone.values())) == len(SUMS) + len(MODELS)  # or a row through a wrong slot would not show
    wrong = []

    def ask(model, lora, right):
        for _ in range(3):
            text, values = answer(client, model, **lora)
            if text != right[0] or values != pytest.approx(right[1], abs=1e-4):
                wrong.append((model, lora))

    wanted = [(model, {"lora": listed(parts)}, expected[place]) for place, (model, parts, _) in enumerate(SUMS)]
    wanted += [(name, {}, answer(client, name)) for name in MODELS]
    threads = [threading.Thread(target=ask, args=each) for each in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert wrong == []
    until_idle(engine)
    assert engine.call(lambda library: library.slots.sums()).result(SECONDS) == []  # nothing is left of any


def test_what_a_sum_comes_down_to(start, client):
    base = client.get("/v1/models").json()["data"][0]["id"]
    bare, plain, other = (answer(client, name) for name in (base, "a", "b"))
    assert answer(client, base, lora=listed([("a", 1)])) != bare
    assert answer(client, "a", lora=[]) == plain
    assert answer(client, "a", lora=listed([("a", 1), ("b", 0)])) == plain
    assert answer(client, "a", lora=listed([(f"{base}:a", 1)])) == plain
    assert answer(client, "a", lora=listed([("a", 0), ("b", 1)])) == other  # their templates are the same
    template = client.post("/tokenize", json={"model": "a", "messages": GREEDY["messages"]}).json()["tokens"]
    body = {"prompt": template, "max_tokens": 16, "temperature": 0}
    none = client.post("/v1/completions", json={**body, "model": "a", "lora": listed([("a", 0)])}).json()
    assert none["choices"] == client.post("/v1/completions", json={**body, "model": base}).json()["choices"]


def test_two_names_of_one_adapter_add_up(start, make_adapter):
    client, _ = start({"a": 1, "again": 1, "b": 2})
    twice = answer(client, "b", lora=listed([("a", 0.5), ("again", 0.25)]))
    assert twice == answer(client, "b", lora=listed([("a", 0.75)]))


def test_sums_of_choices_prompts_and_streams(client):
    lora = listed([("b", 0.5)])
    whole = answer(client, "a", lora=lora)[0]
    body = {**GREEDY, "model": "a", "max_tokens": 16, "lora": lora, "stream": True}
    parts = chunks(client.post("/v1/chat/completions", json=body))
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts).strip() == whole
    body = {"model": "a", "prompt": ["One?", "Two?"], "max_tokens": 8, "temperature": 0, "lora": lora, "n": 2}
    texts = [choice["text"] for choice in client.post("/v1/completions", json=body).json()["choices"]]
    assert (texts[0], texts[2]) == (texts[1], texts[3])
    alone = client.post("/v1/completions", json={**body, "prompt": "Two?", "n": 1}).json()["choices"]
    assert alone[0]["text"] == texts[2]


def test_a_sum_ends_with_the_adapters_that_it_began_with(make_engine, make_adapter, ask):
    engine = make_engine(MODELS)
    endless = {"lora": [("b", 0.5)], "max_tokens": 300, "sampling": RowSampling(0, logit_bias={0: -100})}
    (expected,) = ask(engine, "a", "go on", **endless)[1].texts()
    told = ask(engine, "a", "go on", **endless)[1]
    assert told.first.wait(SECONDS)
    engine.call(lambda library: library.remove("b")).result(SECONDS)
    add(engine, "a", evaluated(make_adapter(9)))
    rows = engine.load()["rows"]
    assert (rows, told.texts()) == (1, [expected])  # it was still under way
    with pytest.raises(ModelNotFound):
        ask(engine, "a", "go on", **endless)
    until_idle(engine)
    slots = engine.call(lambda library: [*library.slots.names(), *library.slots.sums()]).result(SECONDS)
    assert len(slots) == 2  # the new a, and c


def test_an_adapter_that_leaves_before_its_turn_is_told(make_engine, ask, monkeypatch):
    engine = make_engine(MODELS)
    begun, go = threading.Event(), threading.Event()

    def hold(library):
        begun.set()
        go.wait(SECONDS)
        library.remove("b")

    model = engine.call(lambda library: library.with_added(library.find("a"), [("b", 0.5)])).result(SECONDS)
    engine.call(hold)
    assert begun.wait(SECONDS)
    told = Told()
    engine.submit(Completion(model, encoded("x"), Writing(), told))
    go.set()
    with pytest.raises(ModelNotFound, match="'b' does not exist"):
        told.texts()


@pytest.mark.parametrize(
    ("lora", "status", "code"),
    [
        ([{"id": "nobody", "scale": 1}], 404, "model_not_found"),
        ([{"id": "other-base:b", "scale": 1}], 404, "model_not_found"),
        ([{"id": "BASE", "scale": 1}], 400, "invalid_value"),
        ([{"id": "b", "scale": 1}, {"id": "b", "scale": 2}], 400, "invalid_value"),
        ([{"id": "b", "scale": 1}, {"id": "BASE:b", "scale": 2}], 400, "invalid_value"),
        ([{"id": "b", "scale": "1"}], 400, "invalid_value"),
        ([{"id": "b", "scale": True}], 400, "invalid_value"),
        ([{"id": "b", "scale": None}], 400, "invalid_value"),
        ([{"id": "b", "scale": 101}], 400, "invalid_value"),
        ([{"id": "b", "scale": -1e300}], 400, "invalid_value"),
        ([{"id": 0, "scale": 1}], 400, "invalid_value"),
        ([{"id": "b"}], 400, "invalid_value"),
        ([{"id": "b", "scale": 1, "name": "x"}], 400, "invalid_value"),
        (["b"], 400, "invalid_value"),
        ({"b": 1}, 400, "invalid_value"),
    ],
)
def test_what_cannot_be_added_is_refused(client, lora, status, code):
    base = client.get("/v1/models").json()["data"][0]["id"]
    lora = json.loads(json.dumps(lora).replace("BASE", base))
    for path, asked in (("/v1/chat/completions", GREEDY), ("/v1/completions", {"prompt": "x"})):
        refused(client.post(path, json={**asked, "model": "a", "lora": lora}), status, code, "lora")


@pytest.mark.parametrize("scale", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_scales_that_are_no_numbers_are_refused(client, scale):
    body = '{"model": "a", "prompt": "x", "lora": [{"id": "b", "scale": SCALE}]}'.replace("SCALE", scale)
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    refused(response, 400, "invalid_value", "lora")


def test_a_dora_is_served_as_it_is_and_not_added(start, make_adapter):
    client, engine = start(MODELS)
    plain = make_adapter(4)
    weights = dict(plain.weights)
    for module in plain.modules():
        weights[f"{module}.m"] = mx.full((weights[f"{module}.lora_b"].shape[1],), 0.5)
    dora = Adapter(replace(plain.spec, fine_tune_type="dora"), weights, manifest=plain.manifest)
    add(engine, "dora", evaluated(dora))
    as_it_is = answer(client, "dora")
    assert answer(client, "a", lora=listed([("a", 0), ("dora", 1)])) == as_it_is
    for model, parts in (("dora", [("a", 1)]), ("a", [("dora", 0.5)]), ("dora", [("dora", 2)])):
        response = client.post("/v1/chat/completions", json={**GREEDY, "model": model, "lora": listed(parts)})
        assert "'dora' is a DoRA" in refused(response, 400, "unsupported_parameter", "lora")
