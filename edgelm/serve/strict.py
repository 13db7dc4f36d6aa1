"""The base of every request's fields: what is not declared is refused, and so is what is declared as unsupported."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

UNSUPPORTED = "Not supported: "
"""Begins the description of a field that only null may be given for; the rest says why."""
NO_EFFECT = "No effect: "
"""Begins the description of a field that is accepted because ignoring it changes nothing for the client."""


class StrictBody(BaseModel):
    """The base of every request: no undeclared fields, no conversions between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def unsupported(reason: str) -> Any:
    """A field of OpenAI's API that edgelm does not support; null is allowed."""
    return Field(default=None, description=UNSUPPORTED + reason)


def in_words(words: str) -> WrapValidator:
    """Replace the errors of all members of a union by one sentence."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("union", f"must be {words}") from None

    return WrapValidator(check)


def _truth_value(value: Any) -> Any:
    if not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "should be a valid boolean")
    return value


OnlyFalse = Annotated[Literal[False], BeforeValidator(_truth_value)]
"""False; 0, which Python takes for the same, is refused."""
