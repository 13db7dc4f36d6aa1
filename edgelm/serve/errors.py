"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

import logging
import math
from dataclasses import dataclass

from pydantic import BaseModel
from starlette.responses import JSONResponse

from edgelm.errors import (
    ClosedError,
    ConfigError,
    ContextError,
    EdgelmError,
    InsufficientMemoryError,
    PromptError,
    QueueFullError,
    TokenizerError,
)

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
RETRY_SECONDS = 1.0


@dataclass
class ApiError(Exception):
    """An error that a client is told of."""

    status: int
    message: str
    kind: str = INVALID
    """OpenAI's "type"."""
    param: str | None = None
    """The field of the request that is wrong."""
    code: str | None = None
    retry_seconds: float | None = None
    """When to try again."""
    close: bool = False
    """Whether the connection ends after the answer, because the rest of the request is not read."""

    def body(self) -> dict[str, object]:
        """The answer's JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"cache-control": "no-store"}
        if self.retry_seconds is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_seconds)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.close:
            headers["connection"] = "close"
        return JSONResponse(self.body(), self.status, headers)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The JSON of every answer with an error."""

    error: ErrorDetail


def unavailable(message: str, code: str, retry_seconds: float = RETRY_SECONDS) -> ApiError:
    """503: the same request may succeed later."""
    return ApiError(503, message, "server_error", code=code, retry_seconds=retry_seconds)


def api_error(error: EdgelmError, prompt_field: str = "prompt") -> ApiError:
    """What a client is told of an error of a model; `prompt_field` is the field that holds the text."""
    message = str(error)
    if isinstance(error, QueueFullError):
        return ApiError(
            429,
            message,
            "rate_limit_error",
            code="queue_full",
            retry_seconds=error.retry_after_seconds or RETRY_SECONDS,
        )
    if isinstance(error, ContextError):
        return ApiError(400, message, param=prompt_field, code="context_length_exceeded")
    if isinstance(error, (PromptError, TokenizerError)):
        return ApiError(400, message, param=prompt_field)
    if isinstance(error, ConfigError):
        return ApiError(400, message)
    if isinstance(error, ClosedError):
        return unavailable("the model was unloaded, or the server is stopping: try again", "model_closed")
    if isinstance(error, InsufficientMemoryError):
        return unavailable(message, "out_of_memory", retry_seconds=10.0)
    log.error("a model failed: %s", message)
    return ApiError(500, "the model failed; the server's log says why", "server_error", code="model_failed")
