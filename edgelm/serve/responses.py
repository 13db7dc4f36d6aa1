"""``POST /v1/responses``: OpenAI's newer form of a conversation, its part for text. Nothing is stored."""

import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, Field
from starlette.responses import Response

from edgelm.decoding.generation_config import GenerationOptions
from edgelm.errors import EdgelmError
from edgelm.generation.results import Stats, TextEnd
from edgelm.scoring.results import TokenLogprobs
from edgelm.serve.call import Call
from edgelm.serve.completions import openai_reason
from edgelm.serve.constraints import FORMATS, PlainFormat, ResponseFormat, constraint_of_format
from edgelm.serve.conversation import (
    NO_EFFORT,
    NO_TOOLS,
    NOTHING_STORED,
    TEXT_ONLY,
    Content,
    ConversationFields,
    Metadata,
    NoAnnotations,
    ShortText,
    TextPart,
    TokenWithTop,
    message_of,
    prompt_of,
    token_logprobs,
)
from edgelm.serve.errors import ApiError, api_error
from edgelm.serve.fields import SamplingFields, Text, sampling_options
from edgelm.serve.generating import Generation
from edgelm.serve.limits import MAX_MESSAGES, MAX_PROMPT_CHARACTERS, MAX_TOOLS, MAX_TOP_LOGPROBS
from edgelm.serve.operation import Operation, json_answer
from edgelm.serve.sse import Event, EventStream
from edgelm.serve.strict import NO_EFFECT, OnlyFalse, StrictBody, in_words, unsupported
from edgelm.serve.tools import (
    CHOICE_MEANING,
    TOOLS_MEANING,
    CallId,
    FunctionName,
    ResponseNamedTool,
    ResponseTool,
    ResponseToolChoice,
    Word,
    answer_constraint,
    declared,
    message_call,
)
from edgelm.text.messages import ChatMessage
from edgelm.text.tools import ToolCall

_LOGPROBS = "message.output_text.logprobs"
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class ItemPart(TextPart):
    """A part of a message: what a user wrote, or what a model answered earlier."""

    type: Literal["input_text", "output_text"]
    annotations: NoAnnotations = Field(default=None, description=NO_EFFECT + "only an empty list is taken.")
    logprobs: Annotated[list[Any], Field(max_length=MAX_PROMPT_CHARACTERS)] | None = Field(
        default=None, description=NO_EFFECT + "an earlier answer is read as text."
    )


class InputItem(StrictBody):
    """A message of the conversation; an item of an earlier response's `output` is one too."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content[ItemPart]
    id: ShortText | None = Field(default=None, description=NO_EFFECT + "nothing is stored.")
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(
        default=None, description=NO_EFFECT + "a message is what it says."
    )
    phase: None = unsupported(NO_EFFORT)


class CallItem(StrictBody):
    """A call that the assistant made; an item of an earlier response's `output` is one."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: Text = Field(description="A JSON object.")
    id: ShortText | None = Field(default=None, description=NO_EFFECT + "nothing is stored.")
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(
        default=None, description=NO_EFFECT + "a call is what it says."
    )
    namespace: None = unsupported(NO_TOOLS)
    caller: None = unsupported(NO_TOOLS)


class CallOutputItem(StrictBody):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Content[ItemPart]
    id: ShortText | None = Field(default=None, description=NO_EFFECT + "nothing is stored.")
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(
        default=None, description=NO_EFFECT + "a result is what it says."
    )


class TextOptions(StrictBody):
    """Options of the answer's text."""

    format: Annotated[ResponseFormat | None, in_words(FORMATS)] = Field(
        default=None, description="Any text, any JSON object, or JSON of a schema, which is always obeyed."
    )
    verbosity: None = unsupported(NO_EFFORT)


class ResponseStreamOptions(StrictBody):
    """Options of a streamed answer."""

    include_obfuscation: bool | None = Field(default=None, description=NO_EFFECT + "chunks are never padded.")


class ResponseRequest(SamplingFields, ConversationFields):
    """A conversation to answer."""

    input: Annotated[
        Text | Annotated[list[InputItem | CallItem | CallOutputItem], Field(min_length=1, max_length=MAX_MESSAGES)],
        in_words(
            f"a text of at most {MAX_PROMPT_CHARACTERS:,} characters, or a list of 1 to {MAX_MESSAGES:,} messages with "
            "a role (user, assistant, system, developer) and text content, calls of functions, and their outputs"
        ),
    ] = Field(description="What the user says, or the messages of a conversation.")
    instructions: Text | None = Field(default=None, description="A system message before the input.")
    max_output_tokens: int | None = Field(
        default=None, ge=1, lt=2**31, description="Maximum number of new tokens; by default the model's, or 128."
    )
    stream: bool | None = Field(default=None, description="Send the text piece by piece, as server-sent events.")
    stream_options: ResponseStreamOptions | None = Field(default=None, description="Only with `stream`.")
    include: list[Literal["message.output_text.logprobs"]] | None = Field(
        default=None, max_length=1, description="Ask for the log-probability of each token."
    )
    top_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_TOP_LOGPROBS, description="Return so many of the likeliest tokens; with `include`."
    )
    text: TextOptions | None = Field(default=None, description="What the answer must be.")
    metadata: Metadata | None = Field(default=None, description="Repeated in the answer.")
    background: OnlyFalse | None = Field(default=None, description=NO_EFFECT + "the answer is waited for.")
    truncation: Literal["disabled"] | None = Field(
        default=None, description=NO_EFFECT + "a conversation that does not fit is an error."
    )
    tools: list[ResponseTool] | None = Field(default=None, max_length=MAX_TOOLS, description=TOOLS_MEANING)
    tool_choice: ResponseToolChoice = Field(default=None, description=CHOICE_MEANING)
    max_tool_calls: None = unsupported(NO_TOOLS)
    previous_response_id: None = unsupported(NOTHING_STORED)
    conversation: None = unsupported(NOTHING_STORED)
    prompt: None = unsupported(NOTHING_STORED)
    background_options: None = unsupported(NOTHING_STORED)
    context_management: None = unsupported(NOTHING_STORED)
    reasoning: None = unsupported(NO_EFFORT)
    image: None = unsupported(TEXT_ONLY)
    access_programs: None = unsupported("this server has no programs")


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[None] = Field(default=[])
    logprobs: list[TokenWithTop] = Field(default=[])


class OutputMessage(BaseModel):
    """The assistant's message."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class OutputCall(BaseModel):
    """A complete call of a function."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: Status = "completed"
    call_id: str
    """What the output of the call names."""
    name: str
    arguments: str
    """A JSON object that the function's parameters allow."""


class InputTokensDetails(BaseModel):
    """What is known of a prompt's tokens."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """What is known of an answer's tokens."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Token counts as in OpenAI's responses."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, stats: Stats) -> "ResponseUsage":
        """The counts of one text."""
        return cls(
            input_tokens=stats.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=stats.reused_tokens),
            output_tokens=stats.new_tokens,
            output_tokens_details=OutputTokensDetails(),
            total_tokens=stats.prompt_tokens + stats.new_tokens,
        )


class ResponseFailure(BaseModel):
    """Why there is no answer."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(BaseModel):
    """Why an answer is cut off."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class TextSettings(BaseModel):
    """The settings of the text."""

    format: ResponseFormat = PlainFormat(type="text")


class ResponseAnswer(BaseModel):
    """An answer, or the state of one that is being written."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None
    text: TextSettings
    tool_choice: Word | ResponseNamedTool
    tools: list[ResponseTool]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, str]


class ResponseEvent(BaseModel):
    """One event of a streamed answer: which of the fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponseAnswer | None = None
    output_index: int | None = None
    item: OutputMessage | OutputCall | None = None
    item_id: str | None = None
    content_index: int | None = None
    part: OutputText | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[TokenWithTop] | None = None


async def respond(call: Call, body: ResponseRequest) -> Response:
    """Answer a request for a response."""
    work = _Responding(call, body)
    generation = await work.submit()
    if body.stream:
        return EventStream(work.events(generation), named=True)
    return json_answer(await work.whole(generation))


@dataclass
class _Responding:
    """One request, carried out."""

    call: Call
    body: ResponseRequest
    _id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(24)}")
    _item_id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(24)}")
    _sent: int = 0

    def __post_init__(self) -> None:
        body = self.body
        if body.top_logprobs and not body.include:
            raise ApiError(400, f'top_logprobs needs include: ["{_LOGPROBS}"]', param="top_logprobs")
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        if body.max_output_tokens is not None:
            self.call.check_max_tokens(body.max_output_tokens, "max_output_tokens")

    async def submit(self) -> Generation:
        """Render the messages and queue the answer. Raises what the status shall tell."""
        body = self.body
        options = cast(GenerationOptions, sampling_options(body))
        if body.max_output_tokens is not None:
            options["max_new_tokens"] = body.max_output_tokens
        constraint = None if body.text is None else constraint_of_format(body.text.format, "text.format")
        tools = declared(body.tools)
        constraint = await answer_constraint(self.call, constraint, tools, body.tool_choice, body.parallel_tool_calls)
        if constraint is not None:
            options["constraint"] = constraint
        if body.include:
            options["logprobs"] = body.top_logprobs or 0
        ids = await prompt_of(self.call, self._messages(), "input", tools)
        return await self.call.submit(ids, options)

    async def whole(self, generation: Generation) -> ResponseAnswer:
        """The answer in one piece."""
        completion = await generation.completion()
        (choice,) = completion.choices
        status, output = _status(choice.finish_reason), list[OutputMessage | OutputCall]()
        if choice.text or not choice.tool_calls:
            output.append(self._message(status, OutputText(text=choice.text, logprobs=_logprobs(choice.logprobs))))
        output += map(_output_call, choice.tool_calls)
        return self._answer(status, output, completion.stats)

    async def events(self, generation: Generation) -> AsyncGenerator[Event, None]:
        """The answer as a stream, with the events of OpenAI's."""
        answer = self._answer("in_progress")
        yield self._event("response.created", response=answer)
        yield self._event("response.in_progress", response=answer)
        output = list[OutputMessage | OutputCall]()
        place: dict[str, Any] | None = None  # of the message, once it has begun
        text, logprobs = "", list[TokenWithTop]()
        status: Status = "completed"
        stats: Stats | None = None
        try:
            async with aclosing(generation.chunks()) as chunks:
                async for chunk in chunks:
                    new = [] if chunk.tool_calls else _logprobs(chunk.logprobs)
                    text, logprobs = text + chunk.text, logprobs + new
                    ends_empty = chunk.finish_reason is not None and not (output or chunk.tool_calls)
                    if place is None and (chunk.text or new or ends_empty):
                        place = {"item_id": self._item_id, "output_index": len(output), "content_index": 0}
                        output.append(self._message("in_progress"))
                        yield self._event("response.output_item.added", output_index=len(output) - 1, item=output[-1])
                        yield self._event("response.content_part.added", **place, part=OutputText(text=""))
                    if place is not None and (chunk.text or new):
                        yield self._event("response.output_text.delta", **place, delta=chunk.text, logprobs=new)
                    for call in map(_output_call, chunk.tool_calls):
                        for event in self._call_events(call, len(output)):
                            yield event
                        output.append(call)
                    if chunk.finish_reason is not None:
                        status, stats = _status(chunk.finish_reason), chunk.stats
        except EdgelmError as error:
            failed = self._answer("failed", error=_failure(error))
            yield self._event("response.failed", response=failed)
            return
        if place is not None:
            part, index = OutputText(text=text, logprobs=logprobs), place["output_index"]
            output[index] = self._message(status, part)
            yield self._event("response.output_text.done", **place, text=text, logprobs=logprobs)
            yield self._event("response.content_part.done", **place, part=part)
            yield self._event("response.output_item.done", output_index=index, item=output[index])
        yield self._event(f"response.{status}", response=self._answer(status, output, stats))

    def _call_events(self, call: OutputCall, index: int) -> Iterator[dict[str, Any]]:
        """A call, which is there at once, in the events of one that grows."""
        place: dict[str, Any] = {"item_id": call.id, "output_index": index}
        begun = call.model_copy(update={"status": "in_progress", "arguments": ""})
        yield self._event("response.output_item.added", output_index=index, item=begun)
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        yield self._event("response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
        yield self._event("response.output_item.done", output_index=index, item=call)

    def _messages(self) -> list[ChatMessage]:
        """The conversation; calls that follow one another, or a message of the assistant, are one answer of it."""
        body = self.body
        messages = [] if body.instructions is None else [message_of("system", body.instructions)]
        if isinstance(body.input, str):
            return [*messages, message_of("user", body.input)]
        for item in body.input:
            if isinstance(item, InputItem):
                messages.append(message_of(item.role, item.content))
            elif isinstance(item, CallOutputItem):
                messages.append(message_of("tool", item.output) | {"tool_call_id": item.call_id})
            else:
                call = message_call(item.call_id, item.name, item.arguments)
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append(message_of("assistant", None))
                messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", ()), call]
        return messages

    def _event(self, type: str, **fields: Any) -> dict[str, Any]:
        event = ResponseEvent(type=type, sequence_number=self._sent, **fields)
        self._sent += 1
        return {name: value for name, value in event.model_dump(mode="json").items() if name in event.model_fields_set}

    def _message(self, status: Status, text: OutputText | None = None) -> OutputMessage:
        return OutputMessage(id=self._item_id, status=status, content=[] if text is None else [text])

    def _answer(
        self,
        status: Status,
        output: Sequence[OutputMessage | OutputCall] = (),
        stats: Stats | None = None,
        error: ResponseFailure | None = None,
    ) -> ResponseAnswer:
        body, call = self.body, self.call
        return ResponseAnswer(
            id=self._id,
            created_at=call.created,
            completed_at=int(time.time()) if status == "completed" else None,
            status=status,
            error=error,
            incomplete_details=IncompleteDetails() if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            model=call.name,
            output=list(output),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=body.temperature,
            text=TextSettings(format=body.text.format) if body.text and body.text.format else TextSettings(),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_logprobs=body.top_logprobs or 0,
            top_p=body.top_p,
            usage=None if stats is None else ResponseUsage.of(stats),
            metadata=body.metadata or {},
        )


def _status(reason: TextEnd) -> Status:
    return "completed" if openai_reason(reason) == "stop" else "incomplete"


def _output_call(call: ToolCall) -> OutputCall:
    item_id = f"fc_{secrets.token_hex(24)}"
    return OutputCall(id=item_id, call_id=call.id, name=call.name, arguments=call.arguments)


def _logprobs(tokens: tuple[TokenLogprobs, ...] | None) -> list[TokenWithTop]:
    return token_logprobs(tokens or ())


def _failure(error: EdgelmError) -> ResponseFailure:
    """An error while an answer is written, in the words of a response."""
    told = api_error(error, "input")
    codes: dict[int, Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]]
    codes = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
    return ResponseFailure(code=codes.get(told.status, "server_error"), message=told.message)


RESPONSES = Operation(
    "/v1/responses",
    ResponseRequest,
    ResponseAnswer,
    respond,
    "Answer conversations, in the newer form.",
    event=ResponseEvent,
    prompt_field="input",
)
