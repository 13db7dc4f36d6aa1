"""Server-sent events as bytes."""

import asyncio
import json
from collections.abc import AsyncGenerator

import httpx
from starlette.types import Message

from edgelm.serve.sse import Event, EventStream

TEXT = "a\u2028b\u2029c\x85d\r\n\x0b\x0c\x1c\x1d\x1ee\n\n"
"""Every character that Python takes for the end of a line."""


def sent(named: bool) -> bytes:
    """The bytes of a stream of one event with `TEXT`."""

    async def events() -> AsyncGenerator[Event, None]:
        yield {"type": "text", "text": TEXT}

    body = b""

    async def send(message: Message) -> None:
        nonlocal body
        body += message.get("body", b"")

    async def receive() -> Message:
        raise AssertionError("an answer does not read")

    asyncio.run(EventStream(events(), named=named)({"type": "http"}, receive, send))
    return body


def test_no_text_breaks_a_line() -> None:
    """A client that splits lines as Python does, such as one on httpx's iter_lines, finds whole events."""
    lines = list(httpx.Response(200, content=sent(named=False)).iter_lines())
    assert lines[1:] == ["", "data: [DONE]", ""]
    assert json.loads(lines[0].removeprefix("data: "))["text"] == TEXT
    name, data, *rest = sent(named=True).decode().splitlines()
    assert name == "event: text"
    assert json.loads(data.removeprefix("data: "))["text"] == TEXT
    assert rest == [""]
