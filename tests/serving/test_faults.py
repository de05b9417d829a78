"""Clients that stall or leave, over real connections: what they asked for is let go, wherever it was."""

import contextlib
import json
import socket
import threading
import time

import pytest
import uvicorn

from mlx_rsgwm.serving import delivery, telling
from mlx_rsgwm.serving.app import make_app
from mlx_rsgwm.serving.reading import TextsReading
from mlx_rsgwm.serving.settings import ServerSettings
from tests.serving.conftest import SECONDS, until_idle

ENDLESS = {"model": "a", "prompt": "go on", "max_tokens": 490, "logit_bias": {"0": -100}}
BUFFER = 4096  # bytes that the system holds of a connection, or so: what a client does not read waits in the server


@pytest.fixture
def listen():
    """Serves an engine on a free port: ``listen(engine)`` returns the port."""
    with contextlib.ExitStack() as stack:

        def start(engine):
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            config = uvicorn.Config(make_app(engine, ServerSettings()), log_config=None, timeout_graceful_shutdown=1)
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            stack.callback(thread.join, SECONDS)
            stack.callback(setattr, server, "should_exit", True)
            return listener.getsockname()[1]

        yield start


@contextlib.contextmanager
def asking(port, body, path="/v1/completions"):
    """A connection over which a request was sent, and of which nothing is read by itself."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        client.settimeout(SECONDS)
        client.connect(("127.0.0.1", port))
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield client


def wait_for(true):
    until = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def received(client):
    """What comes until the server closes the connection."""
    parts = []
    while part := client.recv(1 << 16):
        parts.append(part)
    return b"".join(parts).decode()


LONG = {**ENDLESS, "logprobs": 20, "stream": True}


def test_a_client_that_reads_nothing_is_cut(make_engine, listen, monkeypatch):
    monkeypatch.setattr(telling, "LONGEST_STALL", 0.5)
    engine = make_engine({"a": 1})
    with asking(listen(engine), LONG) as client:
        until_idle(engine, lambda: engine.counts.cancelled == 1)  # long before its 490 tokens were written
        assert engine.counts.written_tokens < 490
        assert "[DONE]" not in received(client)


def test_a_client_that_reads_too_slowly_is_told_so(make_engine, listen, monkeypatch):
    monkeypatch.setattr(delivery, "MOST_PENDING", 20)
    engine = make_engine({"a": 1})
    with asking(listen(engine), LONG) as client:
        until_idle(engine, lambda: engine.counts.cancelled == 1)
        assert engine.counts.written_tokens < 490
        told = b""
        while b"slow_client" not in told:  # now it reads again
            told += client.recv(1 << 16)
    assert b"the client reads too slowly" in told


def test_a_client_that_leaves_the_queue_has_no_place_in_it(make_engine, listen):
    engine = make_engine({"a": 1}, rows=1, queue=1)
    port = listen(engine)
    with asking(port, {**ENDLESS, "stream": True}) as running:
        assert b"200 OK" in running.recv(1 << 10)
        wait_for(lambda: engine.load()["rows"] == 1)
        for left in (1, 2, 3):  # or the second would find the queue full
            with asking(port, ENDLESS):
                wait_for(lambda: engine.load()["waiting"] == 1)
            wait_for(lambda: engine.load()["waiting"] == 0)
            assert engine.counts.cancelled == left
        assert engine.load()["rows"] == 1
    until_idle(engine)
    assert engine.counts.cancelled == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_read(make_engine, listen, monkeypatch, stream):
    engine = make_engine({"a": 1})
    engine._positions = 16  # a long prompt takes many pieces
    port = listen(engine)
    reading, left = threading.Event(), threading.Event()
    read_on = TextsReading.read_on

    def slowly(self, tokens):
        reading.set()
        left.wait(0.2)
        return read_on(self, min(tokens, 16))

    monkeypatch.setattr(TextsReading, "read_on", slowly)
    with asking(port, {**ENDLESS, "prompt": "word " * 80, "max_tokens": 20, "stream": stream}):
        assert reading.wait(SECONDS)
    until_idle(engine, lambda: engine.counts.cancelled == 1)
    assert engine.counts.written_tokens == 0
    assert engine.counts.prompt_tokens < 300


def test_a_client_that_leaves_while_its_drafts_are_verified(tiny_base, make_adapter, tmp_path, listen, monkeypatch):
    from mlx_rsgwm.models.base import load_base
    from mlx_rsgwm.serving.engine import Engine
    from mlx_rsgwm.serving.library import Library, Pair

    sources = [make_adapter(seed).save(tmp_path / name) for seed, name in ((1, "drafter"), (2, "verifier"))]

    def open_library():
        library = Library(load_base(str(tiny_base), dtype="float32"))
        library.add_pair("pair", Pair(sources[0], [sources[1]]))
        return library

    engine = Engine(open_library)
    reader = type(engine.start().result(SECONDS).find("pair").pipeline.reader)
    verifying, left = threading.Event(), threading.Event()
    signals = reader.signals

    def slowly(self, *arguments, **options):
        verifying.set()
        assert left.wait(SECONDS)
        return signals(self, *arguments, **options)

    monkeypatch.setattr(reader, "signals", slowly)
    question = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 8}
    body = {**question, "model": "pair", "verify": {"attempts": 3, "threshold": 1.0}}
    port = listen(engine)
    with asking(port, body, "/v1/chat/completions"):
        assert verifying.wait(SECONDS)
    wait_for(lambda: any(job.cancelled for job in list(engine._jobs)))
    left.set()
    until_idle(engine, lambda: engine.counts.cancelled == 1)
    assert engine.counts.verified_drafts <= 1
    with asking(port, body, "/v1/chat/completions") as client:
        assert b"200 OK" in client.recv(1 << 16)
    until_idle(engine)
