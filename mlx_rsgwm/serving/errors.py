"""What a request can be refused with: an HTTP status and the fields that OpenAI's clients read."""

from __future__ import annotations

from mlx_rsgwm.core.errors import RsgwmError

GONE = 499  # nginx's: the client left before it was answered
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(RsgwmError):
    """A request that is not answered: ``status`` of HTTP, a ``code`` for programs, the parameter it is about.

    ``retry_after``: seconds after which it may be sent again; None where that would change nothing.
    """

    def __init__(
        self,
        message: object,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def type(self) -> str:
        """OpenAI's word for the kind of error."""
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


class ServerBusy(RequestError):
    """As many requests wait as may."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests wait already; try again later", 429, "queue_full", retry_after=1)


class ServerStopping(RequestError):
    """The server ends what is under way and takes nothing new."""

    def __init__(self) -> None:
        super().__init__("the server is stopping", 503, "stopping", retry_after=5)


class RequestCancelled(RequestError):
    """Whoever asked wants no answer any more."""

    def __init__(self) -> None:
        super().__init__("the request was cancelled", GONE, "cancelled")


class ModelNotFound(RequestError):
    """No model of that name is served."""

    def __init__(self, name: str, known: str = "", param: str = "model") -> None:
        told = f"; there are: {known}" if known else ""
        super().__init__(f"the model {name!r} does not exist{told}", 404, "model_not_found", param)


class ContextTooLong(RequestError):
    """The prompt, with what is to be written, is longer than the model reads."""

    def __init__(self, prompt: int, answer: int, limit: int, param: str) -> None:
        message = f"the prompt has {prompt} tokens, and with {answer} to be written is beyond the context of {limit}"
        told = f"{message}; shorten it or lower max_completion_tokens"
        super().__init__(told, 400, "context_length_exceeded", param)
