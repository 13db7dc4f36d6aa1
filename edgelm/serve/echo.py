"""Echoed prompts: their text, and the log-probabilities of their tokens, of which lm-eval makes its loglikelihoods."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from edgelm.scoring.results import TokenLogprobs
from edgelm.serve.call import Call
from edgelm.text.prompts import Prompt
from edgelm.text.stream_decoder import StreamDecoder


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a text's tokens, in nats; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    """The likeliest tokens at each place, and the token itself. Of tokens with equal texts the likeliest counts."""
    text_offset: list[int]
    """Where each token begins in the choice's text, in characters."""

    @classmethod
    def of(cls, tokens: Sequence[TokenLogprobs], offsets: Sequence[int]) -> "CompletionLogprobs":
        """`tokens` that begin at `offsets`."""
        return cls(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[_top(token) for token in tokens],
            text_offset=list(offsets),
        )

    def followed_by(self, other: "CompletionLogprobs") -> "CompletionLogprobs":
        """These tokens, then `other`'s."""
        return CompletionLogprobs(
            tokens=self.tokens + other.tokens,
            token_logprobs=self.token_logprobs + other.token_logprobs,
            top_logprobs=self.top_logprobs + other.top_logprobs,
            text_offset=self.text_offset + other.text_offset,
        )


@dataclass(frozen=True)
class Echo:
    """A prompt as its answer repeats it."""

    text: str
    prompt_tokens: int
    logprobs: CompletionLogprobs | None


NO_ECHO = Echo("", 0, None)


async def read_echo(call: Call, prompt: Prompt, logprobs: int | None) -> Echo:
    """`prompt` as text; with the log-probabilities of its tokens and of the `logprobs` likeliest ones, if asked for.

    Raises PromptError and ContextError as `Model.token_logprobs`.
    """
    model = call.model

    def read() -> Echo:
        ids = model.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
        text = prompt if isinstance(prompt, str) else model.tokenizer.decode(ids)
        if logprobs is None:
            return Echo(text, len(ids), None)
        tokens = model.token_logprobs(prompt, top=logprobs)
        begin = len(ids) - len(tokens)
        unread = [model.tokenizer.decode([token]) for token in ids[:begin]]
        decoder = model.tokenizer.stream()
        silent = (
            len(ids) - len(model.tokenizer.encode(text, add_special_tokens=False)) if isinstance(prompt, str) else 0
        )
        offsets = offsets_of(decoder, ids, silent=max(0, silent))
        scored = CompletionLogprobs.of(tokens, offsets[begin:])
        nothing: list[float | None] = [None] * begin
        first = CompletionLogprobs(
            tokens=unread, token_logprobs=nothing, top_logprobs=[None] * begin, text_offset=offsets[:begin]
        )
        return Echo(text, len(ids), first.followed_by(scored))

    return await call.compute(read)


def offsets_of(decoder: StreamDecoder, ids: Sequence[int], *, start: int = 0, silent: int = 0) -> list[int]:
    """Where each of `ids` begins in their text, which begins at `start`, in characters.

    The first `silent` ids, special tokens that the tokenizer added, are not in the text. A token inside a character has
    the character's place.
    """
    offsets = []
    for number, token in enumerate(ids):
        offsets.append(start)
        text = decoder.push(token)
        start += 0 if number < silent else len(text)
    return offsets


def _top(token: TokenLogprobs) -> dict[str, float]:
    top: dict[str, float] = {}
    for alternative in (*token.top, token):
        top[alternative.text] = max(alternative.logprob, top.get(alternative.text, alternative.logprob))
    return top
