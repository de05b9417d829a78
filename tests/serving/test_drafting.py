"""Pairs whose drafts are grafted, or written by an adapter that a router chooses: served answers are those of `ask`."""

import threading
import time

import pytest

from mlx_rsgwm.cli.serve import _pairs
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.data.synthetic import generate
from mlx_rsgwm.data.template import TEMPLATES
from mlx_rsgwm.inference.draft import CHAINS
from mlx_rsgwm.inference.grafting import Chain, grafted_drafts, grafted_layer
from mlx_rsgwm.inference.open import open_pipeline
from mlx_rsgwm.inference.routed import ROUTER_FILE
from mlx_rsgwm.inference.routing import fit_router
from mlx_rsgwm.inference.sampling import uniforms
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.serving.admission import Limits
from mlx_rsgwm.serving.engine import Engine
from mlx_rsgwm.serving.library import Library, Pair
from mlx_rsgwm.serving.row_sampling import RowSampling
from mlx_rsgwm.serving.rows import Row, RowDecoder
from tests.serving.conftest import until_idle
from tests.serving.test_verified import FULL, LENGTH, QUESTIONS, SECONDS, SETTINGS, ask, check_same

TASKS = ("change", "groups", "prices")


@pytest.fixture
def pair(tmp_path, make_adapter):
    """Folders of a drafter and a verifier, and a pool of three adapters with a router."""
    folders = [make_adapter(seed).save(tmp_path / name) for seed, name in ((1, "drafter"), (2, "verifier"))]
    for seed, name in enumerate(TASKS, 3):
        make_adapter(seed).save(tmp_path / "pool" / name)
    return [*folders, tmp_path / "pool"]


@pytest.fixture
def start(tiny_base, pair, client_of):
    """Starts a server of pairs: ``start(name=Pair's settings, …)``."""

    def make(limits=None, **pairs):
        def open_library():
            library = Library(load_base(str(tiny_base), dtype="float32"))
            for name, settings in pairs.items():
                library.add_pair(name, Pair(pair[0], [pair[1]], **settings))
            return library

        engine = Engine(open_library, Limits(**(limits or {})))
        engine.start().result(SECONDS)
        return client_of(engine), engine

    return make


def steps(pair, question, **settings):
    """What `rsgwm ask` does."""
    options = {**SETTINGS, "seed": 5, "max_tokens": LENGTH, **settings}
    return [*open_pipeline(pair[0], [pair[1]], **options).steps(question)]


def test_grafted_and_mixed_drafts_are_those_of_ask(start, pair):
    client, _ = start(grafted={"drafts": "grafted"}, mixed={"drafts": "mixed", "layer": 0})
    for model, settings in (
        ("grafted", {"attempts": 8, "drafts": "grafted"}),
        ("mixed", {"attempts": 2, "drafts": "mixed", "layer": 0}),
    ):
        expected = steps(pair, QUESTIONS[0], threshold=1.0, **settings)
        assert expected[-1].attempts == (8 if model == "grafted" else 10)
        for mode in ("parallel", "sequential"):
            verify = {**FULL, "attempts": settings["attempts"], "threshold": 1.0, "mode": mode}
            told = ask(client, QUESTIONS[0], model, verify=verify).json()
            check_same(told, expected)
            drafts = told["verification"]["choices"][0]["drafts"]
            assert [draft["kind"] for draft in drafts if "kind" in draft] == list(CHAINS)
    refused = ask(client, QUESTIONS[0], "grafted", status=400, verify={"attempts": 9}).json()["error"]
    assert refused["code"] == "invalid_value"
    assert client.get("/v1/models/mixed").json()["x_rsgwm"]["drafts"] == "mixed"


def test_chains_among_others_are_the_same_even_after_a_step_that_failed(start, pair, monkeypatch):
    client, engine = start({"rows": 12, "queue": 100}, grafted={"drafts": "grafted"}, pair={})
    verify = {**FULL, "attempts": 8, "threshold": 1.0}
    expected = {text: steps(pair, text, attempts=8, threshold=1.0, drafts="grafted") for text in QUESTIONS[:3]}
    alone = steps(pair, QUESTIONS[3])
    read_last, all_asked, failed, failures = RowDecoder.read_last, [], [], []

    def failing(decoder):
        # A step of one request alone would be that request's own failure: wait for one that several share.
        if not failed and len({row.owner for row in decoder.rows}) > 1:
            failed.append(len(decoder.rows))
            raise RuntimeError("a step failed")
        read_last(decoder)
        until = time.monotonic() + SECONDS
        while not all_asked and time.monotonic() < until:
            load = engine.load()
            if load["waiting"] + load["running"] == len(threads):
                all_asked.append(load)
            time.sleep(0.001)

    monkeypatch.setattr(RowDecoder, "read_last", failing)

    def client_of(model, question, verify, steps_of):
        try:
            check_same(ask(client, question, model, verify=verify).json(), steps_of)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=client_of, args=("grafted", text, verify, expected[text])) for text in expected]
    threads.append(threading.Thread(target=client_of, args=("pair", QUESTIONS[3], FULL, alone)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert failures == []
    assert len(failed) == 1
    until_idle(engine)


@pytest.mark.parametrize("piece", [1, 3, 100])
def test_chains_are_read_in_pieces(base, make_adapter, piece):
    slots = AdapterSlots(base)
    slots.load("a", make_adapter(1))
    decoder = RowDecoder(slots)
    place = grafted_layer(slots.model, None)
    for prompt in ((7,), (5, 6, 90, 91), tuple(range(20, 31))):
        rows = [
            Row(prompt, "a", RowSampling(0.0), uniforms(0, "", 1, 6), frozenset({0}), chain=Chain(kind, place, 3))
            for kind in CHAINS
        ]
        (reading,) = decoder.read(rows)
        while not reading.read_on(piece):
            assert reading.size[1] > 0
        written = {row: [] for row in rows}
        for _ in range(6):
            for row, pick in decoder.draw():
                row.tokens.append(pick.token)
                written[row].append(pick.token)
            decoder.read_last()
        decoder.drop(rows)
        with slots.using("a"):
            (drafts,) = grafted_drafts(base.model, split_head(base.model), frozenset(), [prompt], CHAINS, None, 6, 3)
        assert [written[row] for row in rows] == [list(draft.tokens) for draft in drafts]
        assert decoder.prefixes.nbytes == 0


def test_a_router_chooses_what_drafts(start, pair, base):
    questions = {task: [each.question for each in generate(task, 16, 3, "train")] for task in TASKS}
    fit_router(base, TEMPLATES["plain"], questions, margin=0.2).save(pair[2] / ROUTER_FILE)
    client, engine = start(routed={"router": pair[2]})
    pipeline = open_pipeline(
        pair[0], [pair[1]], router=pair[2], seed=5, max_tokens=LENGTH, **{**SETTINGS, "threshold": 0.0055}
    )
    asked = [generate(task, 2, 3, "test")[1].question for task in TASKS] + QUESTIONS[:2]
    names = pipeline.drafters_of(asked)
    assert {"drafter", *TASKS} >= set(names)
    assert len(set(names)) > 2  # or the router chooses nothing
    verify = {**FULL, "threshold": 0.0055}
    for question, name in zip(asked, names, strict=True):
        told = ask(client, question, "routed", verify=verify).json()
        check_same(told, [*pipeline.steps(question)])
        assert told["verification"]["drafter"]["name"] == name
    details = client.get("/v1/models/routed").json()["x_rsgwm"]
    assert {each["name"] for each in details["router"]["drafters"]} == {"drafter", *TASKS}
    refused = ask(client, "x" * 600, "routed", status=400).json()["error"]
    assert refused["code"] == "context_length_exceeded"
    slots = engine.library.slots
    assert len(slots.names()) == 5
    engine.call(lambda library: library.remove("routed")).result(SECONDS)
    assert slots.names() == []


def test_a_pair_on_the_command_line(tmp_path):
    drafter, verifier = (str(tmp_path / name) for name in ("d", "v"))
    given = f"a={drafter}+{verifier}+{verifier},drafts=mixed,layer=3,router={tmp_path},combine=mean,check=none"
    assert _pairs((given, f"b={drafter}+{verifier}")) == {
        "a": Pair(tmp_path / "d", [tmp_path / "v"] * 2, tmp_path, "mixed", 3, "mean", "none"),
        "b": Pair(tmp_path / "d", [tmp_path / "v"]),
    }
    for wrong, message in (
        (f"a={drafter}", "NAME=DRAFTER"),
        (f"a={drafter}+", "NAME=DRAFTER"),
        (f"a={drafter}+{verifier},draft=mixed", "drafts is"),
        (f"a={drafter}+{verifier},layer=x", "layer: 'x' is not a whole number"),
        (f"a={drafter}+{verifier},drafts=mixd", "mixed"),
        (f"a={drafter}+{verifier},layer=1,layer=2", "given twice"),
    ):
        with pytest.raises(RsgwmError, match=message):
            _pairs((wrong,))
