"""One request to a model, from the body to the answer: what the routes share.

A route is an `Operation`. It reads the body, lends the model for as long as the answer is sent, and stops the work when
the client leaves.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from edgelm.decoding.generation_config import GenerationOptions
from edgelm.errors import EdgelmError, pass_interrupts_on, shown
from edgelm.generation.results import Chunk, Completion, Stats
from edgelm.serve.errors import ApiError, api_error
from edgelm.serve.fields import UNSUPPORTED, Body
from edgelm.serve.metrics import Metrics
from edgelm.serve.settings import ServeSettings
from edgelm.serve.shelf import ServedModel, Shelf
from edgelm.text.prompts import Prompt

if TYPE_CHECKING:
    from edgelm.generation.submission import Submission
    from edgelm.model import Model

log = logging.getLogger(__name__)

Result = TypeVar("Result")


_GRACE_SECONDS = 5.0
"""Texts end by themselves at the server's limit, and then say what they have; scores and vectors are given up."""


class PromptTokensDetails(BaseModel):
    """What is known of a prompt's tokens."""

    cached_tokens: int
    """Tokens that were not computed, because an earlier prompt of the same key began with them."""


class Usage(BaseModel):
    """Token counts as in OpenAI's completions and chats."""

    prompt_tokens: int
    completion_tokens: int
    """Tokens of all texts, those of stop strings and of texts that `best_of` dropped included."""
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, stats: Sequence[Stats], copies: int = 1) -> "Usage":
        """The sum over several prompts, each of whose texts is given `copies` times."""
        return cls.counted(
            sum(one.prompt_tokens for one in stats),
            copies * sum(one.new_tokens for one in stats),
            sum(one.reused_tokens for one in stats),
        )

    @classmethod
    def counted(cls, prompt_tokens: int, new_tokens: int = 0, cached_tokens: int = 0) -> "Usage":
        """These counts and their total."""
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=new_tokens,
            total_tokens=prompt_tokens + new_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )


class Generation:
    """One submitted prompt. Iterate over `chunks` once, or await `completion`; both count it in the metrics."""

    def __init__(self, submission: "Submission", model_name: str, metrics: Metrics, started: float) -> None:
        self.submission = submission
        self._name, self._metrics, self._started = model_name, metrics, started

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return self.submission.prompt_tokens

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """The chunks of all texts as they come; closing the generator stops the work within a token."""
        metrics, name = self._metrics, self._name
        last: dict[int, float] = {}
        open_rows = set(range(self.submission.config.num_return_sequences))
        metrics.prompt_tokens.labels(name).inc(self.prompt_tokens)
        try:
            async for chunk in self.submission:
                now, count = time.monotonic(), len(chunk.token_ids)
                if not last:
                    metrics.first_token_seconds.labels(name).observe(now - self._started)
                elif chunk.index in last:
                    for _ in range(count):
                        metrics.token_seconds.labels(name).observe((now - last[chunk.index]) / count)
                last[chunk.index] = now
                metrics.new_tokens.labels(name).inc(count)
                if chunk.finish_reason is not None:
                    metrics.texts.labels(name, chunk.finish_reason).inc()
                    open_rows.discard(chunk.index)
                if chunk.stats is not None:
                    metrics.reused_tokens.labels(name).inc(chunk.stats.reused_tokens)
                yield chunk
        finally:
            self.submission.cancel()
            metrics.texts.labels(name, "abandoned").inc(len(open_rows))

    async def completion(self) -> Completion:
        """The whole texts."""
        async with aclosing(self.chunks()) as chunks:
            gathered = [chunk async for chunk in chunks]
        return Completion.of_chunks("", gathered, self.submission.seed)


@dataclass(frozen=True)
class Call:
    """What the handler of an `Operation` works with."""

    settings: ServeSettings
    served: ServedModel
    metrics: Metrics
    caller: str
    """Says which requests come with the same API key."""
    created: int
    """When the request came, in seconds since 1970."""

    @property
    def model(self) -> "Model":
        """The model, which stays loaded until the answer is sent."""
        return self.served.model

    @property
    def name(self) -> str:
        """The model's name."""
        return self.served.name

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: equal ones give equal texts for equal seeds."""
        return f"fp_{self.model.bundle.manifest.digest[-10:]}"

    def draws(self, options: GenerationOptions) -> bool:
        """Whether tokens are drawn at random, so that several texts of one prompt differ. Raises ConfigError."""
        return self.model.generation_config.updated(dict(options)).do_sample

    def check_max_tokens(self, count: int, field: str) -> None:
        """Raise ApiError if `count`, the value of `field`, is more than the model's context."""
        context = self.model.bundle.manifest.architecture.context_length
        if count > context:
            raise ApiError(400, f"{field} is {count}, but this model's context holds {context} tokens", param=field)

    async def submit(self, prompt: Prompt, options: GenerationOptions, *, max_time: float | None = None) -> Generation:
        """Queue a text, for at most `max_time` seconds and the server's limit. Raises as `TextScheduler.submit`.

        The prompt is tokenized in a thread.
        """
        scheduler, started = self.served.scheduler, time.monotonic()
        deadline = min(self.settings.max_seconds, max_time or self.settings.max_seconds)

        def submit() -> "Submission":
            return scheduler.submit(prompt, key=self.caller, deadline_seconds=deadline, **options)

        submitted = asyncio.get_running_loop().run_in_executor(None, submit)
        try:
            submission = await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel_submission)
            raise
        return Generation(submission, self.name, self.metrics, started)

    async def compute(self, function: Callable[[], Result]) -> Result:
        """``function()``, which uses the model for scores or vectors, in the model's thread."""
        return await self.served.compute(function)


def _cancel_submission(submitted: "asyncio.Future[Submission]") -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


@dataclass(frozen=True)
class Site:
    """What all routes of one server share, as ``app.state.site``."""

    settings: ServeSettings
    shelf: Shelf
    metrics: Metrics
    created: int
    """When the server started, in seconds since 1970."""


@dataclass(frozen=True)
class Operation(Generic[Body]):
    """A route that reads JSON and answers with a model. It is an ASGI app, and an entry of the OpenAPI document."""

    path: str
    body: type[Body]
    answer: type[BaseModel]
    handle: Callable[[Call, Body], Awaitable[Response]]
    summary: str
    event: type[BaseModel] | None = None
    """The content of the events where the answer may be a stream."""
    prompt_field: str = "prompt"
    """The field of the body that an error of a text is blamed on."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; the work is cancelled when the client leaves."""
        site: Site = scope["app"].state.site
        body = await Request(scope, receive).body()
        work = asyncio.create_task(self._work(site, scope, body, receive, send))
        watch = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, watch):
                if not task.done():
                    task.cancel()
            await asyncio.wait({work, watch})
        if not work.cancelled():
            work.result()

    async def _work(self, site: Site, scope: Scope, content: bytes, receive: Receive, send: Send) -> None:
        try:
            body = parsed(self.body, content)
            async with site.shelf.lend(getattr(body, "model", None)) as served:
                caller: str = scope["state"]["caller"]
                call = Call(site.settings, served, site.metrics, caller, int(time.time()))
                response = await self._handled(call, body)
                await response(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        except EdgelmError as error:
            pass_interrupts_on(error)
            await api_error(error, self.prompt_field).response()(scope, receive, send)

    async def _handled(self, call: Call, body: Body) -> Response:
        seconds = call.settings.max_seconds
        try:
            async with asyncio.timeout(seconds + _GRACE_SECONDS):
                return await self.handle(call, body)
        except TimeoutError as error:
            pass_interrupts_on(error)
            raise ApiError(
                503, f"no answer within {seconds:g} seconds: ask for less", "server_error", code="timeout"
            ) from None


async def _gone(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def parsed(kind: type[Body], content: bytes) -> Body:
    """The JSON `content` as a `kind`. Raises ApiError, which names the first field that is wrong."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise _told(kind, error) from None


def _told(kind: type[BaseModel], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"][:4])
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg'].partition(': ')[2] or first['msg']}"[:200])
    if not where:
        return ApiError(400, "the body must be a JSON object")
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing", param=where)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {shown(where)}: it is not supported here", param=where[:100])
    field = kind.model_fields.get(str(first["loc"][0]))
    if first["type"] == "none_required" and field is not None and (field.description or "").startswith(UNSUPPORTED):
        reason = (field.description or "").removeprefix(UNSUPPORTED)
        return ApiError(400, f"{where} is not supported: {reason}", param=where, code="unsupported_parameter")
    words = first["msg"].removeprefix("Input ")
    return ApiError(400, f"{where}: {words}, got {shown(first['input'])}", param=where[:100])


def json_answer(content: BaseModel, *, without: set[str] | None = None) -> Response:
    """An answer of one JSON object."""
    return JSONResponse(content.model_dump(mode="json", exclude=without), headers={"cache-control": "no-store"})
