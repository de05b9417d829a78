"""Rows of many adapters side by side say what each says alone, come and go, and fail by themselves."""

import subprocess
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.inference.generate import DraftRequest, draft
from mlx_rsgwm.inference.sampling import Sampling
from mlx_rsgwm.models.slots import AdapterSlots
from mlx_rsgwm.models.split import split_head
from mlx_rsgwm.serving.completion import Completion, Writing
from mlx_rsgwm.serving.errors import ContextTooLong, ModelNotFound, ServerBusy, ServerStopping
from mlx_rsgwm.serving.events import Begun, Ended, Failed
from mlx_rsgwm.serving.row_sampling import RowSampling
from tests.serving.conftest import Told, encoded, evaluated, until_idle

ADAPTERS = {"a": 1, "b": 2, "c": 3, "d": 4}
PROMPTS = ["What is 2 + 2?", "Name a number.", "A much longer question, with several more words in it, is here?"]
SECONDS = 60


def slowly(base, adapter, prompt, count):
    """Greedy text of one adapter: no cache, no batch, float64 argmax, the whole text anew for every token."""
    slots = AdapterSlots(base)
    if adapter is not None:
        slots.load("x", adapter)
        slots.use("x")
    ids, written = list(base.tokenizer.encode(prompt)), []
    for _ in range(count):
        token = int(np.array(slots.model(mx.array([ids]))[0, -1]).astype(np.float64).argmax())
        if token in base.tokenizer.eos_token_ids:
            break
        ids.append(token)
        written.append(token)
    return base.tokenizer.decode(written)


@pytest.fixture
def alone(base, make_adapter):
    """The slow texts of every adapter and the base, by name and prompt."""
    adapters = {name: make_adapter(seed) for name, seed in ADAPTERS.items()} | {None: None}
    return {(name, text): slowly(base, adapter, text, 24) for name, adapter in adapters.items() for text in PROMPTS}


def base_name(engine):
    return engine.call(lambda library: library.base.name).result(SECONDS)


def test_rows_of_many_adapters_say_what_each_says_alone(make_engine, ask, alone):
    assert len(set(alone.values())) == len(alone)  # the adapters differ, so a row through the wrong one shows
    engine = make_engine(ADAPTERS)
    bare = base_name(engine)
    for (name, text), expected in alone.items():
        assert ask(engine, name or bare, text)[1].texts() == [expected]
    told = {(name, text): ask(engine, name or bare, text)[1] for text in PROMPTS for name in (*ADAPTERS, None)}
    assert {key: events.texts()[0] for key, events in told.items()} == alone
    assert engine.counts.steps < 24 * len(alone) + 24 * 3  # they were written side by side
    until_idle(engine)


def test_nothing_changes_under_concurrent_requests_replacement_and_unload(make_engine, make_adapter, ask, alone):
    engine = make_engine(ADAPTERS, rows=6, queue=200)
    other, first = evaluated(make_adapter(99)), evaluated(make_adapter(ADAPTERS["d"]))
    wrong, told = [], []

    def client(name):
        for text in PROMPTS * 3:
            if ask(engine, name, text)[1].texts() != [alone[name, text]]:
                wrong.append((name, text))

    threads = [threading.Thread(target=client, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for _ in range(5):
        told += [(ask(engine, "d", text)[1], alone["d", text]) for text in PROMPTS]
        engine.call(lambda library: library.add_adapter("d", other, other.content_hash())).result(SECONDS)
        replaced = ask(engine, "d", PROMPTS[0])[1].texts()
        assert replaced != [alone["d", PROMPTS[0]]]
        engine.call(lambda library: library.remove("d")).result(SECONDS)
        with pytest.raises(ModelNotFound):
            ask(engine, "d", PROMPTS[0])
        engine.call(lambda library: library.add_adapter("d", first, first.content_hash())).result(SECONDS)
    for thread in threads:
        thread.join(SECONDS)
    assert wrong == []
    for events, expected in told:  # handed in before the adapter was replaced: answered by the former
        assert events.texts() == [expected]
    assert len(engine.call(lambda library: library.slots.names()).result(SECONDS)) == len(ADAPTERS)


def test_seeded_rows_draw_what_drafts_draw_however_they_are_batched(make_engine, make_adapter, ask, base):
    slots = AdapterSlots(base)
    slots.load("x", make_adapter(ADAPTERS["a"]))
    slots.use("x")
    sampling = Sampling(max_tokens=20, seed=5)
    requests = [DraftRequest(tuple(base.tokenizer.encode(text)), text, k) for text in PROMPTS for k in (1, 2, 3)]
    drafts = draft(slots.model, split_head(slots.model), frozenset({0}), requests, sampling)
    expected = [base.tokenizer.decode(list(item.tokens)) for item in drafts]
    engine = make_engine(ADAPTERS)
    options = {"n": 3, "seed": 5, "max_tokens": 20, "sampling": RowSampling(temperature=0.7, top_p=0.9)}
    beside = [ask(engine, name, "beside")[1] for name in ADAPTERS]
    told = [ask(engine, "a", text, **options)[1] for text in PROMPTS]
    assert [text for events in told for text in events.texts()] == expected
    assert all(len(events.texts()) == 1 for events in beside)


def test_a_cancelled_request_frees_its_rows(make_engine, ask):
    engine = make_engine(ADAPTERS, rows=4)
    endless = RowSampling(temperature=0, logit_bias={0: -100})
    jobs = [ask(engine, "a", "go on", sampling=endless, max_tokens=400) for _ in range(4)]
    for _, told in jobs:  # all are in: "b", asked with them, would take its turn before the last of "a"
        assert told.first.wait(SECONDS)
    waiting, begun = ask(engine, "b", "later", sampling=endless, max_tokens=400)
    begun.events.append(begun.queue.get(timeout=SECONDS))
    assert engine.load() == {"waiting": 1, "running": 4, "rows": 4}
    for job, _ in (*jobs[1:], (waiting, None)):
        engine.cancel(job)
    assert ask(engine, "c", "Name a number.", max_tokens=3)[1].texts()
    engine.cancel(jobs[0][0])
    until_idle(engine)
    assert engine.counts.cancelled == 5


def test_a_request_cancelled_while_its_prompt_is_read_never_writes(make_engine, ask):
    engine = make_engine({"a": 1})
    engine._positions = 16  # a long prompt takes many pieces
    job, told = ask(engine, "a", "word " * 80, max_tokens=5)
    engine.cancel(job)
    assert ask(engine, "a", "short", max_tokens=3)[1].texts()
    assert not told.first.is_set()


def raising(where, error):
    """A function in the place of ``where`` that raises."""

    def fail(*_arguments, **_options):
        raise error

    return fail


def test_a_request_whose_step_raises_fails_alone(make_engine, ask, alone, monkeypatch):
    engine = make_engine(ADAPTERS)
    slot = engine.call(lambda library: library.find("b").slot).result(SECONDS)
    running = ask(engine, "a", PROMPTS[0])[1], ask(engine, "c", PROMPTS[1])[1]
    layer = engine.call(lambda library: library.slots.model.model.layers[1].self_attn.q_proj).result(SECONDS)
    apply = type(layer)._apply

    def failing(self, x, y, update):
        if x.shape[-2] == 1 and update is layer._factors[slot][0]:  # while tokens are written, not in the prompt
            raise RuntimeError("no product")
        return apply(self, x, y, update)

    monkeypatch.setattr(type(layer), "_apply", failing)
    broken = ask(engine, "b", PROMPTS[0])[1]
    beside = ask(engine, "d", PROMPTS[2])[1]
    events = broken.wait()
    assert isinstance(events[-1], Failed)
    assert str(events[-1].error) == "no product"
    assert running[0].texts() == [alone["a", PROMPTS[0]]]
    assert running[1].texts() == [alone["c", PROMPTS[1]]]
    assert beside.texts() == [alone["d", PROMPTS[2]]]
    assert ask(engine, "a", PROMPTS[1])[1].texts() == [alone["a", PROMPTS[1]]]


def test_a_request_whose_settings_raise_fails_alone(make_engine, ask, alone):
    engine = make_engine(ADAPTERS)
    impossible = RowSampling(temperature=0, logit_bias={-400: 1.0})  # the API lets none through
    told = [ask(engine, "a", PROMPTS[0])[1], ask(engine, "b", PROMPTS[0], sampling=impossible)[1]]
    assert isinstance(told[1].wait()[-1].error, IndexError)
    assert told[0].texts() == [alone["a", PROMPTS[0]]]
    with pytest.raises(ZeroDivisionError):
        ask(engine, "a", "", prompt=lambda *_: 1 // 0)[1].texts()


def test_a_tick_that_raises_fails_what_is_under_way_and_the_engine_goes_on(make_engine, ask, monkeypatch):
    engine = make_engine(ADAPTERS)
    endless = RowSampling(temperature=0, logit_bias={0: -100})
    told = ask(engine, "a", "go on", sampling=endless, max_tokens=400)[1]
    assert told.first.wait(SECONDS)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_admit", raising("_admit", RuntimeError("no tick")))
        assert str(told.wait()[-1].error) == "no tick"
    assert ask(engine, "a", "again", max_tokens=3)[1].texts()
    assert engine.healthy


def test_what_is_too_much_is_refused(make_engine, ask):
    engine = make_engine({"a": 1}, rows=1, queue=2)
    with pytest.raises(ContextTooLong, match="beyond the context of 512"):
        ask(engine, "a", "x" * 500)[1].texts()
    with pytest.raises(ModelNotFound, match="there are:"):
        ask(engine, "A", "exact")
    endless = RowSampling(temperature=0, logit_bias={0: -100})
    running = ask(engine, "a", "go on", sampling=endless, max_tokens=400)
    assert running[1].first.wait(SECONDS)
    waiting = [ask(engine, "a", "wait") for _ in range(2)]
    with pytest.raises(ServerBusy):
        ask(engine, "a", "no place")
    engine.cancel(running[0])
    assert all(told.texts() for _, told in waiting)


def test_models_take_turns(make_engine, ask):
    engine = make_engine({"a": 1, "b": 2}, rows=1)
    order = []
    jobs = [ask(engine, name, f"{name} {number}", max_tokens=8) for name in ("a", "b") for number in range(3)]
    for job, _ in jobs:
        tell = job.tell
        job.tell = lambda event, job=job, tell=tell: (order.append(job.model.name), tell(event))[1]
    for _, told in jobs:
        told.texts()
    ends = [name for index, name in enumerate(order) if index == 0 or name != order[index - 1]]
    assert len(ends) > 3  # not all of a and then all of b


def test_cache_bytes_bound_what_comes_in(make_engine, ask):
    engine = make_engine({"a": 1})
    a_token = engine._decoder.bytes_a_token
    assert a_token == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, size of a head, float32
    narrow = make_engine({"a": 1}, cache_bytes=a_token * 100)
    endless = RowSampling(temperature=0, logit_bias={0: -100})
    told = [ask(narrow, "a", "x" * 20, sampling=endless, max_tokens=60)[1] for _ in range(3)]
    assert told[0].first.wait(SECONDS)
    assert narrow.load()["rows"] == 1
    assert [len(events.wait()) > 3 for events in told] == [True] * 3
    assert ask(narrow, "a", "x" * 20, sampling=endless, max_tokens=300)[1].texts()  # more than there is, but alone


def test_stopping_ends_what_is_under_way_and_takes_nothing_new(make_engine, ask):
    engine = make_engine({"a": 1})
    told = ask(engine, "a", "soon done", max_tokens=5)[1]
    engine.stop(drain=SECONDS)
    assert told.texts()
    assert not engine.ready
    with pytest.raises(ServerStopping):
        engine.call(lambda library: None)
    cut = make_engine({"a": 1})
    endless = RowSampling(temperature=0, logit_bias={0: -100})
    told = ask(cut, "a", "go on", sampling=endless, max_tokens=490)[1]
    assert told.first.wait(SECONDS)
    cut.stop()
    assert isinstance(told.wait()[-1].error, ServerStopping)


def test_what_loading_raises_is_told(make_engine):
    from mlx_rsgwm.serving.engine import Engine

    engine = Engine(raising("open", RsgwmError("no base")))
    with pytest.raises(RsgwmError, match="no base"):
        engine.start().result(SECONDS)
    assert not engine.ready


def test_ends_stops_and_counts_are_told(make_engine, ask, alone):
    engine = make_engine(ADAPTERS)
    text = alone["a", PROMPTS[0]]
    stop = text[5:8]
    events = ask(engine, "a", PROMPTS[0], stop=(stop,))[1]
    assert events.texts() == [text[: text.index(stop)]]
    assert isinstance(events.events[0], Begun)
    assert [event.reason for event in events.events if isinstance(event, Ended)] == ["stop"]
    cut = ask(engine, "a", PROMPTS[0], max_tokens=2)[1]
    cut.wait()
    assert [(event.reason, event.tokens) for event in cut.events if isinstance(event, Ended)] == [("length", 2)]


def test_a_burst_at_an_idle_engine_fills_its_rows_and_its_queue(make_engine):
    engine = make_engine({"a": 1}, rows=4, queue=2)
    model, held, go_on = engine.library.find("a"), threading.Event(), threading.Event()
    engine.call(lambda library: (held.set(), go_on.wait(SECONDS)))
    assert held.wait(SECONDS)  # the engine takes nothing in meanwhile

    def submit(number):
        told = Told()
        writing = Writing(sampling=RowSampling(temperature=0), max_tokens=2)
        engine.submit(Completion(model, encoded(f"question {number}"), writing, told))
        return told

    asked = [submit(number) for number in range(6)]
    with pytest.raises(ServerBusy):
        submit(6)
    go_on.set()
    assert all(told.texts() for told in asked)
    until_idle(engine)


def test_requests_that_come_together_are_read_together(make_engine, ask, monkeypatch):
    monkeypatch.setattr("mlx_rsgwm.serving.engine.GATHER_SECONDS", 2.0)
    monkeypatch.setattr("mlx_rsgwm.serving.engine.MOST_GATHERED", 2.0)
    engine = make_engine(ADAPTERS)
    told = [ask(engine, name, PROMPTS[0])[1] for name in ("a", "b", "c")]
    longest = max(sum(event.tokens for event in each.wait() if isinstance(event, Ended)) for each in told)
    assert engine.counts.steps <= longest + 1  # no step was made with the first alone
    until_idle(engine)


def test_the_thread_of_an_engine_leaves_no_stream(make_engine, monkeypatch):
    """By chance a process is aborted for those that it leaves: the test below may pass without."""
    cleared = []
    monkeypatch.setattr(mx, "clear_streams", lambda: cleared.append(threading.current_thread().name))
    engine = make_engine({"a": 1})
    assert cleared == []
    engine.stop()
    assert cleared == ["engine"]


ENDING = """
import sys
from mlx_rsgwm.serving.engine import Engine
from mlx_rsgwm.serving.opening import Served, open_library

for _ in range(3):
    engine = Engine(lambda: open_library(Served(sys.argv[1])))
    engine.start().result()
    engine.stop()
"""


def test_a_process_whose_engine_was_stopped_ends_well(tiny_base):
    """By chance it was aborted, about every second time."""
    command = [sys.executable, "-c", ENDING, str(tiny_base)]
    assert [subprocess.run(command, timeout=SECONDS).returncode for _ in range(2)] == [0] * 2
