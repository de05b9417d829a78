"""The application: which endpoint answers which path, what stands before all of them, and how errors are told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.serving.endpoints import Server
from mlx_rsgwm.serving.engine import Engine
from mlx_rsgwm.serving.errors import GONE, RequestError
from mlx_rsgwm.serving.guard import Guard, refusal
from mlx_rsgwm.serving.settings import ServerSettings

log = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(engine: Engine, settings: ServerSettings) -> Starlette:
    """The application over an engine, which it stops at its end."""
    server = Server(engine, settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        server.shelf.close()
        await asyncio.to_thread(engine.stop)

    middleware = [Middleware(Guard, settings=settings)]
    if settings.cors_origins:
        origins = list(settings.cors_origins)
        cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
        middleware.insert(0, cors)
    app = Starlette(
        routes=_routes(server),
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={HTTPException: _not_served},
    )
    app.state.server = server
    return app


def _routes(server: Server) -> list[Route]:
    return [
        Route(path, _told(server, endpoint), methods=methods)
        for path, endpoint, methods in (
            ("/v1/chat/completions", server.chat, ["POST"]),
            ("/v1/completions", server.complete, ["POST"]),
            ("/v1/verifications", server.verifications, ["POST"]),
            ("/v1/models", server.models, ["GET"]),
            ("/v1/models/{name:path}", server.model, ["GET", "DELETE"]),
            ("/v1/load_lora_adapter", server.load_adapter, ["POST"]),
            ("/v1/unload_lora_adapter", server.unload_adapter, ["POST"]),
            ("/tokenize", server.tokenize, ["POST"]),
            ("/detokenize", server.detokenize, ["POST"]),
            ("/", server.page, ["GET"]),
            ("/health", server.health, ["GET"]),
            ("/ready", server.ready, ["GET"]),
            ("/metrics", server.prometheus, ["GET"]),
        )
    ]


def _told(server: Server, endpoint: Endpoint) -> Endpoint:
    """An endpoint whose errors are responses, and whose responses are counted."""

    async def answer(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except asyncio.CancelledError:
            response = Response(status_code=GONE)
        except RsgwmError as error:
            response = refusal(error)
        except Exception as error:
            log.exception("%s %s failed", request.method, request.url.path)
            response = refusal(error)
        path = request.scope["route"].path
        server.metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    return answer


async def _not_served(request: Request, error: Exception) -> Response:
    """A path that is none, or a method that it has not."""
    assert isinstance(error, HTTPException)
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    response = refusal(RequestError(f"{request.method} {request.url.path} is not served", error.status_code, code))
    response.headers.update(error.headers or {})  # of a method, which ones there are
    return response
