"""The server's process: the socket, uvicorn, and how it stops."""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from edgelm.errors import ConfigError, pass_interrupts_on
from edgelm.serve.connections import drop_overdue, protocol_class
from edgelm.serve.operation import Site
from edgelm.serve.settings import ServeSettings

log = logging.getLogger(__name__)

_BACKLOG = 256
_LAST_SECONDS = 5
"""After the drain, answers have so long to say that their texts were cut short."""
_TICKS = 10
"""uvicorn ticks so often in a second."""


def listen(settings: ServeSettings) -> socket.socket:
    """A socket that listens at `host` and `port`. Raises ConfigError if the address cannot be used."""
    host, port = settings.host, settings.port
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        pass_interrupts_on(error)
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError(f"cannot serve on {host}:{port}: {reason}; give another --host or --port") from None


class Server(uvicorn.Server):
    """uvicorn, which drops slow clients and stops in three steps.

    The first signal stops accepting, and lets running texts go on for `drain_seconds`. Then texts are cut short, and
    their answers say so. A second signal ends the process at once.

    Attributes:
        stopped_by: the signal that stopped the server, if any.
        failure: why the first model did not load, which ends the server.
    """

    def __init__(self, app: Starlette, settings: ServeSettings, tell: Callable[[str], None]) -> None:
        """Make a server of `app`; `tell` is called with a line for the user when it is ready, and when it stops."""
        config = uvicorn.Config(
            app,
            http=protocol_class(settings),
            ws="none",
            loop="asyncio",
            interface="asgi3",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=int(max(1, settings.idle_seconds)),
            timeout_graceful_shutdown=int(settings.drain_seconds) + _LAST_SECONDS,
            h11_max_incomplete_event_size=settings.max_header_bytes,
        )
        super().__init__(config)
        self.stopped_by: int | None = None
        self.failure = ""
        self._settings, self._tell, self._told_ready = settings, tell, False
        self._site: Site = app.state.site

    async def on_tick(self, counter: int) -> bool:
        """As uvicorn, ten times a second."""
        if counter % _TICKS == 0:
            drop_overdue(self.server_state.connections)
        if self._site.shelf.ready and not self._told_ready:
            self._told_ready = True
            self._tell("ready")
        self.failure = self._site.shelf.first_failure
        return await super().on_tick(counter) or bool(self.failure)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, drain, cut short."""
        seconds = self._settings.drain_seconds
        self._tell(f"stopping; running texts may go on for {seconds:g} s (Ctrl-C: stop at once)")
        cut = asyncio.create_task(self._cut_short())
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    async def _cut_short(self) -> None:
        site = self._site
        site.shelf.stop_lending()
        await asyncio.sleep(self._settings.drain_seconds)
        log.warning("texts were still running after %g seconds: they are cut short", self._settings.drain_seconds)
        await site.shelf.end_texts()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle the signals that stop a server, in the main thread; the caller's handlers come back afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if sys.platform == "win32":
            numbers.append(signal.SIGBREAK)  # Ctrl-Break, the only one that another process can send there
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; the second time at once."""
        if self.should_exit:
            with suppress(OSError):
                os.write(2, b"\n")
            os._exit(128 + sig)
        self.should_exit, self.stopped_by = True, sig
