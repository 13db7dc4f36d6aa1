"""Functions that a client declares, and calls of them, in the two shapes of OpenAI's API."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from edgelm.errors import ConfigError, PromptError
from edgelm.serve.call import Call
from edgelm.serve.constraints import Schema
from edgelm.serve.conversation import with_template
from edgelm.serve.errors import ApiError
from edgelm.serve.fields import Text
from edgelm.serve.limits import MAX_TOOLS
from edgelm.serve.strict import NO_EFFECT, StrictBody, in_words
from edgelm.text.constraints import Constraint
from edgelm.text.messages import MessageCall
from edgelm.text.tools import FUNCTION_NAME, FunctionDeclaration, Tool, ToolCall, ToolChoice

TOOLS_MEANING = f"Functions that the model may call, {MAX_TOOLS} at most; where the bundle's chat template has tools."

FunctionName = Annotated[str, StringConstraints(pattern=f"^{FUNCTION_NAME.pattern}$")]
CallId = Annotated[str, StringConstraints(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class Function(StrictBody):
    """A function that the model may call."""

    name: FunctionName
    description: Text | None = Field(default=None, description="What it does; the model reads it.")
    parameters: Schema | None = Field(
        default=None, description="The JSON schema of its arguments, an object, which is always obeyed."
    )
    strict: bool | None = Field(default=None, description=NO_EFFECT + "parameters are always obeyed.")

    @property
    def tool(self) -> Tool:
        """The function as the template sees it."""
        function = FunctionDeclaration(name=self.name)
        if self.description is not None:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        return Tool(type="function", function=function)


class ChatTool(StrictBody):
    """A tool, as chat completions have it."""

    type: Literal["function"]
    function: Function

    @property
    def tool(self) -> Tool:
        """The tool as the template sees it."""
        return self.function.tool


class ResponseTool(Function):
    """A tool, as responses have it."""

    type: Literal["function"]


class FunctionByName(StrictBody):
    """The name of a function."""

    name: FunctionName


class ChatNamedTool(StrictBody):
    """A function that is to be called, as chat completions name it."""

    type: Literal["function"]
    function: FunctionByName


class ResponseNamedTool(FunctionByName):
    """A function that is to be called, as responses name it."""

    type: Literal["function"]


Word = Literal["none", "auto", "required"]
CHOICE_MEANING = "Whether functions are called: never, where the model wants to, at least one, or the named one once."
ChatToolChoice = Annotated[
    Word | ChatNamedTool | None,
    in_words('"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'),
]
ResponseToolChoice = Annotated[
    Word | ResponseNamedTool | None, in_words('"none", "auto", "required" or {"type": "function", "name": ...}')
]


class CalledFunction(StrictBody):
    """What was called."""

    name: FunctionName
    arguments: Text = Field(description="A JSON object.")


class EarlierCall(StrictBody):
    """A call in an earlier answer."""

    id: CallId
    type: Literal["function"]
    function: CalledFunction

    @property
    def call(self) -> MessageCall:
        """The call for the template."""
        return message_call(self.id, self.function.name, self.function.arguments)


class AnswerFunction(BaseModel):
    """What is called."""

    name: str
    arguments: str
    """A JSON object that the function's parameters allow."""


class AnswerCall(BaseModel):
    """A complete call in an answer of chat completions."""

    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction

    @classmethod
    def of(cls, call: ToolCall) -> "AnswerCall":
        """`call` in this shape."""
        return cls(id=call.id, function=AnswerFunction(name=call.name, arguments=call.arguments))


class DeltaCall(AnswerCall):
    """A call in a stream, whole: there is one delta for each."""

    index: int


def message_call(call_id: str, name: str, arguments: str) -> MessageCall:
    """An earlier call for the template."""
    return MessageCall(id=call_id, type="function", function={"name": name, "arguments": arguments})


def declared(tools: Sequence[ChatTool | ResponseTool] | None) -> list[Tool]:
    """The tools of a request as the template sees them."""
    return [tool.tool for tool in tools or ()]


async def answer_constraint(
    call: Call,
    given: Constraint | None,
    tools: Sequence[Tool],
    choice: Word | ChatNamedTool | ResponseNamedTool | None,
    parallel: bool | None,
) -> Constraint | None:
    """What an answer must be, with a constraint `given` by other fields. Raises ApiError."""
    name = None if choice is None or isinstance(choice, str) else _name(choice)
    wanted: ToolChoice = choice if isinstance(choice, str) else "auto"
    if name is not None:
        if all(tool["function"]["name"] != name for tool in tools):
            raise ApiError(400, f"tool_choice names {name!r}, which is no function of tools", param="tool_choice")
        wanted = {"type": "function", "function": {"name": name}}
    if not tools:
        if wanted == "required":
            raise ApiError(400, "tool_choice is 'required', but there are no tools", param="tool_choice")
        return given
    if given is not None and wanted == "none":
        return given
    if given is not None:
        message = 'other fields say what the answer must be: drop them, or tools, or say tool_choice "none"'
        raise ApiError(400, message, param="tools")
    make = partial(call.model.tool_use, tools, tool_choice=wanted, parallel_tool_calls=parallel is not False)
    try:
        return await with_template(make, "tools")
    except (PromptError, ConfigError) as error:
        raise ApiError(400, str(error), param="tools") from None


def _name(choice: ChatNamedTool | ResponseNamedTool) -> str:
    return choice.function.name if isinstance(choice, ChatNamedTool) else choice.name
