"""What stands before every endpoint: the name the server was called by, the key, what kind of body, how large."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_rsgwm.core import files
from mlx_rsgwm.core.errors import RsgwmError
from mlx_rsgwm.serving.errors import RequestError
from mlx_rsgwm.serving.settings import LOOPBACK_NAMES, ServerSettings, is_address

LARGEST_BODY = 8 << 20
OPEN = (b"/health", b"/ready", b"/")  # nothing here tells what is served or asked
ADMIN = re.compile(rb"/v1/(load|unload)_lora_adapter$")
CHARSET = re.compile(r"(?:^|;)\s*charset\s*=\s*\"?([^\s;\"]+)", re.IGNORECASE)
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]/\s]+)(?::\d+)?")


class Guard:
    """Refuses requests before any endpoint sees them. Only paths sent letter by letter open without a key."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._hosts = {*LOOPBACK_NAMES, *(name.lower() for name in (*settings.allowed_hosts, settings.host))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, or answer why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except RequestError as error:
            await refusal(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Request(scope).headers
        named = HOST.fullmatch(headers.get("host", ""))
        host = named[1].lower() if named else ""
        if not host or not (host in self._hosts or is_address(host)):
            raise RequestError(
                "the server is not called by this name; add it with --allowed-host", 403, "bad_host", "Host"
            )
        path: bytes = scope.get("raw_path") or scope["path"].encode()
        method = scope["method"]
        if method != "OPTIONS" and not (path in OPEN and method in ("GET", "HEAD")):
            # Which endpoint answers is settled by the decoded path: /v1/load%5Flora_adapter loads, too.
            admin = method == "DELETE" or any(ADMIN.match(each) for each in (path, scope["path"].encode()))
            self._check_key(headers.get("authorization", ""), admin)
        if method == "POST":
            _check_form(headers)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            raise RequestError(f"the body is larger than {LARGEST_BODY >> 20} MB", 413, "body_too_large")

    def _check_key(self, header: str, admin: bool) -> None:
        settings = self._settings
        keys: Sequence[str] = settings.api_keys
        if admin and settings.admin_keys:
            keys = settings.admin_keys
        elif settings.api_keys:
            keys = (*settings.api_keys, *settings.admin_keys)
        if not keys:
            return
        scheme, _, given = header.partition(" ")
        sound = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
        if scheme.lower() != "bearer" or not any(sound):
            what = "no API key" if not header else "the API key is wrong"
            raise RequestError(f"{what}; send it as Authorization: Bearer KEY", 401, "invalid_api_key")


def _check_form(headers: Mapping[str, str]) -> None:
    """Refuse a body that is said to be no JSON, in no UTF-8, or compressed."""
    media, _, parameters = headers.get("content-type", "").partition(";")
    charset = CHARSET.search(parameters)
    if media.strip().lower() != "application/json":
        raise RequestError("the body must be sent as application/json", 415, "unsupported_media_type")
    if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise RequestError("the body must be in UTF-8", 415, "unsupported_media_type")
    if headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise RequestError("the body must not be compressed", 415, "unsupported_media_type")


def refusal(error: Exception) -> Response:
    """The response that tells an error; of one that nobody foresaw it says no more than that."""
    described = describe(error)
    headers = {}
    status = error.status if isinstance(error, RequestError) else 400 if isinstance(error, RsgwmError) else 500
    if isinstance(error, RequestError) and error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(described, status, headers)


def describe(error: Exception) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    if isinstance(error, RequestError):
        told = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
    elif isinstance(error, RsgwmError):
        told = {"message": str(error), "type": "invalid_request_error", "param": None, "code": "invalid_request"}
    else:
        told = {"message": "the server failed; its log says how", "type": "server_error", "param": None,
                "code": "internal_error"}  # fmt: skip
    return {"error": told}


async def read_body(receive: Receive) -> Any:
    """The JSON value of a request's body.

    Raises:
        RequestError: it is larger than may be, or no JSON.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the client is gone", 400, "disconnected")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST_BODY:
            raise RequestError(f"the body is larger than {LARGEST_BODY >> 20} MB", 413, "body_too_large")
        if not message.get("more_body", False):
            break
    try:
        return files.parse_json(files.decode_text(b"".join(parts), "the body"), unique=True)
    except (ValueError, RsgwmError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", 400, "invalid_json") from None
