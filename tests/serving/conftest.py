"""An engine on the tiny base, with adapters in its library, and requests that keep what they are told."""

import queue
import threading
import time
from contextlib import ExitStack

import mlx.core as mx
import pytest
from starlette.testclient import TestClient

from mlx_rsgwm.models.adapter_sources import load_adapter
from mlx_rsgwm.models.base import load_base
from mlx_rsgwm.serving.admission import Limits
from mlx_rsgwm.serving.app import make_app
from mlx_rsgwm.serving.completion import Completion, Writing
from mlx_rsgwm.serving.engine import Engine
from mlx_rsgwm.serving.events import Ended, Failed, Finished, Piece
from mlx_rsgwm.serving.library import Library, Pair
from mlx_rsgwm.serving.row_sampling import RowSampling
from mlx_rsgwm.serving.settings import ServerSettings

SECONDS = 60
GREEDY = RowSampling(temperature=0)
MODELS = {"a": 1, "b": 2}


class Told:
    """The events of a request, taken in any thread and waited for in the test's."""

    def __init__(self):
        self.queue, self.events, self.first = queue.Queue(), [], threading.Event()

    def __call__(self, event):
        self.queue.put(event)
        if isinstance(event, Piece):
            self.first.set()

    def wait(self):
        """All events; the last is Finished or Failed."""
        while not self.events or not isinstance(self.events[-1], (Finished, Failed)):
            self.events.append(self.queue.get(timeout=SECONDS))
        return self.events

    def texts(self):
        """The text of every choice, in order; an error is raised."""
        events = self.wait()
        if isinstance(events[-1], Failed):
            raise events[-1].error
        ends = {event.index: "" for event in events if isinstance(event, Ended)}
        for event in events:
            if isinstance(event, Piece):
                ends[event.index] += event.text
        return [ends[index] for index in sorted(ends)]


def until_idle(engine, also=lambda: True):
    """Wait until no row and no request is left."""
    until = time.monotonic() + SECONDS
    while not (also() and engine.load() == {"waiting": 0, "running": 0, "rows": 0}):
        assert time.monotonic() < until
        time.sleep(0.01)


def encoded(text):
    """What makes a prompt of a text."""
    return lambda library, _: tuple(library.tokenizer.encode(text))


def evaluated(adapter):
    """The adapter, whose arrays can go into another thread."""
    mx.eval(adapter.weights)
    return adapter


@pytest.fixture
def make_engine(tiny_base, make_adapter):
    """Maker of engines with some random adapters, by name and seed; all are stopped at the end."""
    engines = []

    def make(adapters=None, **limits):
        loaded = {name: evaluated(make_adapter(seed)) for name, seed in (adapters or {}).items()}

        def open_library():
            library = Library(load_base(str(tiny_base), dtype="float32"))
            for name, adapter in loaded.items():
                library.add_adapter(name, adapter, adapter.content_hash())
            return library

        engine = Engine(open_library, Limits(**limits))
        engines.append(engine)
        engine.start().result(SECONDS)
        return engine

    yield make
    for engine in engines:
        engine.stop()


@pytest.fixture
def ask():
    """Hands a prompt in: ``ask(engine, name, text, **writing)`` returns the job and what it is told."""

    def submit(engine, name, text, prompt=None, lora=(), **writing):
        told = Told()
        writing = {"sampling": GREEDY, "max_tokens": 24, "trim": False, "stream": text, **writing}
        model = engine.call(lambda library: library.with_added(library.find(name), lora)).result(SECONDS)
        job = Completion(model, prompt or encoded(text), Writing(**writing), told)
        engine.submit(job)
        return job, told

    return submit


@pytest.fixture
def client_of():
    """Makes clients of applications over engines: ``client_of(engine, **settings)``; all are closed at the end."""
    with ExitStack() as clients:

        def make(engine, **settings):
            app = make_app(engine, ServerSettings(**settings))
            return clients.enter_context(TestClient(app, base_url="http://127.0.0.1:8080"))

        yield make


@pytest.fixture
def start(make_engine, client_of):
    """Starts an application over an engine: ``start(adapters, limits, **settings)`` returns a client and the engine."""

    def make(adapters=MODELS, limits=None, **settings):
        engine = make_engine(adapters, **(limits or {}))
        return client_of(engine, **settings), engine

    return make


@pytest.fixture
def client(start):
    return start()[0]


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, tiny_base):
    """Folders of two adapters on the tiny base."""
    from mlx_rsgwm.data.template import TEMPLATES
    from mlx_rsgwm.models.adapter import Adapter, LoraSpec
    from mlx_rsgwm.models.base import load_base
    from mlx_rsgwm.training.layers import initial_factors

    base = load_base(str(tiny_base), dtype="float32")
    folder = tmp_path_factory.mktemp("served")
    for seed, name in enumerate(("sums", "words")):
        shapes = {f"model.layers.{layer}.self_attn.q_proj": (32, 32) for layer in range(2)}
        weights = initial_factors(shapes, 4, seed)
        for module, (_, outputs) in shapes.items():
            weights[f"{module}.lora_b"] = initial_factors({module: (4, outputs)}, outputs, seed)[f"{module}.lora_a"]
        spec = LoraSpec(4, 8.0, 0.0, ("self_attn.q_proj",), 2)
        manifest = {"kind": "trained", "base": base.describe()}
        Adapter(spec, weights, manifest=manifest).save(folder / name)
    manifest["template"] = TEMPLATES["plain"].describe()
    Adapter(spec, weights, manifest=manifest).save(folder / "judged")
    return folder


@pytest.fixture
def pair(tmp_path, make_adapter):
    """Folders of a drafter, a verifier and another adapter."""
    return [make_adapter(seed).save(tmp_path / name) for seed, name in ((1, "drafter"), (2, "verifier"), (3, "other"))]


@pytest.fixture
def start_pairs(tiny_base, pair, client_of):
    """Starts a server of a pair, of a pool as verifier, and of its drafter alone."""

    def make(limits=None, **settings):
        def open_library():
            library = Library(load_base(str(tiny_base), dtype="float32"))
            library.add_pair("pair", Pair(pair[0], [pair[1]]))
            library.add_pair("pool", Pair(pair[0], [pair[1], pair[2]]))
            adapter = load_adapter(pair[0])
            library.add_adapter("alone", adapter, adapter.content_hash())
            return library

        engine = Engine(open_library, Limits(**(limits or {})))
        engine.start().result(SECONDS)
        return client_of(engine, **settings), engine

    return make
