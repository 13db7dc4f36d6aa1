"""``POST /v1/completions``: texts continue."""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, Field
from starlette.responses import Response

from edgelm.generation.results import Choice, Chunk, Completion, Stats, TextEnd
from edgelm.serve.call import Call
from edgelm.serve.echo import NO_ECHO, CompletionLogprobs, offsets_of, read_echo
from edgelm.serve.errors import ApiError
from edgelm.serve.fields import PLAIN_TEXTS, GenerationFields, Text, TokenIds, own, prompts_of
from edgelm.serve.generating import Generation, Usage
from edgelm.serve.limits import MAX_CHOICES, MAX_PROMPTS, MAX_TOP_LOGPROBS
from edgelm.serve.merging import merged
from edgelm.serve.operation import Operation, json_answer
from edgelm.serve.sse import Event, EventStream
from edgelm.serve.strict import in_words, unsupported
from edgelm.text.prompts import Prompt
from edgelm.text.stream_decoder import StreamDecoder

OpenAiReason = Literal["stop", "length"]
Prompts = Annotated[
    Text
    | TokenIds
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)],
    in_words(f"{PLAIN_TEXTS}; at most {MAX_PROMPTS} prompts"),
]


class CompletionRequest(GenerationFields):
    """A prompt, or several, to continue."""

    prompt: Prompts = Field(description="A text, token ids, or a list of texts or of lists of token ids.")
    max_tokens: int | None = Field(
        default=None, ge=0, lt=2**31, description="Maximum number of new tokens; by default the model's, or 128."
    )
    best_of: int | None = Field(
        default=None, ge=1, le=MAX_CHOICES, description="Generate so many, and return the `n` likeliest per token."
    )
    echo: bool | None = Field(default=None, description="Return the prompt before its continuation.")
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_TOP_LOGPROBS, description="Log-probabilities of each token and of so many likeliest."
    )
    token_healing: bool | None = own("token_healing")
    suffix: None = unsupported("these models continue texts, they do not fill gaps")


class CompletionChoice(BaseModel):
    """One text, or a piece of it."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: OpenAiReason | None = None
    edgelm_finish_reason: TextEnd | None = None
    """The reason in edgelm's own words."""


class CompletionAnswer(BaseModel):
    """The texts, or one event of a stream of them."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


def openai_reason(reason: TextEnd | None) -> OpenAiReason | None:
    """Why a text ended, in OpenAI's words: "eos" is "stop"; whatever cut a text off is "length"."""
    if reason is None:
        return None
    return "stop" if reason in ("eos", "stop", "tool_calls") else "length"


async def complete(call: Call, body: CompletionRequest) -> Response:
    """Answer a request for completions."""
    work = _Completions(call, body)
    await work.begin()
    if body.stream:
        return EventStream(work.events())
    with work.texts:
        return json_answer(await work.whole())


@dataclass
class _Row:
    """A text that grows: the place in it that is reached, and what decodes its tokens."""

    decoder: StreamDecoder
    offset: int

    def logprobs(self, piece: Choice | Chunk) -> CompletionLogprobs | None:
        """Those of the tokens of `piece`, the row's next one, if it has any.

        The end token is among them, as OpenAI's is: lm-eval takes the last token for the generated one, and would
        leave out the prompt's last token where the model has nothing to add.
        """
        start, self.offset = self.offset, self.offset + len(piece.text)
        if piece.logprobs is None:
            return None
        offsets = offsets_of(self.decoder, piece.token_ids, start=start)
        tokens = CompletionLogprobs.of(piece.logprobs, [min(offset, self.offset) for offset in offsets])
        if piece.end_logprobs is None:
            return tokens
        return tokens.followed_by(CompletionLogprobs.of([piece.end_logprobs], [self.offset]))


@dataclass
class _Completions:
    """One request, carried out."""

    call: Call
    body: CompletionRequest
    prompts: list[Prompt] = field(init=False)
    texts: ExitStack = field(default_factory=ExitStack)
    """Closing it cancels the texts that still run."""

    def __post_init__(self) -> None:
        body, call = self.body, self.call
        self.prompts = prompts_of(body.prompt)
        self._choices = body.n or 1
        self._best_of = max(body.best_of or 1, self._choices)
        if body.best_of is not None and body.best_of < self._choices:
            raise ApiError(400, f"best_of is {body.best_of}, but n is {self._choices}: raise best_of", param="best_of")
        if body.stream and self._best_of > self._choices:
            raise ApiError(400, "best_of cannot be streamed: drop stream, or best_of", param="best_of")
        if len(self.prompts) * self._best_of > MAX_PROMPTS:
            raise ApiError(
                400, f"{len(self.prompts)} prompts of {self._best_of} texts are more than {MAX_PROMPTS}", param="prompt"
            )
        if body.max_tokens is not None:
            call.check_max_tokens(body.max_tokens, "max_tokens")
        self._options = body.generation_options(body.max_tokens)
        if body.token_healing:
            if body.logprobs is not None:
                raise ApiError(
                    400,
                    "token_healing and logprobs do not go together: a token that begins inside the prompt has no "
                    "text_offset",
                    param="token_healing",
                )
            self._options["token_healing"] = True
        if body.logprobs is not None or self._best_of > self._choices:
            self._options["logprobs"] = body.logprobs or 0
        self._rows = call.ask_for_rows(self._best_of, self._options)
        self._copies = self._choices if self._rows == 1 else 1
        self._fingerprint = call.fingerprint
        self._id, self._echoes = f"cmpl-{secrets.token_hex(12)}", [NO_ECHO] * len(self.prompts)
        self._generations: list[Generation] = []

    @property
    def _only_echoes(self) -> bool:
        return bool(self.body.echo) and self.body.max_tokens == 0

    async def begin(self) -> None:
        """Read the echoes and submit the prompts. Raises what an answer's status shall tell."""
        call, body = self.call, self.body
        if body.echo:
            self._echoes = [await read_echo(call, prompt, body.logprobs) for prompt in self.prompts]
        if self._only_echoes:
            return
        with ExitStack() as texts:
            for prompt in self.prompts:
                generation = await call.submit(prompt, self._options, max_time=body.max_time)
                texts.callback(generation.submission.cancel)
                self._generations.append(generation)
            self.texts = texts.pop_all()

    async def whole(self) -> CompletionAnswer:
        """The answer in one piece."""
        if self._only_echoes:
            choices = [
                self._echoed(number, copy) for number in range(len(self.prompts)) for copy in range(self._choices)
            ]
            for choice in choices:
                choice.finish_reason, choice.edgelm_finish_reason = "length", "length"
            return self._answer(choices, self._usage([]))
        completions = await asyncio.gather(*(generation.completion() for generation in self._generations))
        choices = [
            self._choice(number, place, choice)
            for number, completion in enumerate(completions)
            for place, choice in enumerate(self._chosen(completion))
        ]
        return self._answer(choices, self._usage([completion.stats for completion in completions]))

    async def events(self) -> AsyncGenerator[Event, None]:
        """The answer as a stream."""
        body, stats = self.body, []
        counts = body.wants_usage
        without = set() if counts else {"usage"}
        with self.texts:
            if body.echo:
                for number in range(len(self.prompts)):
                    for copy in range(self._choices):
                        choice = self._echoed(number, copy)
                        if self._only_echoes:
                            choice.finish_reason, choice.edgelm_finish_reason = "length", "length"
                        yield self._answer([choice]).model_dump(exclude=without)
            rows = [[self._row(number) for _ in range(self._rows)] for number in range(len(self.prompts))]
            async with aclosing(merged([generation.chunks() for generation in self._generations])) as chunks:
                async for number, chunk in chunks:
                    piece = self._piece(chunk, rows[number][chunk.index])
                    for copy in range(self._copies):
                        piece.index = number * self._choices + chunk.index + copy
                        yield self._answer([piece]).model_dump(exclude=without)
                    if chunk.stats is not None:
                        stats.append(chunk.stats)
        if counts:
            yield self._answer([], self._usage(stats))

    def _row(self, number: int) -> _Row:
        return _Row(self.call.model.tokenizer.stream(skip_special_tokens=True), len(self._echoes[number].text))

    def _piece(self, chunk: Chunk, row: _Row) -> CompletionChoice:
        return CompletionChoice(
            text=chunk.text,
            index=0,
            logprobs=row.logprobs(chunk),
            finish_reason=openai_reason(chunk.finish_reason),
            edgelm_finish_reason=chunk.finish_reason,
        )

    def _echoed(self, number: int, copy: int) -> CompletionChoice:
        echo = self._echoes[number]
        return CompletionChoice(text=echo.text, index=number * self._choices + copy, logprobs=echo.logprobs)

    def _chosen(self, completion: Completion) -> list[Choice]:
        """The choices to return: copies of the only one, all of them, or the likeliest per token."""
        if self._rows == 1:
            return [completion.choices[0]] * self._choices
        if self._rows == self._choices:
            return list(completion.choices)
        return sorted(completion.choices, key=_logprob_per_token, reverse=True)[: self._choices]

    def _choice(self, number: int, place: int, choice: Choice) -> CompletionChoice:
        echo, row = self._echoes[number], self._row(number)
        logprobs = row.logprobs(choice) if self.body.logprobs is not None else None  # best_of has them for itself
        if logprobs is not None and echo.logprobs is not None:
            logprobs = echo.logprobs.followed_by(logprobs)
        return CompletionChoice(
            text=echo.text + choice.text,
            index=number * self._choices + place,
            logprobs=logprobs,
            finish_reason=openai_reason(choice.finish_reason),
            edgelm_finish_reason=choice.finish_reason,
        )

    def _answer(self, choices: list[CompletionChoice], usage: Usage | None = None) -> CompletionAnswer:
        call = self.call
        return CompletionAnswer(
            id=self._id,
            created=call.created,
            model=call.name,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage,
        )

    def _usage(self, stats: list[Stats]) -> Usage:
        if self._only_echoes:
            return Usage.counted(sum(echo.prompt_tokens for echo in self._echoes))
        return Usage.of(stats, self._copies)


def _logprob_per_token(choice: Choice) -> float:
    """The mean log-probability of a text's tokens; that of an empty text is below all others."""
    tokens = choice.logprobs or ()
    return sum(token.logprob for token in tokens) / len(tokens) if tokens else float("-inf")


COMPLETIONS = Operation(
    "/v1/completions",
    CompletionRequest,
    CompletionAnswer,
    complete,
    "Continue texts.",
    event=CompletionAnswer,
)
