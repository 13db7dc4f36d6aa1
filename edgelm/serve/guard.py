"""What every request passes before a route sees it: host, key, headers, content type, size, time and JSON depth.

All of it is cheap, and happens before the body is parsed.
"""

import asyncio
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgelm.errors import pass_interrupts_on
from edgelm.serve import playground
from edgelm.serve.errors import INVALID, ApiError, unavailable
from edgelm.serve.settings import ServeSettings

OPEN_PATHS = ("/health", *playground.PATHS)
"""Paths that need no key, because they tell nothing."""
_DRAIN_BYTES = 8 << 20
_DRAIN_SECONDS = 2.0
"""So much of a refused body is still read, because closing a connection with unread bytes may lose the answer."""
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class Guard:
    """ASGI middleware. Routes find the caller in ``scope["state"]["caller"]``, and the body in the first message."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app, self._settings = app, settings
        self._bodies_bytes = 0  # of all requests that are not answered yet
        self._keys = [key.encode() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan; uvicorn is told to know no websockets
            await self._app(scope, receive, send)
            return
        held = _HeldBody()
        headers = Headers(scope=scope)
        try:
            try:
                self._check_head(scope, headers)
                scope.setdefault("state", {})["caller"] = self._caller(scope, headers)
                receive = await self._with_body(scope["method"], headers, receive, held)
            except ApiError as error:
                if error.close and headers.get("expect", "").lower() != "100-continue":
                    await _drain(receive)
                await error.response()(scope, receive, send)
                return
            await self._app(scope, receive, send)
        finally:
            self._bodies_bytes -= held.size_bytes

    def _check_head(self, scope: Scope, headers: Headers) -> None:
        settings = self._settings
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > settings.max_header_bytes or len(scope["headers"]) > settings.max_headers:
            limit = f"{settings.max_header_bytes:,} bytes in {settings.max_headers} lines"
            raise ApiError(431, f"the headers are larger than {limit}", close=True)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not settings.allows_host(hosts[0]):
            raise ApiError(
                403,
                "the Host header does not name this server: use its address, or start it with --allowed-host NAME",
                "permission_error",
                code="host_not_allowed",
                close=True,
            )

    def _caller(self, scope: Scope, headers: Headers) -> str:
        """Who asks: the same text for the same key, and "" where no key is needed."""
        if not self._keys or scope["path"] in OPEN_PATHS:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        found = None
        for key in self._keys:  # all of them, so that the time does not tell which one is like the given one
            if hmac.compare_digest(key, given.strip().encode("utf-8", "replace")):
                found = key
        if scheme.lower() != "bearer" or found is None:
            raise ApiError(
                401,
                "this server needs an API key: send the header Authorization: Bearer KEY",
                "authentication_error",
                code="invalid_api_key",
                close=True,
            )
        return hashlib.sha256(found).hexdigest()[:16]

    async def _with_body(self, method: str, headers: Headers, receive: Receive, held: "_HeldBody") -> Receive:
        """A `receive` that gives the whole checked body first, whose size `held` gets."""
        if method != "POST":  # no other method has a body that means something
            return receive
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A web page may post a form or plain text to any server without asking; it must ask before it posts JSON.
            raise ApiError(415, "send the body as JSON, with the header Content-Type: application/json", close=True)
        if "content-length" in headers and "transfer-encoding" in headers:
            raise ApiError(400, "the body has a length and comes in chunks: send one of the two headers", close=True)
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "send the body uncompressed", close=True)
        body = await self._read(headers, receive, held)
        check_depth(body, self._settings.max_json_depth)
        return _body_first(body, receive)

    async def _read(self, headers: Mapping[str, str], receive: Receive, held: "_HeldBody") -> bytes:
        limit, seconds = self._settings.max_body_bytes, self._settings.body_seconds
        too_large = ApiError(413, f"the body has more than {limit:,} bytes", code="body_too_large", close=True)
        busy = unavailable("too many large requests at once", "busy")
        busy.close = True
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before its body was complete", close=True)
                    piece = message.get("body", b"")
                    body += piece
                    held.size_bytes += len(piece)
                    self._bodies_bytes += len(piece)
                    if self._bodies_bytes > self._settings.max_bodies_bytes:
                        raise busy
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            pass_interrupts_on(error)
            words = f"the body did not arrive within {seconds:g} seconds"
            raise ApiError(408, words, code="body_too_slow", close=True) from None


@dataclass
class _HeldBody:
    """How much of a body was read."""

    size_bytes: int = 0


def check_depth(body: bytes, limit: int) -> None:
    """Raise ApiError if the JSON `body` is nested deeper than `limit`, before a parser meets it.

    Each round removes the innermost pairs of brackets that are left. All of it is as fast as a search in bytes.
    """
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside_strings = b"".join(unescaped.split(b'"')[::2])
    brackets = outside_strings.translate(_ONE_KIND, _NOT_BRACKETS)
    for _ in range(limit):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise ApiError(400, f"the JSON is nested deeper than {limit}, or its brackets do not match", INVALID)


def _body_first(body: bytes, receive: Receive) -> Receive:
    left: bytes | None = body

    async def receive_body_first() -> Message:
        nonlocal left
        if left is None:
            return await receive()
        whole, left = left, None
        return {"type": "http.request", "body": whole, "more_body": False}

    return receive_body_first


async def _drain(receive: Receive) -> None:
    """Read and drop a while what the client still sends."""
    left = _DRAIN_BYTES
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))
    except TimeoutError as error:
        pass_interrupts_on(error)
