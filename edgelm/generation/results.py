"""What a generation returns: value objects only."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from edgelm.decoding.request import FinishReason
from edgelm.scoring.results import TokenLogprobs
from edgelm.text.messages import ChatMessage, MessageCall
from edgelm.text.tools import ToolCall

TextEnd = Literal[FinishReason, "tool_calls"]
"""Why a text ended. "tool_calls": it is complete, and has calls of tools."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What a generation cost. The rate leaves the first token out, because that token belongs to the prompt."""

    prompt_tokens: int
    """Tokens of the prompt, without a prefix and without dropped tokens."""
    prefill_seconds: float
    """From the call to the first token: the prompt's forward pass and the first choice."""
    new_tokens: int
    """Tokens generated, over all rows. Tokens of a stop string count too."""
    decode_seconds: float
    """From the first token to the last. Beam search: the time of the whole search after the prompt."""
    tokens_per_second: float
    """(`new_tokens` - rows) / `decode_seconds`; 0 where there is nothing to divide."""
    load_seconds: float
    """How long the model took to load."""
    peak_rss_bytes: int
    """Largest resident memory of this process so far; 0 where the system does not tell."""
    dropped_tokens: int = 0
    """Tokens of the prompt that `context_overflow` left out. `prompt_tokens` does not count them."""
    reencoded_tokens: int = 0
    """Tokens that ``context_overflow="window"`` computed again, over all rows."""
    reencode_seconds: float = 0.0
    """Time spent on `reencoded_tokens`, a part of `decode_seconds`."""
    reused_tokens: int = 0
    """Tokens of the prompt that were not computed, because an earlier call or a state had computed them."""
    drafted_tokens: int = 0
    """Tokens that `prompt_lookup_num_tokens` or a small model drafted."""
    accepted_tokens: int = 0
    """Drafted tokens that the model confirmed."""
    prefix_tokens: int = 0
    """Tokens of the prefix before the prompt. `prompt_tokens` and `reused_tokens` do not count them."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed text, in whole characters. The last chunk of each row carries its finish reason."""

    text: str
    """A piece of the continuation, in whole characters; `str(chunk)` is the same."""
    token_ids: tuple[int, ...]
    """The tokens that this text completes."""
    index: int
    """Row of the text, from 0 to `num_return_sequences` - 1."""
    finish_reason: TextEnd | None = None
    """As of a `Choice`, on the last chunk of each row; otherwise None."""
    stats: Stats | None = None
    """Only the very last chunk has stats."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """Log-probabilities of `token_ids`, where the option `logprobs` is given."""
    end_logprobs: TokenLogprobs | None = None
    """Those of the end token, which `token_ids` leaves out, where the text ended with one."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls of tools that are complete with this chunk. A call comes whole; its text is in no `text`."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation: the new part only, without the stop token or stop string."""

    text: str
    """The continuation, without the prompt and without the stop token or stop string."""
    token_ids: tuple[int, ...]
    """Its tokens; with token healing also those that spell the end of the prompt."""
    finish_reason: TextEnd
    """Why the text ended.

    "eos" (end-of-text token), "stop" (stop string, or a complete constraint), "length", "context" (the context is
    full), "time", "cancelled", or "tool_calls" (complete, with calls of tools).
    """
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """Log-probabilities of `token_ids`, where the option `logprobs` is given."""
    end_logprobs: TokenLogprobs | None = None
    """Those of the end token, which `token_ids` leaves out, where the text ended with one."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Complete calls of tools, in their order, whose text is not in `text`; a call that was cut off is in it."""

    @property
    def message(self) -> ChatMessage:
        """This answer as a message, for the next turn of the conversation."""
        if not self.tool_calls:
            return {"role": "assistant", "content": self.text}
        calls = [
            MessageCall(id=call.id, type="function", function={"name": call.name, "arguments": call.arguments})
            for call in self.tool_calls
        ]
        return {"role": "assistant", "content": self.text or None, "tool_calls": calls}

    @classmethod
    def of_chunks(cls, chunks: Sequence[Chunk]) -> "Choice":
        """Join the chunks of one row; the last one has the finish reason."""
        reason = chunks[-1].finish_reason
        assert reason is not None
        text = "".join(chunk.text for chunk in chunks)
        ids = tuple(token for chunk in chunks for token in chunk.token_ids)
        logprobs = tuple(entry for chunk in chunks for entry in chunk.logprobs or ())
        calls = tuple(call for chunk in chunks for call in chunk.tool_calls)
        return cls(text, ids, reason, None if chunks[-1].logprobs is None else logprobs, chunks[-1].end_logprobs, calls)


@dataclass(frozen=True, slots=True)
class Completion:
    """The result of `Model.generate`; ``str()`` is the first continuation's text."""

    prompt: str
    """The prompt as text."""
    choices: tuple[Choice, ...]
    """One for each of `num_return_sequences`."""
    seed: int | None
    """The seed that repeats this result; None where no token was drawn at random."""
    stats: Stats
    """What the generation cost."""

    @classmethod
    def of_chunks(cls, prompt: str, chunks: Iterable[Chunk], seed: int | None) -> "Completion":
        """Join all chunks of a stream."""
        rows: dict[int, list[Chunk]] = {}
        stats: Stats | None = None
        for chunk in chunks:
            rows.setdefault(chunk.index, []).append(chunk)
            stats = chunk.stats or stats
        assert stats is not None  # the last chunk always carries stats
        return cls(prompt, tuple(Choice.of_chunks(rows[index]) for index in sorted(rows)), seed, stats)

    @property
    def text(self) -> str:
        """The first continuation's text."""
        return self.choices[0].text

    def __str__(self) -> str:
        return self.text
