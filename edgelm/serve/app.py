"""The ASGI app: routes behind the guard, errors in one shape, and the life of the models."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgelm.serve import pages, playground
from edgelm.serve.cards import model_cards
from edgelm.serve.chat import CHAT
from edgelm.serve.completions import COMPLETIONS
from edgelm.serve.embeddings import EMBEDDINGS
from edgelm.serve.errors import ApiError
from edgelm.serve.explanations import EXPLAIN
from edgelm.serve.guard import Guard
from edgelm.serve.metrics import Metrics
from edgelm.serve.openapi import openapi
from edgelm.serve.operation import Operation, Site
from edgelm.serve.responses import RESPONSES
from edgelm.serve.scores import CHOOSE, SCORE
from edgelm.serve.settings import ServeSettings
from edgelm.serve.shelf import Shelf
from edgelm.serve.tasks import TASK
from edgelm.serve.tokens import DETOKENIZE, TOKENIZE, tokenizer_info

log = logging.getLogger(__name__)

OPERATIONS: tuple[Operation[Any], ...] = (
    COMPLETIONS,
    CHAT,
    RESPONSES,
    EMBEDDINGS,
    SCORE,
    CHOOSE,
    EXPLAIN,
    TASK,
    TOKENIZE,
    DETOKENIZE,
)
"""Every route that answers with a model."""


def create_app(settings: ServeSettings, shelf: Shelf, operations: Sequence[Operation[Any]] = OPERATIONS) -> Starlette:
    """The server's app. Its lifespan loads the shelf's first model in the background, and frees all models."""

    document = openapi(operations, needs_key=bool(settings.keys))

    async def described(request: Request) -> Response:
        return JSONResponse(document)

    routes = [
        *playground.routes(),
        Route("/openapi.json", described),
        Route("/health", pages.health),
        Route("/metrics", pages.metrics),
        Route("/tokenizer_info", tokenizer_info),
        Route("/v1/models", pages.models),
        Route("/v1/models/{name:path}", pages.model),
        *(Route(operation.path, operation, methods=["POST"]) for operation in operations),
    ]
    metrics = Metrics(shelf.states)
    middleware = [Middleware(_Counting, metrics=metrics, paths=[route.path for route in routes])]
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
                max_age=600,
            )
        )
    middleware.append(Middleware(Guard, settings=settings))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={ApiError: _told, HTTPException: _http_error, Exception: _unexpected},
        lifespan=_lifespan,
    )
    app.state.site = Site(settings, shelf, metrics, model_cards(shelf, int(time.time())))
    return app


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    shelf: Shelf = app.state.site.shelf

    async def begin() -> None:
        with suppress(ApiError):  # the log says it, and the next request tries again
            async with shelf.lend():
                pass

    tasks = [asyncio.create_task(begin()), asyncio.create_task(shelf.unload_idle())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await shelf.close()


async def _told(request: Request, error: Exception) -> Response:
    """What a route that only reads refuses."""
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405, which the router raises."""
    assert isinstance(error, HTTPException)
    words = {404: "there is no such route: /openapi.json lists them", 405: "this route has other methods"}
    told = ApiError(error.status_code, words.get(error.status_code, error.detail))
    response = told.response()
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _unexpected(request: Request, error: Exception) -> Response:
    """A fault of the server: starlette raises it again, and uvicorn logs it."""
    return ApiError(500, "the server failed; its log says why", "server_error", code="internal_error").response()


class _Counting:
    """ASGI middleware that counts requests and their times by route; unknown paths count as one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Sequence[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._paths else "other"
        started, status = time.monotonic(), "none"

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            self._metrics.requests.labels(route, status).inc()
            self._metrics.request_seconds.labels(route).observe(time.monotonic() - started)
