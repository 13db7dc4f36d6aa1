"""A row of a run: a JSON object on one line says what to do, and another one says what came of it."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

from edgelm.batch.lines import LineError, line_text
from edgelm.bundle.strict_json import Between, StrictJsonError, from_json, parse_json
from edgelm.errors import ConfigError, shown
from edgelm.scoring.results import LengthNormalization, Pooling

if TYPE_CHECKING:  # ``edgelm batch --help`` imports this module
    from edgelm.decoding.generation_config import GenerationConfig, GenerationOptions
    from edgelm.text.messages import ChatMessage
    from edgelm.text.prompts import Prompt

Fields = TypeVar("Fields")

Kind = Literal["generate", "choose", "score", "perplexity", "embed"]
"""What to do with each row."""
MAX_TEXT_CHARACTERS = 2**28
MAX_ID_CHARACTERS = 1024

_Text = Annotated[str, Between(0, MAX_TEXT_CHARACTERS)]


@dataclass(frozen=True, slots=True)
class Job:
    """What every worker has to know beside the model, whose `generation_config` has the run's options."""

    kind: Kind | None
    """None for the model's task."""
    seed: int
    """From 0 to 2**64 - 1; each row has a seed of its own, made of this one and its number."""
    started: datetime
    """What chat templates take for the present, so that a row has the same prompt after a pause of days."""
    max_rows: int
    """How many texts one worker decodes at a time."""


@dataclass(frozen=True, slots=True)
class ScoreFields:
    """What a row of ``--as score`` says."""

    prompt: _Text
    continuation: _Text


@dataclass(frozen=True, slots=True)
class ChooseFields:
    """What a row of ``--as choose`` says."""

    prompt: _Text
    options: tuple[_Text, ...]
    length_normalization: LengthNormalization | None = None
    calibrate: _Text | None = None


@dataclass(frozen=True, slots=True)
class PerplexityFields:
    """What a row of ``--as perplexity`` says."""

    text: _Text
    stride: int | None = None


@dataclass(frozen=True, slots=True)
class EmbedFields:
    """What a row of ``--as embed`` says."""

    text: _Text
    pooling: Pooling | None = None
    normalize: bool | None = None


@dataclass(frozen=True, slots=True)
class GenerateFields:
    """What a row says that is to be continued: a prompt, a conversation or the input of a task, and options."""

    prompt: "Prompt | None"
    messages: "list[ChatMessage] | None"
    task_input: dict[str, str] | None
    options: "GenerationOptions"


def read_object(line: bytes) -> dict[str, object]:
    """The JSON object on a line. Raises LineError."""
    text = line_text(line)
    if not text.strip():
        raise LineError("is empty: give a JSON object")
    try:
        content = parse_json(text.encode())
    except StrictJsonError as error:
        raise LineError(str(error).replace(" (line 1: ", " (")) from None
    if not isinstance(content, dict):
        raise LineError(f"must be a JSON object, got {shown(content)}")
    return content


def take_id(row: dict[str, object]) -> str | int | None:
    """Remove the field "id" from a row; returns its value, None where the row has no id. Raises LineError."""
    value = row.pop("id", None)
    is_text = isinstance(value, str) and len(value) <= MAX_ID_CHARACTERS
    if value is not None and not is_text and (isinstance(value, bool) or not isinstance(value, int)):
        raise LineError(f"must have a whole number or a text of at most {MAX_ID_CHARACTERS:,} characters as id")
    return cast("str | int | None", value)


def scoring_fields(cls: type[Fields], row: dict[str, object]) -> Fields:
    """The fields of a row that is scored. Raises LineError."""
    try:
        return from_json(cls, row)
    except StrictJsonError as error:
        raise LineError(str(error)) from None


def generate_fields(row: dict[str, object], task_fields: tuple[str, ...] | None) -> GenerateFields:
    """The fields of a row that is continued; `task_fields` are those of the model's task, where the run does it.

    Raises LineError if a field is unknown or has the wrong form; options are checked when they are used.
    """
    rest, prompt, messages, task_input = dict(row), None, None, None
    if task_fields is not None:
        task_input = cast("dict[str, str]", {name: rest.pop(name) for name in task_fields if name in rest})
        expected = f"{', '.join(task_fields)}, id and generation options"
    else:
        expected = "prompt or messages, id and generation options"
        if ("prompt" in rest) == ("messages" in rest):
            raise LineError("must have one of the fields prompt and messages")
        prompt, messages = cast("Prompt | None", rest.pop("prompt", None)), rest.pop("messages", None)
        if prompt is not None and not isinstance(prompt, (str, list)):
            raise LineError(f"must have a text or a list of token ids as prompt, got {shown(prompt)}")
        if prompt is None and not isinstance(messages, list):
            raise LineError(f"must have a text as prompt or a list as messages, got {shown(messages)}")
    return GenerateFields(prompt, cast(Any, messages), task_input, _options(rest, expected))


def row_seed(seed: int, number: int) -> int:
    """The seed of row `number`, from 1: it depends on nothing else, and seeds of neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:8], "big")


def check_options(config: "GenerationConfig") -> None:
    """Raise ConfigError if a row cannot be computed with these options."""
    config.check_batch()
    if config.num_return_sequences > 1:
        raise ConfigError("a row has one text: leave num_return_sequences at 1, and repeat the row")
    if config.max_time is not None:
        raise ConfigError(
            "max_time makes a text depend on how busy the machine is, so it would not be the same again: drop it, or "
            "give max_new_tokens"
        )


def _options(rest: dict[str, object], expected: str) -> "GenerationOptions":
    """The generation options of a row, a constraint among them. Raises LineError if a field is not an option."""
    from edgelm.bundle.task import read_constraint
    from edgelm.decoding.generation_config import OPTIONS
    from edgelm.generation.task_format import constraint_of

    options = dict(rest)
    for name in rest:
        if name not in OPTIONS or (OPTIONS[name].rule.kind == "python" and name != "constraint"):
            raise LineError(f"has the unknown field {shown(name)}: it may have {expected}")
    if rest.get("constraint") is not None:
        try:
            options["constraint"] = constraint_of(read_constraint(rest["constraint"], "constraint"))
        except StrictJsonError as error:
            raise LineError(str(error)) from None
    return cast("GenerationOptions", options)
