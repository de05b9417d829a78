"""From names on the command line to a library and a server that runs until it is told to stop."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.core.progress import SILENT, Progress
from mlx_rsgwm.core.signals import TOLD_TO_END, handled
from mlx_rsgwm.inference.open import load_base_for
from mlx_rsgwm.inference.pair import load_verifier
from mlx_rsgwm.models.adapter_sources import AdapterSource, load_adapter
from mlx_rsgwm.serving.admission import Limits
from mlx_rsgwm.serving.app import make_app
from mlx_rsgwm.serving.engine import Engine
from mlx_rsgwm.serving.errors import RequestError
from mlx_rsgwm.serving.guard import describe
from mlx_rsgwm.serving.library import Library, Pair
from mlx_rsgwm.serving.settings import ServerSettings

# Seconds until an idle connection is closed. uvicorn's 5 are those of httpx, too, so that a client may use a connection
# again just as it is closed.
KEEP_ALIVE = 75


@dataclass(frozen=True)
class Served:
    """What is to be served: a base (None: the one that the adapters record), adapters and pairs by the names of
    models."""

    base: str | None = None
    adapters: Mapping[str, AdapterSource] = field(default_factory=dict)
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    most_adapters: int = 64


def open_library(served: Served, progress: Progress = SILENT) -> Library:
    """Load everything; in the thread that will use it.

    Raises:
        RsgwmError: an adapter that cannot be read or is of another base, no base, more adapters than may be.
    """
    adapters = {name: load_adapter(source, served.base, progress=progress) for name, source in served.adapters.items()}
    everything = [*adapters.values()]
    pairs: dict[str, Pair] = {}
    for name, pair in served.pairs.items():
        drafter = load_adapter(pair.drafter, served.base, progress=progress)
        verifier = load_verifier(pair.verifier, served.base, progress)
        everything += [drafter, *verifier]
        pairs[name] = replace(pair, drafter=drafter, verifier=verifier)
    library = Library(load_base_for(everything, served.base, progress), served.most_adapters)
    for name, adapter in adapters.items():
        library.add_adapter(name, adapter, adapter.content_hash())
    for name, pair in pairs.items():
        library.add_pair(name, pair, progress)
    return library


class _Protocol(H11Protocol):
    """uvicorn's, which tells those who send no HTTP what is wrong as every other refusal is told."""

    def send_400_response(self, msg: str) -> None:
        """Refuse, and close."""
        body = json.dumps(describe(RequestError(msg, code="invalid_http"))).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's, which leaves signals to :func:`run`: told to stop, a server ends well, and so does its process.

    ``listening`` is called once clients can connect.
    """

    def __init__(self, config: uvicorn.Config, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: Any = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        self._listening()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture none."""
        yield


def run(
    served: Served,
    limits: Limits,
    settings: ServerSettings,
    begun: Callable[[str, Library], None],
    progress: Progress = SILENT,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; then requests under way have ``settings.drain`` seconds to end.

    ``begun`` is told the server's address and what is served once requests are answered.

    Raises:
        RsgwmError: the address is taken, or what :func:`open_library` raises.
    """
    engine = Engine(lambda: open_library(served, progress), limits)
    config = uvicorn.Config(
        make_app(engine, settings),
        settings.host,
        settings.port,
        http=_Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(settings.drain)),
    )
    try:
        listener = config.bind_socket()
    except SystemExit:
        raise RsgwmError(f"{settings.host}:{settings.port} cannot be taken; another program has it (--port)") from None
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{listener.getsockname()[1]}"

    def stop(number: int, frame: FrameType | None) -> None:
        server.handle_exit(number, frame)

    try:
        library = engine.start().result()
        server = _Server(config, lambda: begun(address, library))
        with handled((signal.SIGINT, *TOLD_TO_END), stop):
            server.run(sockets=[listener])
    finally:
        listener.close()
        engine.stop()
