"""Connections that would cost the server more than they give: too many, too slow, or not reading their answer.

uvicorn's own timeout ends when the first byte of a request comes, so a client that sends a byte a second would keep its
connection forever. The server looks at all connections once a second instead.
"""

import asyncio
import json
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgelm.serve.errors import ApiError
from edgelm.serve.settings import ServeSettings

_SLICE_BYTES = 4096
_MAX_WASTEFUL_SLICES = 4


class WatchedProtocol(H11Protocol):
    """uvicorn's protocol for one connection, which knows for how long its client has been too slow."""

    settings: ServeSettings
    """Set by `protocol_class`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._quiet_since: float | None = time.monotonic()  # None while a request is answered
        self._wasteful_slices = 0  # of which hardly a quarter was a body's content
        self._unsent_bytes = 0
        self._unsent_since = 0.0  # when `_unsent_bytes` last became fewer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room for a new connection: the one that has waited longest for its request goes."""
        super().connection_made(transport)
        if len(self.connections) <= self.settings.max_connections:
            return
        waiting = [other for other in self.connections if isinstance(other, WatchedProtocol) and other.is_quiet]
        oldest = min((other for other in waiting if other is not self), key=lambda o: o._quiet_since or 0, default=self)
        oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and note whether a request is being answered.

        A body in chunks of a few bytes costs a thousand times as much as another one, so it is cut.
        """
        for start in range(0, len(data), _SLICE_BYTES):
            if self.transport.is_closing():
                return
            piece = data[start : start + _SLICE_BYTES]
            in_body, had = self.conn.their_state is h11.SEND_BODY, 0 if self.cycle is None else len(self.cycle.body)
            super().data_received(piece)
            if in_body and len(piece) == _SLICE_BYTES and len(self.cycle.body) - had < _SLICE_BYTES // 4:
                self._wasteful_slices += 1
                if self._wasteful_slices > _MAX_WASTEFUL_SLICES:
                    self.send_400_response("")
                    return
        self._note_activity()

    def on_response_complete(self) -> None:
        """Wait for the next request, unless it is here already."""
        super().on_response_complete()
        self._quiet_since = time.monotonic()
        self._note_activity()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the shape of all errors, and hang up."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # an answer is on its way, and another one cannot follow
            return
        body = json.dumps(
            ApiError(400, "this is no valid HTTP request, its head is too large, or its chunks are too small").body()
        ).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def is_quiet(self) -> bool:
        """Whether no request of this connection is being answered."""
        return self._quiet_since is not None

    def is_overdue(self, now: float) -> bool:
        """Whether its client sent no whole request head, or took nothing of its answer, for too long."""
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self._unsent_bytes or self._unsent_bytes == 0:
            self._unsent_since = now
        self._unsent_bytes = unsent
        if unsent and now - self._unsent_since > self.settings.send_seconds:
            return True
        return self._quiet_since is not None and now - self._quiet_since > self.settings.idle_seconds

    def _note_activity(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._quiet_since = None


def protocol_class(settings: ServeSettings) -> type[WatchedProtocol]:
    """The protocol of a server with `settings`."""
    return type("Protocol", (WatchedProtocol,), {"settings": settings})


def drop_overdue(connections: set[Any]) -> None:
    """Cut the connections whose clients are too slow."""
    now = time.monotonic()
    for connection in list(connections):
        if isinstance(connection, WatchedProtocol) and connection.is_overdue(now):
            connection.transport.abort()
