"""From the steps of one row to the chunks of text a caller gets."""

from collections import deque

from edgelm.decoding.request import Step
from edgelm.generation.results import Chunk
from edgelm.scoring import text_scores
from edgelm.scoring.results import TokenLogprobs
from edgelm.text.stop_strings import TextStream
from edgelm.text.tokenizer import Tokenizer


class ChunkStream:
    """Text of a row, whole characters; the chunk that has a finish reason is the last one."""

    def __init__(self, tokenizer: Tokenizer, text: TextStream, index: int, *, logprobs: bool) -> None:
        """Args: which of the rows, and whether chunks carry the log-probabilities of their tokens."""
        self._tokenizer = tokenizer
        self._text = text
        self._index = index
        self._waiting: deque[TokenLogprobs] | None = deque() if logprobs else None  # of tokens without whole text

    def push(self, step: Step) -> Chunk | None:
        """The text that a step completes; None where it completes none."""
        if step.logprobs is not None and self._waiting is not None:
            self._waiting.append(text_scores.named_with_alternatives(self._tokenizer, step.logprobs))
        piece = self._text.finish() if step.token_id is None else self._text.push(step.token_id)
        logprobs = None if self._waiting is None else tuple(self._waiting.popleft() for _ in piece.token_ids)
        reason = "stop" if self._text.stopped else step.finish_reason
        if reason is None and not piece.text:
            return None
        return Chunk(piece.text, piece.token_ids, self._index, reason, logprobs=logprobs)
