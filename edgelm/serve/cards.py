"""What ``/v1/models`` tells of each model."""

from typing import Literal

from pydantic import BaseModel, JsonValue
from pydantic_core import to_jsonable_python

from edgelm.bundle.chat_template import CHAT_TEMPLATE_FILE
from edgelm.bundle.folder import default_bundle_path
from edgelm.bundle.task import ChooseTask, Task, fields_of
from edgelm.decoding.generation_config import DEFAULT_MAX_NEW_TOKENS, OPTIONS, GenerationConfig
from edgelm.errors import BundleError
from edgelm.serve.fields import GenerationFields
from edgelm.serve.loading import batch_options
from edgelm.serve.shelf import Place, Shelf

_OPENAI_NAMES = {"num_return_sequences": "n", "stop_strings": "stop"}


class TaskCard(BaseModel):
    """What a model is for, and what ``/v1/task`` takes and gives."""

    kind: Literal["choose", "generate", "chat", "embed"]
    description: str | None
    fields: tuple[str, ...]
    """The names of the texts of an input."""
    labels: tuple[str, ...] | None
    """The labels of a choice; null for the other kinds."""


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
    base: str | None
    """The model whose weights it uses, behind a prefix of its own; null for one with own weights."""
    task: TaskCard | None
    """The task of its prefix or its bundle; null for none."""
    embedded: bool
    """Whether its weights are those that come with edgelm, which `edgelm run` uses without `-m`."""
    generation_defaults: dict[str, JsonValue]
    """What completions take for the fields that a request leaves out; null where nothing is set."""


def model_cards(shelf: Shelf, created: int) -> tuple[ModelCard, ...]:
    """A card for each model of `shelf`. Raises BundleError where a bundle's defaults cannot be read."""
    return tuple(_card(place, created) for place in shelf.places)


def _card(place: Place, created: int) -> ModelCard:
    manifest = place.bundle.manifest
    return ModelCard(
        id=place.name,
        created=created,
        context_length=manifest.architecture.context_length,
        precision=manifest.recipe.name,
        has_chat_template=CHAT_TEMPLATE_FILE in manifest.files,
        base=place.base,
        task=None if place.task is None else _task_card(place.task),
        embedded=_is_embedded(place),
        generation_defaults=_defaults(place),
    )


def _task_card(task: Task) -> TaskCard:
    labels = tuple(task.choices) if isinstance(task, ChooseTask) else None
    return TaskCard(kind=task.kind, description=task.description, fields=fields_of(task), labels=labels)


def _is_embedded(place: Place) -> bool:
    try:
        return place.bundle.path.resolve() == default_bundle_path().resolve()
    except BundleError:  # this installation has no embedded model
        return False


def _defaults(place: Place) -> dict[str, JsonValue]:
    config = GenerationConfig.of_bundle(place.bundle)
    config = config.updated(dict(batch_options(config)))
    named = {_OPENAI_NAMES.get(option, option): getattr(config, option) for option in OPTIONS}
    values = {name: value for name, value in named.items() if name in GenerationFields.model_fields}
    values["logit_bias"] = {str(token): bias for token, bias in config.logit_bias}
    finite = config.max_new_tokens is not None or config.max_length is not None
    values["max_tokens"] = config.max_new_tokens if finite else DEFAULT_MAX_NEW_TOKENS
    return {name: to_jsonable_python(value) for name, value in values.items()}
