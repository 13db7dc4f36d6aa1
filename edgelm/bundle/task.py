"""The job of a bundle or a prefix as data: how an input becomes a prompt, and what becomes of the model's answer.

``docs/tasks.md`` describes the file for people. Nothing here is ever run: a template only puts texts in their places.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import MAX_TASK_BYTES, TASK_FILE
from edgelm.bundle.small_files import SmallFileError, read_small_file
from edgelm.bundle.strict_json import Between, Count, StrictJsonError, from_json, parse_json
from edgelm.bundle.template import Template, TemplateError
from edgelm.errors import BundleError, ConfigError, pass_interrupts_on, shown

MAX_TEMPLATE_CHARACTERS = 2**16
"""The longest template; examples before the input count."""
MAX_FIELDS = 32
MAX_CHOICES = 1_024

_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

LongText = Annotated[str, Between(1, MAX_TEMPLATE_CHARACTERS)]
Score = Annotated[float, Between(-1e9, 1e9)]


@dataclass(frozen=True, slots=True)
class Measured:
    """What the task scored on labelled data. It is a statement: nothing computes it again."""

    metric: Annotated[str, Between(1, 64)]
    """Such as "accuracy" or "BLEU"."""
    value: Score
    """Of this bundle."""
    data: Annotated[str, Between(1, 512)]
    """Name of the data, and the part of it."""
    count: Count
    """Number of examples."""
    float_value: Score | None = None
    """Of the source in 32-bit floats, on the same examples."""


@dataclass(frozen=True, slots=True)
class TaskConstraint:
    """What a generated text must be: exactly one of these, as in `edgelm.text.constraints`."""

    choices: tuple[LongText, ...] | None = None
    regex: LongText | None = None
    json_schema: dict[str, object] | None = None
    grammar: LongText | None = None


@dataclass(frozen=True, slots=True)
class ChooseTask:
    """The likeliest of several texts names a label."""

    kind: Literal["choose"]
    template: LongText
    """The prompt, with the input's fields in braces."""
    choices: dict[str, LongText]
    """The text that follows the prompt, for each label. It usually begins with a blank."""
    length_normalization: Literal["none", "token", "character"] | None = None
    calibrate: LongText | None = None
    """A whole prompt without content, as `Model.choose` takes it; no template."""
    description: str | None = None
    measured: tuple[Measured, ...] | None = None


@dataclass(frozen=True, slots=True)
class GenerateTask:
    """The model continues the filled template."""

    kind: Literal["generate"]
    template: LongText
    generation: dict[str, object] | None = None
    """Generation options over the bundle's ``generation_config.json``."""
    constraint: TaskConstraint | None = None
    description: str | None = None
    measured: tuple[Measured, ...] | None = None


@dataclass(frozen=True, slots=True)
class ChatTask:
    """The model answers a message."""

    kind: Literal["chat"]
    system: LongText | None = None
    """The system message before every conversation."""
    plain: Literal["lines", "labels"] | None = None
    """How messages are written where the bundle has no chat template; see `edgelm.text.plain_chat`."""
    generation: dict[str, object] | None = None
    constraint: TaskConstraint | None = None
    description: str | None = None
    measured: tuple[Measured, ...] | None = None


@dataclass(frozen=True, slots=True)
class EmbedTask:
    """A text becomes a vector of length 1; with a second template, two texts become the cosine of their vectors."""

    kind: Literal["embed"]
    template: LongText
    second_template: LongText | None = None
    pooling: Literal["mean", "last"] | None = None
    description: str | None = None
    measured: tuple[Measured, ...] | None = None


Task = ChooseTask | GenerateTask | ChatTask | EmbedTask


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task, and the bytes that state it, which a bundle or a prefix file gets unchanged."""

    task: Task
    content: bytes


MESSAGE_FIELD = "message"
"""The field of a chat's input."""

_KINDS: dict[str, type[Task]] = {
    "choose": ChooseTask,
    "generate": GenerateTask,
    "chat": ChatTask,
    "embed": EmbedTask,
}


def read_task(bundle: Bundle) -> Task | None:
    """The task of `bundle`; None where it has none. Raises BundleError if the file is damaged."""
    if TASK_FILE not in bundle.manifest.files:
        return None
    try:
        return parse_task(bundle.read_file(TASK_FILE, MAX_TASK_BYTES))
    except (SmallFileError, StrictJsonError) as error:
        raise BundleError(f"{TASK_FILE} {error}") from None


def read_task_file(path: str | os.PathLike[str]) -> TaskFile:
    """The task in the file `path`, as `read_task`; raises ConfigError if it cannot be read."""
    try:
        content = read_small_file(path, MAX_TASK_BYTES)
        return TaskFile(parse_task(content), content)
    except (SmallFileError, StrictJsonError) as error:
        raise ConfigError(f"the task {os.fspath(path)!r} {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        pass_interrupts_on(error)
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError(f"cannot read the task {os.fspath(path)!r}: {reason}") from None


def parse_task(content: bytes) -> Task:
    """Read and check the content of a task's file. Raises StrictJsonError, which names the field."""
    parsed = parse_json(content)
    if not isinstance(parsed, dict):
        raise StrictJsonError("must be an object")
    kind = parsed.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise StrictJsonError(f"kind must be one of {', '.join(map(repr, _KINDS))}, got {shown(kind)}")
    _check_characters(parsed)
    task: Task = from_json(_KINDS[kind], parsed)
    for name, text in _templates(task):
        _check_template(name, text)
    if len(fields_of(task)) > MAX_FIELDS:
        raise StrictJsonError(f"names {len(fields_of(task))} fields, more than {MAX_FIELDS}")
    if isinstance(task, ChooseTask):
        _check_choices(task.choices)
    if isinstance(task, (GenerateTask, ChatTask)) and task.constraint is not None:
        _check_constraint(task.constraint)
    return task


def read_constraint(value: object, where: str) -> TaskConstraint:
    """A constraint out of parsed JSON, which messages call `where`. Raises StrictJsonError."""
    constraint = from_json(TaskConstraint, value, where)
    _check_constraint(constraint)
    return constraint


def fields_of(task: Task) -> tuple[str, ...]:
    """The names of the texts that an input of `task` has."""
    if isinstance(task, ChatTask):
        return (MESSAGE_FIELD,)
    return tuple(dict.fromkeys(name for _, text in _templates(task) for name in Template.read(text).names))


def _templates(task: Task) -> Iterable[tuple[str, str]]:
    if not isinstance(task, ChatTask):
        yield "template", task.template
    if isinstance(task, EmbedTask) and task.second_template is not None:
        yield "second_template", task.second_template


def _check_template(name: str, text: str) -> None:
    try:
        template = Template.read(text)
    except TemplateError as error:
        raise StrictJsonError(f"{name} {error}") from None
    if not template.names:
        raise StrictJsonError(f"{name} names no field: put the input's name into braces, like {{text}}")
    for field in template.names:
        if not _FIELD_NAME.fullmatch(field):
            raise StrictJsonError(
                f"{name} has {shown(field)} in braces: a field is a word of at most 64 letters, digits and _; write "
                "{{ for a brace"
            )
    escaped = (literal.replace("{", "{{").replace("}", "}}") for literal, _ in template.parts)
    names = ("" if field is None else f"{{{field}}}" for _, field in template.parts)
    if "".join(part for pair in zip(escaped, names, strict=True) for part in pair) != text:  # such as "{text:}"
        raise StrictJsonError(f"{name} has more than a name in a pair of braces")


def _check_choices(choices: dict[str, str]) -> None:
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise StrictJsonError(f"choices must be 2 to {MAX_CHOICES:,} labels with their texts, got {len(choices):,}")
    labels: dict[str, str] = {}
    for label, text in choices.items():
        if not label or len(label) > 256 or label != label.strip() or not label.isprintable():
            raise StrictJsonError(
                f"choices has the label {shown(label)}: a label is 1 to 256 characters on one line, without blanks "
                "around them"
            )
        if text in labels:
            raise StrictJsonError(f"choices gives {shown(labels[text])} and {shown(label)} the same text")
        labels[text] = label


def _check_constraint(constraint: TaskConstraint) -> None:
    kinds = (constraint.choices, constraint.regex, constraint.json_schema, constraint.grammar)
    if sum(kind is not None for kind in kinds) != 1:
        raise StrictJsonError("constraint must have one of choices, regex, json_schema and grammar")


def _check_characters(value: object) -> None:
    """Refuse lone surrogates, which JSON can write and no tokenizer reads."""
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict):
            stack += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            stack += one
        elif isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError as error:
                raise StrictJsonError(f"has a lone surrogate, {one[error.start]!r}, in a text") from None
