"""Routes that only read: the list of models, health and metrics."""

from typing import Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edgelm.serve.cards import ModelCard
from edgelm.serve.errors import ApiError
from edgelm.serve.operation import Site, json_answer
from edgelm.serve.shelf import LOADING_SECONDS


class HealthAnswer(BaseModel):
    """Whether the server works."""

    status: Literal["ok", "loading", "stopping"]


class ModelList(BaseModel):
    """All models; the first is the default."""

    object: str = "list"
    data: list[ModelCard]


async def models(request: Request) -> Response:
    """``GET /v1/models``."""
    site: Site = request.app.state.site
    return json_answer(ModelList(data=list(site.cards)))


async def model(request: Request) -> Response:
    """``GET /v1/models/NAME``."""
    site: Site = request.app.state.site
    name: str = request.path_params["name"]
    for card in site.cards:
        if card.id == name:
            return json_answer(card)
    raise ApiError(404, "there is no such model here: /v1/models lists them", code="model_not_found")


async def health(request: Request) -> Response:
    """``GET /health``: 200 once a model is loaded; 503 before that, and when the server stops."""
    site: Site = request.app.state.site
    headers = {"cache-control": "no-store"}
    if site.shelf.ready:
        return JSONResponse({"status": "ok"}, headers=headers)
    headers["retry-after"] = str(round(LOADING_SECONDS))
    return JSONResponse({"status": "stopping" if site.shelf.closing else "loading"}, 503, headers)


async def metrics(request: Request) -> Response:
    """``GET /metrics``."""
    site: Site = request.app.state.site
    return Response(site.metrics.page(), media_type="text/plain; version=1.0.0; charset=utf-8")
