"""``POST /v1/chat/completions``: answers to conversations, by the bundle's chat template."""

import secrets
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer
from starlette.responses import Response

from edgelm.generation.results import Choice, Chunk, TextEnd
from edgelm.scoring.results import TokenLogprobs
from edgelm.serve.call import Call
from edgelm.serve.completions import OpenAiReason, openai_reason
from edgelm.serve.constraints import FORMATS, ChatFormat, constraint_of_format
from edgelm.serve.conversation import (
    NO_EFFORT,
    NO_TOOLS,
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
from edgelm.serve.errors import ApiError
from edgelm.serve.fields import GenerationFields
from edgelm.serve.generating import Generation, Usage
from edgelm.serve.limits import MAX_MESSAGES, MAX_TOOLS, MAX_TOP_LOGPROBS
from edgelm.serve.operation import Operation, json_answer
from edgelm.serve.sse import Event, EventStream
from edgelm.serve.strict import NO_EFFECT, StrictBody, in_words, unsupported
from edgelm.serve.tools import (
    CHOICE_MEANING,
    TOOLS_MEANING,
    AnswerCall,
    CallId,
    ChatTool,
    ChatToolChoice,
    DeltaCall,
    EarlierCall,
    answer_constraint,
    declared,
)
from edgelm.text.messages import ChatMessage

ChatReason = Literal[OpenAiReason, "tool_calls"]
OLDER_TOOLS = "it is the older form of tools"


class MessagePart(TextPart):
    """A part of a message."""

    type: Literal["text"]


class RequestMessage(StrictBody):
    """A message of the conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Content[MessagePart] | None = Field(
        default=None, description="A text, or parts of text; may be missing beside `tool_calls` only."
    )
    name: ShortText | None = Field(default=None, description="The speaker's name, for templates that write it.")
    tool_calls: Annotated[list[EarlierCall], Field(min_length=1, max_length=MAX_TOOLS)] | None = Field(
        default=None, description="Calls that the assistant made."
    )
    tool_call_id: CallId | None = Field(default=None, description="The call whose result a message of a tool is.")
    refusal: None = unsupported("a refusal is a text")
    annotations: NoAnnotations = Field(default=None, description=NO_EFFECT + "only an empty list is taken.")
    audio: None = unsupported(TEXT_ONLY)
    function_call: None = unsupported(OLDER_TOOLS)

    def message(self, place: str) -> ChatMessage:
        """The message for the template. Raises ApiError, which calls it `place`."""
        if self.content is None and not self.tool_calls:
            raise ApiError(400, f"{place}.content is missing: give a text", param=f"{place}.content")
        message = message_of(self.role, self.content, self.name)
        if self.tool_calls:
            message["tool_calls"] = [call.call for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class ChatRequest(GenerationFields, ConversationFields):
    """A conversation to answer."""

    messages: list[RequestMessage] = Field(min_length=1, max_length=MAX_MESSAGES, description="Who said what.")
    max_completion_tokens: int | None = Field(
        default=None, ge=1, lt=2**31, description="Maximum number of new tokens; by default the model's, or 128."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, lt=2**31, description="The older name of `max_completion_tokens`."
    )
    logprobs: bool | None = Field(default=None, description="Return the log-probability of each token.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_TOP_LOGPROBS, description="Return so many of the likeliest tokens; with `logprobs`."
    )
    response_format: Annotated[ChatFormat | None, in_words(FORMATS)] = Field(
        default=None, description="Any text, any JSON object, or JSON of a schema, which is always obeyed."
    )
    modalities: list[Literal["text"]] | None = Field(default=None, max_length=1, description="Only text.")
    metadata: Metadata | None = Field(default=None, description=NO_EFFECT + "nothing is stored.")
    tools: list[ChatTool] | None = Field(default=None, max_length=MAX_TOOLS, description=TOOLS_MEANING)
    tool_choice: ChatToolChoice = Field(default=None, description=CHOICE_MEANING)
    functions: None = unsupported(OLDER_TOOLS)
    function_call: None = unsupported(OLDER_TOOLS)
    web_search_options: None = unsupported(NO_TOOLS)
    audio: None = unsupported(TEXT_ONLY)
    prediction: None = unsupported("no text is predicted")
    reasoning_effort: None = unsupported(NO_EFFORT)
    verbosity: None = unsupported(NO_EFFORT)


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens, in nats."""

    content: list[TokenWithTop]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    """Null where the answer has calls only."""
    refusal: None = None
    tool_calls: list[AnswerCall] | None = None
    """Complete calls; the field is absent without any."""

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name != "tool_calls" or value is not None}


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatReason
    edgelm_finish_reason: TextEnd
    """The reason in edgelm's own words."""


class ChatAnswer(BaseModel):
    """The answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What is new in an answer; the first one has the role, the last one nothing."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[DeltaCall] | None = None

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without nulls: clients put the deltas together."""
        return {name: value for name, value in handler(self).items() if value is not None}


class ChatPiece(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatReason | None = None
    edgelm_finish_reason: TextEnd | None = None


class ChatEvent(BaseModel):
    """One event of a stream of answers."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatPiece]
    usage: Usage | None = None


async def chat(call: Call, body: ChatRequest) -> Response:
    """Answer a request for chat completions."""
    work = _Chat(call, body)
    generation = await work.submit()
    if body.stream:
        return EventStream(work.events(generation))
    return json_answer(await work.whole(generation))


@dataclass
class _Chat:
    """One request, carried out."""

    call: Call
    body: ChatRequest
    _id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")

    def __post_init__(self) -> None:
        call, body = self.call, self.body
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(
                400, "max_tokens is the older name of max_completion_tokens: give one of them", param="max_tokens"
            )
        limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        most = body.max_completion_tokens or body.max_tokens
        if most is not None:
            call.check_max_tokens(most, limit)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        self._options = body.generation_options(most)
        constraint = constraint_of_format(body.response_format, "response_format")
        if constraint is not None and body.constraint is not None:
            raise ApiError(400, "response_format and constraint contradict each other: give one", param="constraint")
        if constraint is not None:
            self._options["constraint"] = constraint
        self._messages = [message.message(f"messages.{index}") for index, message in enumerate(body.messages)]
        self._calls_sent = Counter[int]()
        if body.logprobs:
            self._options["logprobs"] = body.top_logprobs or 0
        count = body.n or 1
        self._rows = call.ask_for_rows(count, self._options)
        self._copies = count // self._rows

    async def submit(self) -> Generation:
        """Render the messages and queue the answer. Raises what the status shall tell."""
        call, body, tools = self.call, self.body, declared(self.body.tools)
        given = self._options.get("constraint")
        constraint = await answer_constraint(call, given, tools, body.tool_choice, body.parallel_tool_calls)
        ids = await prompt_of(call, self._messages, "messages", tools)
        if constraint is not None:
            self._options["constraint"] = constraint
        return await call.submit(ids, self._options, max_time=body.max_time)

    async def whole(self, generation: Generation) -> ChatAnswer:
        """The answer in one piece."""
        call, completion = self.call, await generation.completion()
        choices = [self._choice(choice) for choice in completion.choices for _ in range(self._copies)]
        return ChatAnswer(
            id=self._id,
            created=call.created,
            model=call.name,
            system_fingerprint=call.fingerprint,
            choices=[choice.model_copy(update={"index": index}) for index, choice in enumerate(choices)],
            usage=Usage.of([completion.stats], self._copies),
        )

    async def events(self, generation: Generation) -> AsyncGenerator[Event, None]:
        """The answer as a stream."""
        counts, usage = self.body.wants_usage, None
        without = set() if counts else {"usage"}
        async with aclosing(generation.chunks()) as chunks:
            for index in range(self._rows * self._copies):
                first = ChatPiece(index=index, delta=Delta(role="assistant", content=""))
                yield self._event([first]).model_dump(exclude=without)
            async for chunk in chunks:
                for piece in self._pieces(chunk):
                    for copy in range(self._copies):
                        event = self._event([piece.model_copy(update={"index": chunk.index + copy})])
                        yield event.model_dump(exclude=without)
                if chunk.stats is not None:
                    usage = Usage.of([chunk.stats], self._copies)
        if counts:
            yield self._event([], usage)

    def _event(self, choices: list[ChatPiece], usage: Usage | None = None) -> ChatEvent:
        call = self.call
        return ChatEvent(
            id=self._id,
            created=call.created,
            model=call.name,
            system_fingerprint=call.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _choice(self, choice: Choice) -> ChatChoice:
        reason = _chat_reason(choice.finish_reason)
        assert reason is not None
        message = AnswerMessage(content=choice.text)
        if choice.tool_calls:
            calls = [AnswerCall.of(call) for call in choice.tool_calls]
            message = AnswerMessage(content=choice.text or None, tool_calls=calls)
        return ChatChoice(
            index=0,
            message=message,
            logprobs=self._logprobs(choice.logprobs),
            finish_reason=reason,
            edgelm_finish_reason=choice.finish_reason,
        )

    def _pieces(self, chunk: Chunk) -> list[ChatPiece]:
        """The text and the calls of a chunk, and the end of its answer, which is a piece of its own."""
        pieces = []
        calls = [
            DeltaCall(index=self._calls_sent[chunk.index] + number, **AnswerCall.of(call).model_dump())
            for number, call in enumerate(chunk.tool_calls)
        ]
        self._calls_sent[chunk.index] += len(calls)
        if chunk.text or chunk.token_ids or calls:
            delta = Delta(content=chunk.text or None, tool_calls=calls) if calls else Delta(content=chunk.text)
            pieces.append(ChatPiece(index=0, delta=delta, logprobs=self._logprobs(chunk.logprobs)))
        if chunk.finish_reason is not None:
            pieces.append(
                ChatPiece(
                    index=0,
                    delta=Delta(),
                    finish_reason=_chat_reason(chunk.finish_reason),
                    edgelm_finish_reason=chunk.finish_reason,
                )
            )
        return pieces

    def _logprobs(self, tokens: tuple[TokenLogprobs, ...] | None) -> ChatLogprobs | None:
        return None if tokens is None else ChatLogprobs(content=token_logprobs(tokens))


def _chat_reason(reason: TextEnd | None) -> ChatReason | None:
    return "tool_calls" if reason == "tool_calls" else openai_reason(reason)


CHAT = Operation(
    "/v1/chat/completions",
    ChatRequest,
    ChatAnswer,
    chat,
    "Answer conversations.",
    event=ChatEvent,
    prompt_field="messages",
)
