"""The endpoints: OpenAI's API, adapters at run time, and what a server says of itself."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from mlx_rsgwm.core import files
from mlx_rsgwm.serving.answers import CHAT, TEXT, Head
from mlx_rsgwm.serving.completion import Completion, Writing
from mlx_rsgwm.serving.conversation import conversation_of
from mlx_rsgwm.serving.delivery import Delivery, Maker, unless_gone
from mlx_rsgwm.serving.engine import Engine
from mlx_rsgwm.serving.errors import RequestError
from mlx_rsgwm.serving.guard import read_body
from mlx_rsgwm.serving.library import Library, ServedModel
from mlx_rsgwm.serving.metrics import Metrics
from mlx_rsgwm.serving.schema import Asked, Body, chat_request, completion_request, flag, integer, several, text
from mlx_rsgwm.serving.settings import ServerSettings
from mlx_rsgwm.serving.shelf import Shelf
from mlx_rsgwm.serving.telling import parts_of, streamed, whole_of
from mlx_rsgwm.serving.verified_endpoints import answer_verified, verify_answers

PAGE = Path(__file__).with_name("page.html")
# What it may do: run its own script and ask this server; load nothing, be framed by nobody.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Server:
    """The endpoints over one engine."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)
        self.shelf = Shelf(engine, settings.adapter_dir)

    @property
    def library(self) -> Library:
        """What is served.

        Raises:
            RequestError: the base is still loading, or the server is stopping.
        """
        if not self.engine.ready:
            raise RequestError("the server is not ready", 503, "not_ready", retry_after=1)
        return self.engine.library

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        asked = chat_request(await read_body(request.receive))
        conversation = asked.conversation
        assert conversation is not None
        model = self.library.find(asked.model)
        if model.pipeline is not None:
            return await answer_verified(self, request, asked, model)
        if asked.verify is not None:
            raise RequestError(f"{asked.model!r} has no verifier", code="unsupported_parameter", param="verify")
        model = self.library.with_added(model, asked.lora or ())
        writing = self._writing(asked, conversation.question, trim=True)
        head = Head(CHAT, asked.model, self.fingerprint)
        return await self._answer(request, asked, head, [self._maker(model, conversation.prompt, writing)])

    async def complete(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        asked = completion_request(await read_body(request.receive))
        model = self.library.find(asked.model)
        if model.pipeline is not None:
            raise RequestError(
                f"{asked.model!r} answers questions; ask it by /v1/chat/completions", code="chat_only", param="model"
            )
        model = self.library.with_added(model, asked.lora or ())
        makers = []
        for prompt in asked.prompts:
            stream = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
            makers.append(self._maker(model, encoded(prompt), self._writing(asked, stream, trim=False)))
        return await self._answer(request, asked, Head(TEXT, asked.model, self.fingerprint), makers)

    @property
    def fingerprint(self) -> str:
        """Of the base, as OpenAI's ``system_fingerprint``."""
        return f"rsgwm_{self.library.base.fingerprint[:12]}"

    def _writing(self, asked: Asked, stream: str, trim: bool) -> Writing:
        choices = self.choices(asked)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        limits = (asked.max_tokens, self.settings.max_tokens)
        param = "prompt" if asked.conversation is None else "messages"
        return Writing(choices, seed, stream, *limits, asked.stop, trim, asked.schema, param, asked.sampling)

    def choices(self, asked: Asked) -> int:
        """How many choices a request asks for.

        Raises:
            RequestError: more than are written at a time.
        """
        if asked.n > self.engine.limits.rows:
            raise RequestError(f"n is at most {self.engine.limits.rows} here", code="invalid_value", param="n")
        return asked.n

    @staticmethod
    def _maker(model: ServedModel, prompt: Any, writing: Writing) -> Maker:
        return lambda tell: Completion(model, prompt, writing, tell)

    async def _answer(self, request: Request, asked: Asked, head: Head, makers: list[Maker]) -> Response:
        started = time.monotonic()
        delivery = Delivery(self.engine, makers, asked.n, self.settings.timeout)
        choices = asked.n * len(makers)
        timed = self.timed(started)
        with delivery.cancelled_on_failure():
            await unless_gone(request.receive, asyncio.ensure_future(delivery.begin()))
            if asked.stream:
                return streamed(delivery, parts_of(delivery, head, asked, choices, timed), timed)
            work = asyncio.ensure_future(whole_of(delivery, head, asked, choices, timed))
            return JSONResponse(await unless_gone(request.receive, work))

    def timed(self, started: float) -> Callable[[str], None]:
        """What notes the time of the ``first`` text and of the whole ``answer``."""
        return lambda what: getattr(self.metrics, what).observe(time.monotonic() - started)

    async def verifications(self, request: Request) -> Response:
        """``POST /v1/verifications``."""
        return await verify_answers(self, request)

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        return JSONResponse({"object": "list", "data": [self._described(model) for model in self.library.models()]})

    async def model(self, request: Request) -> Response:
        """``GET`` and ``DELETE /v1/models/{id}``."""
        name = request.path_params["name"]
        if request.method == "DELETE":
            await asyncio.wrap_future(self.shelf.unload(self.library.find(name).name))
            return JSONResponse({"id": name, "object": "model", "deleted": True})
        return JSONResponse(self._described(self.library.find(name)))

    def _described(self, model: ServedModel) -> dict[str, Any]:
        base = self.library.base
        details = {name: value for name, value in model.details.items() if name != "root"}
        template = {"name": model.template.name, "sha256": model.template.hash}
        alone = model.kind == "base"
        more = {"memory_bytes": self.library.base_bytes, "fingerprint": base.fingerprint} if alone else {}
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "mlx-rsgwm",
            "root": model.details.get("root", base.name),
            "parent": None if alone else base.name,
            "max_model_len": base.config.get("max_position_embeddings"),
            "x_rsgwm": {"kind": model.kind, "template": template, **details, **more},
        }

    async def load_adapter(self, request: Request) -> Response:
        """``POST /v1/load_lora_adapter``."""
        body = Body(await read_body(request.receive))
        self.shelf.require()
        name, path = body.require("lora_name", text), body.require("lora_path", text)
        replace = body.take("load_inplace", flag, False)
        body.end()
        self.library.models()
        return JSONResponse(self._described(await asyncio.wrap_future(self.shelf.load(name, path, replace))))

    async def unload_adapter(self, request: Request) -> Response:
        """``POST /v1/unload_lora_adapter``."""
        body = Body(await read_body(request.receive))
        self.shelf.require()
        name = body.require("lora_name", text)
        body.end()
        self.library.find(name)
        model = await asyncio.wrap_future(self.shelf.unload(name))
        return JSONResponse({"id": model.name, "object": "model", "deleted": True})

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``: vLLM's, of a ``prompt`` or of ``messages``."""
        body = Body(await read_body(request.receive))
        model = self.library.find(body.require("model", text))
        special = body.take("add_special_tokens", flag, True)
        prompt = body.take("prompt", text)
        if prompt is not None:
            tokens = await self._call(lambda library: library.tokenizer.encode(prompt, add_special_tokens=special))
        else:
            conversation = body.require("messages", conversation_of)
            tokens = await self._call(lambda library: list(conversation.prompt(library, model)))
        body.end()
        longest = self.library.base.config.get("max_position_embeddings")
        return JSONResponse({"count": len(tokens), "max_model_len": longest, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        """``POST /detokenize``: vLLM's."""
        body = Body(await read_body(request.receive))
        self.library.find(body.require("model", text))
        tokens = body.require("tokens", several(integer(0, self.library.vocabulary - 1)))
        body.end()
        return JSONResponse({"prompt": await self._call(lambda library: library.tokenizer.decode(tokens))})

    async def _call(self, function: Callable[[Library], Any]) -> Any:
        return await asyncio.wrap_future(self.engine.call(function))

    async def health(self, request: Request) -> Response:
        """``GET /health``: 503 once the engine stands still with work waiting."""
        healthy = self.engine.healthy
        return JSONResponse({"status": "ok" if healthy else "the engine stands still"}, 200 if healthy else 503)

    async def ready(self, request: Request) -> Response:
        """``GET /ready``: 503 while the base is loaded, and once the server stops."""
        ready = self.engine.ready
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def page(self, request: Request) -> Response:
        """``GET /``: a page to ask from, which needs nothing but this server."""
        return HTMLResponse(files.read_text(PAGE), headers={"Content-Security-Policy": POLICY})

    async def prometheus(self, request: Request) -> Response:
        """``GET /metrics``."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


def encoded(prompt: str | tuple[int, ...]) -> Callable[[Library, ServedModel], tuple[int, ...]]:
    """What makes token ids of a prompt that is a text or ids already."""

    def prompt_of(library: Library, model: ServedModel) -> tuple[int, ...]:
        ids = tuple(library.tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
        if not ids:
            raise RequestError("prompt has no token", code="invalid_value", param="prompt")
        if max(ids) >= library.vocabulary:
            raise RequestError(
                f"prompt has token {max(ids)}, beyond the vocabulary", code="invalid_value", param="prompt"
            )
        return ids

    return prompt_of
