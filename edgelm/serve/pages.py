"""Routes that only read: the list of models, health, metrics, the OpenAPI document and the page at ``/``."""

from importlib import resources
from typing import Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edgelm.bundle.chat_template import CHAT_TEMPLATE_FILE
from edgelm.serve.errors import ApiError
from edgelm.serve.operation import Site, json_answer
from edgelm.serve.shelf import LOADING_SECONDS, Place

_NO_FRAMES = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class ModelCard(BaseModel):
    """A model of this server."""

    id: str
    object: str = "model"
    created: int
    """When the server started, in seconds since 1970."""
    owned_by: str = "edgelm"
    context_length: int
    """In tokens."""
    precision: str
    """The bundle's recipe, such as "int8"."""
    has_chat_template: bool


class HealthAnswer(BaseModel):
    """Whether the server works."""

    status: Literal["ok", "loading", "stopping"]


class ModelList(BaseModel):
    """All models; the first is the default."""

    object: str = "list"
    data: list[ModelCard]


def _card(site: Site, place: Place) -> ModelCard:
    manifest = place.bundle.manifest
    return ModelCard(
        id=place.name,
        created=site.created,
        context_length=manifest.architecture.context_length,
        precision=manifest.recipe.name,
        has_chat_template=CHAT_TEMPLATE_FILE in manifest.files,
    )


async def models(request: Request) -> Response:
    """``GET /v1/models``."""
    site: Site = request.app.state.site
    return json_answer(ModelList(data=[_card(site, place) for place in site.shelf.places]))


async def model(request: Request) -> Response:
    """``GET /v1/models/NAME``."""
    site: Site = request.app.state.site
    name: str = request.path_params["name"]
    for place in site.shelf.places:
        if place.name == name:
            return json_answer(_card(site, place))
    return ApiError(404, "there is no such model here: /v1/models lists them", code="model_not_found").response()


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


def page() -> Response:
    """The static page at ``/``; 404 where this installation has none."""
    file = resources.files("edgelm.serve") / "playground" / "index.html"
    if not file.is_file():
        return ApiError(404, "this installation has no page here; /openapi.json describes the routes").response()
    return Response(file.read_bytes(), media_type="text/html; charset=utf-8", headers=_NO_FRAMES)
