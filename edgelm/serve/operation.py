"""A route that answers with a model, from the body of a request to its answer.

It reads the body, lends the model for as long as the answer is sent, and stops the work when the client leaves.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic

from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from edgelm.errors import EdgelmError, pass_interrupts_on, shown
from edgelm.serve.call import Call
from edgelm.serve.cards import ModelCard
from edgelm.serve.errors import ApiError, api_error
from edgelm.serve.fields import Body
from edgelm.serve.metrics import Metrics
from edgelm.serve.settings import ServeSettings
from edgelm.serve.shelf import Shelf
from edgelm.serve.strict import UNSUPPORTED

_GRACE_SECONDS = 5.0
"""Texts end by themselves at the server's limit, and then say what they have; scores and vectors are given up."""


@dataclass(frozen=True)
class Site:
    """What all routes of one server share, as ``app.state.site``."""

    settings: ServeSettings
    shelf: Shelf
    metrics: Metrics
    cards: tuple[ModelCard, ...]
    """What clients are told of the models, the default first."""


@dataclass(frozen=True)
class Operation(Generic[Body]):
    """A route that reads JSON and answers with a model. It is an ASGI app, and an entry of the OpenAPI document."""

    path: str
    body: type[Body]
    answer: type[BaseModel]
    handle: Callable[[Call, Body], Awaitable[Response]]
    summary: str
    event: type[BaseModel] | None = None
    """The content of the events where the answer may be a stream."""
    prompt_field: str = "prompt"
    """The field of the body that an error of a text is blamed on."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; the work is cancelled when the client leaves."""
        site: Site = scope["app"].state.site
        try:
            body = parsed(self.body, (await receive())["body"])  # the guard gives all of it at once
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        work = asyncio.create_task(self._work(site, scope, body, receive, send))
        watch = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, watch):
                if not task.done():
                    task.cancel()
            await asyncio.wait({work, watch})
        if not work.cancelled():
            work.result()

    async def _work(self, site: Site, scope: Scope, body: Body, receive: Receive, send: Send) -> None:
        try:
            async with site.shelf.lend(getattr(body, "model", None)) as served:
                caller: str = scope["state"]["caller"]
                call = Call(site.settings, served, site.metrics, caller, int(time.time()))
                response = await self._handled(call, body)
                await response(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        except EdgelmError as error:
            pass_interrupts_on(error)
            await api_error(error, self.prompt_field).response()(scope, receive, send)

    async def _handled(self, call: Call, body: Body) -> Response:
        seconds = call.settings.max_seconds
        try:
            async with asyncio.timeout(seconds + _GRACE_SECONDS):
                return await self.handle(call, body)
        except TimeoutError as error:
            pass_interrupts_on(error)
            raise ApiError(
                503, f"no answer within {seconds:g} seconds: ask for less", "server_error", code="timeout"
            ) from None


async def _gone(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def parsed(kind: type[Body], content: bytes) -> Body:
    """The JSON `content` as a `kind`. Raises ApiError, which names the first field that is wrong."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise _told(kind, error) from None


def _told(kind: type[BaseModel], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"][:6])
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg'].partition(': ')[2] or first['msg']}"[:200])
    if not where:
        return ApiError(400, "the body must be a JSON object")
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing", param=where)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {shown(where)}: it is not supported here", param=where[:100])
    field = kind.model_fields.get(str(first["loc"][0]))
    if first["type"] == "none_required" and field is not None and (field.description or "").startswith(UNSUPPORTED):
        reason = (field.description or "").removeprefix(UNSUPPORTED)
        return ApiError(400, f"{where} is not supported: {reason}", param=where, code="unsupported_parameter")
    words = first["msg"].removeprefix("Input ")
    return ApiError(400, f"{where}: {words}, got {shown(first['input'])}", param=where[:100])


def json_answer(content: BaseModel, *, without: set[str] | None = None) -> Response:
    """An answer of one JSON object."""
    return JSONResponse(content.model_dump(mode="json", exclude=without), headers={"cache-control": "no-store"})
