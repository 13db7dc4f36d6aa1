"""How long a generation takes, and how many tokens it makes in that time."""

import time
from collections.abc import Iterator
from typing import NamedTuple

from edgelm.decoding.request import Step


class Meter:
    """Times the tokens of one prompt, of all its rows together.

    Time counts while steps are computed. What happens between two steps that `timed` passes on does not count: the
    pauses that the caller makes, and turning tokens into text.
    """

    def __init__(self, *, searching: bool) -> None:
        """Start the clock.

        Args:
            searching: whether all tokens come at the end of a search. The whole search then counts as decoding.
        """
        self._searching = searching
        self._paused_seconds = 0.0
        self._pause_began: float | None = None
        self._started = time.perf_counter()
        self._first_step: float | None = None
        self._first_token = self._last_token = 0.0
        self._rows: set[int] = set()  # rows with a token
        self.new_tokens = self.drafted_tokens = self.accepted_tokens = 0

    def timed(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps of one row, unchanged; only the time that each of them takes counts."""
        while True:
            if self._pause_began is not None:
                self._paused_seconds += time.perf_counter() - self._pause_began
                self._pause_began = None
            step = next(steps, None)
            self._pause_began = time.perf_counter()
            if step is None:
                return
            yield step

    def prompt_is_computed(self) -> None:
        """Note that the prompt is computed and a search begins."""
        if self._searching and self._first_step is None:
            self._first_step = self._first_token = self._now()

    def count(self, row: int, step: Step) -> None:
        """Count a step of `row`, which was computed just now."""
        now = self._now()
        if self._first_step is None:
            self._first_step = self._first_token = now
        if step.token_id is not None:
            self._last_token = now
            self._rows.add(row)
            self.new_tokens += 1
        self.drafted_tokens += step.drafted
        self.accepted_tokens += step.was_drafted

    def rates(self) -> "Rates":
        """The figures so far."""
        first_step = self._now() if self._first_step is None else self._first_step
        decode_seconds = max(0.0, self._last_token - self._first_token)
        counted = self.new_tokens if self._searching else self.new_tokens - len(self._rows)
        rate = counted / decode_seconds if counted and decode_seconds else 0.0
        return Rates(first_step - self._started, decode_seconds, rate)

    def _now(self) -> float:
        return (self._pause_began or time.perf_counter()) - self._paused_seconds


class Rates(NamedTuple):
    """What a `Meter` measured."""

    prefill_seconds: float
    """From the start to the first step."""
    decode_seconds: float
    """From the first token to the last; of a search, all its time."""
    tokens_per_second: float
    """Without each row's first token, which belongs to the prompt; of a search, with all tokens."""
