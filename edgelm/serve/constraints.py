"""What an answer must be: OpenAI's response formats, and edgelm's own field `constraint`."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints

from edgelm.errors import ConfigError
from edgelm.serve.errors import ApiError
from edgelm.serve.strict import NO_EFFECT, StrictBody
from edgelm.text.constraints import (
    MAX_CHOICES,
    MAX_REGEX_CHARACTERS,
    MAX_SOURCE_CHARACTERS,
    Choices,
    Constraint,
    Grammar,
    JsonSchema,
    Regex,
)

SchemaName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
SchemaText = Annotated[str, StringConstraints(max_length=4096)]
Schema = dict[str, Any]


class PlainFormat(StrictBody):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(StrictBody):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(StrictBody):
    """A JSON schema with a name."""

    model_config = ConfigDict(serialize_by_alias=True)  # a response repeats it

    name: SchemaName = Field(description=NO_EFFECT + "the model does not see it.")
    description: SchemaText | None = Field(default=None, description=NO_EFFECT + "the model does not see it.")
    schema_: Schema = Field(alias="schema", description="The JSON schema, which is always obeyed.")
    strict: bool | None = Field(default=None, description=NO_EFFECT + "a schema is always obeyed.")


class ChatSchemaFormat(StrictBody):
    """JSON of a schema, as chat completions ask for it."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class ResponseSchemaFormat(NamedSchema):
    """JSON of a schema, as responses ask for it."""

    type: Literal["json_schema"]


class ConstraintField(StrictBody):
    """What the text must be: exactly one of these."""

    choices: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = Field(
        default=None, description="One of these texts."
    )
    regex: Annotated[str, StringConstraints(max_length=MAX_REGEX_CHARACTERS)] | None = Field(
        default=None, description="A text that matches this expression, in the syntax of Rust."
    )
    json_schema: Schema | None = Field(default=None, description="JSON that this schema allows.")
    grammar: Annotated[str, StringConstraints(max_length=MAX_SOURCE_CHARACTERS)] | None = Field(
        default=None, description="A text of this grammar, in Lark's syntax."
    )


ChatFormat = PlainFormat | JsonObjectFormat | ChatSchemaFormat
ResponseFormat = PlainFormat | JsonObjectFormat | ResponseSchemaFormat
FORMATS = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", ...} with a name and a schema'


def constraint_of_field(given: ConstraintField) -> Constraint:
    """The constraint of edgelm's own field. Raises ApiError."""
    kinds = [name for name in ("choices", "regex", "json_schema", "grammar") if getattr(given, name) is not None]
    if len(kinds) != 1:
        raise ApiError(400, "constraint takes one of choices, regex, json_schema and grammar", param="constraint")
    try:
        if given.choices is not None:
            return Choices(given.choices)
        if given.regex is not None:
            return Regex(given.regex)
        if given.json_schema is not None:
            return JsonSchema(given.json_schema)
        return Grammar(given.grammar or "")
    except ConfigError as error:
        raise ApiError(400, str(error), param="constraint") from None


def constraint_of_format(given: ChatFormat | ResponseFormat | None, field: str) -> Constraint | None:
    """The constraint that a response format means; None for any text. Messages call it `field`. Raises ApiError."""
    if given is None or isinstance(given, PlainFormat):
        return None
    if isinstance(given, JsonObjectFormat):
        return JsonSchema({"type": "object"})
    schema = given.json_schema.schema_ if isinstance(given, ChatSchemaFormat) else given.schema_
    try:
        return JsonSchema(schema)
    except ConfigError as error:
        raise ApiError(400, str(error), param=field) from None
