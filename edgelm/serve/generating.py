"""A prompt that a model continues for a client: its chunks, counted, and the counts that the client is told."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from pydantic import BaseModel

from edgelm.generation.results import Chunk, Completion, Stats
from edgelm.serve.metrics import Metrics

if TYPE_CHECKING:
    from edgelm.generation.submission import Submission


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
        name = self._name
        new_tokens, token_seconds = self._metrics.new_tokens.labels(name), self._metrics.token_seconds.labels(name)
        last: dict[int, float] = {}
        open_rows = set(range(self.submission.config.num_return_sequences))
        self._metrics.prompt_tokens.labels(name).inc(self.prompt_tokens)
        try:
            async with aclosing(aiter(self.submission)) as submitted:
                async for chunk in submitted:
                    now, count = time.monotonic(), len(chunk.token_ids)
                    if not last:
                        self._metrics.first_token_seconds.labels(name).observe(now - self._started)
                    elif chunk.index in last:
                        for _ in range(count):
                            token_seconds.observe((now - last[chunk.index]) / count)
                    last[chunk.index] = now
                    new_tokens.inc(count)
                    if chunk.finish_reason is not None:
                        self._metrics.texts.labels(name, chunk.finish_reason).inc()
                        open_rows.discard(chunk.index)
                    if chunk.stats is not None:
                        self._metrics.reused_tokens.labels(name).inc(chunk.stats.reused_tokens)
                        self._metrics.drafted_tokens.labels(name).inc(chunk.stats.drafted_tokens)
                        self._metrics.accepted_tokens.labels(name).inc(chunk.stats.accepted_tokens)
                    yield chunk
        finally:
            self.submission.cancel()
            self._metrics.texts.labels(name, "abandoned").inc(len(open_rows))

    async def completion(self) -> Completion:
        """The whole texts."""
        async with aclosing(self.chunks()) as chunks:
            gathered = [chunk async for chunk in chunks]
        return Completion.of_chunks("", gathered, self.submission.seed)
