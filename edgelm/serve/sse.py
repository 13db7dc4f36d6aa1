"""Server-sent events: an answer that comes piece by piece."""

import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgelm.errors import EdgelmError, pass_interrupts_on
from edgelm.serve.errors import ApiError, api_error

log = logging.getLogger(__name__)

Event = BaseModel | Mapping[str, Any]
DONE = b"data: [DONE]\n\n"
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Characters that end no line of an event, but that some clients take for line ends, such as httpx's iter_lines."""


class EventStream(Response):
    """Sends events as they come. An error after the first one is the last event.

    Args:
        events: the events' content. The iterator is closed when the client leaves.
        named: whether each event is named by its content's field "type", as in OpenAI's responses; otherwise the stream
            ends with ``data: [DONE]``.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Event, None], *, named: bool = False) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._events, self._named = events, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    await send({"type": "http.response.body", "body": self._line(event), "more_body": True})
            except (ApiError, EdgelmError) as error:
                told = error if isinstance(error, ApiError) else api_error(error)
                await send({"type": "http.response.body", "body": self._error(told), "more_body": True})
            except Exception as error:
                pass_interrupts_on(error)
                log.exception("an answer ended early")
                broken = ApiError(500, "the server failed; its log says why", "server_error", code="internal_error")
                await send({"type": "http.response.body", "body": self._error(broken), "more_body": True})
        await send({"type": "http.response.body", "body": b"" if self._named else DONE, "more_body": False})

    def _error(self, error: ApiError) -> bytes:
        body = error.body()
        return self._line({**body["error"], "type": "error"} if self._named else body)  # type: ignore[dict-item]

    def _line(self, event: Event) -> bytes:
        content = event.model_dump(mode="json") if isinstance(event, BaseModel) else event
        line = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_LINE_ENDS)
        name = f"event: {content['type']}\n" if self._named else ""
        return f"{name}data: {line}\n\n".encode()
