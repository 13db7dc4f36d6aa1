"""``/openapi.json``: the routes as an OpenAPI 3.1 document, made of the models that check requests."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from edgelm import __version__
from edgelm.serve.cards import ModelCard
from edgelm.serve.errors import ErrorBody
from edgelm.serve.operation import Operation
from edgelm.serve.pages import HealthAnswer, ModelList
from edgelm.serve.tokens import TokenizerInfo

_ERRORS = {
    400: "A field is wrong; `param` names it.",
    401: "The API key is missing or unknown.",
    403: "The Host header does not name this server.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too much waits already; Retry-After says when to try again.",
    431: "The headers are too large.",
    500: "The server failed.",
    503: "The model is loading, has no memory, or the server stops.",
}
_HEAD_ERRORS = (400, 401, 403, 431)
"""What any route may answer, because the guard does."""


def openapi(operations: Sequence[Operation[Any]], *, needs_key: bool) -> dict[str, Any]:
    """The document of a server with `operations` beside the routes that only read."""
    bodies = [operation.body for operation in operations]
    answers = [operation.answer for operation in operations]
    events = [operation.event for operation in operations if operation.event is not None]
    replies: list[type[BaseModel]] = [*answers, *events, ErrorBody, HealthAnswer, ModelCard, ModelList, TokenizerInfo]
    kinds: list[tuple[type[BaseModel], Any]] = [(body, "validation") for body in bodies]
    kinds += [(reply, "serialization") for reply in dict.fromkeys(replies)]
    references, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")

    def reply(kind: type[BaseModel]) -> dict[str, Any]:
        return references[kind, "serialization"]

    def errors(*statuses: int) -> dict[str, Any]:
        return {str(status): _answer(_ERRORS[status], reply(ErrorBody)) for status in statuses}

    paths: dict[str, Any] = {}
    for operation in operations:
        done = _answer("The answer.", reply(operation.answer))
        if operation.event is not None:
            done["content"]["text/event-stream"] = {"schema": _event([reply(operation.event), reply(ErrorBody)])}
        paths[operation.path] = {
            "post": {
                "summary": operation.summary,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": references[operation.body, "validation"]}},
                },
                "responses": {"200": done, **errors(*_ERRORS)},
            }
        }
    health = {"200": _answer("A model is loaded.", reply(HealthAnswer))}
    health["503"] = _answer("The first model is loading, or the server stops.", reply(HealthAnswer))
    paths["/health"] = {
        "get": {"summary": "Whether it works.", "responses": health | errors(*_HEAD_ERRORS), "security": []}
    }
    paths["/v1/models"] = {
        "get": {
            "summary": "List the models.",
            "responses": {"200": _answer("The models.", reply(ModelList))} | errors(*_HEAD_ERRORS),
        }
    }
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"] = {
        "get": {
            "summary": "Describe a model.",
            "parameters": [name],
            "responses": {"200": _answer("The model.", reply(ModelCard))} | errors(*_HEAD_ERRORS, 404),
        }
    }
    paths["/tokenizer_info"] = {
        "get": {
            "summary": "Tell the special tokens of the first model.",
            "responses": {"200": _answer("The tokens.", reply(TokenizerInfo))} | errors(*_HEAD_ERRORS, 503),
        }
    }
    metrics = {"description": "Prometheus metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    paths["/metrics"] = {"get": {"summary": "Measure.", "responses": {"200": metrics} | errors(*_HEAD_ERRORS)}}
    components: dict[str, Any] = {"schemas": schemas.get("$defs", {})}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "edgelm serve", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": components,
    }
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _event(contents: list[dict[str, Any]]) -> dict[str, Any]:
    """The schema of one server-sent event, whose data is JSON of one of `contents`."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": contents},
        "description": "JSON, or [DONE] at the end of a stream whose events have no names.",
    }
    return {"type": "object", "properties": {"data": data, "event": {"type": "string"}}, "required": ["data"]}


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
