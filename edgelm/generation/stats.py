"""How long a generation takes."""

import time
from collections.abc import Iterator

from edgelm.decoding.request import Step
from edgelm.engine.memory import peak_rss_bytes
from edgelm.generation.results import Stats


class GenerationClock:
    """Times the tokens of a generation; the pauses its caller makes between tokens do not count.

    Args:
        searching: whether all tokens come at the end of a search, which counts as their decoding.
    """

    def __init__(self, *, searching: bool) -> None:
        self._searching = searching
        self._started = time.perf_counter()
        self._prefill_seconds = 0.0
        self._decode_seconds = 0.0
        self._tokens = 0
        self._rows = 0
        self._drafted = 0
        self._accepted = 0

    def row_begins(self) -> None:
        """The prompt is computed, and so are the rows before."""
        if self._searching and self._prefill_seconds == 0.0:
            self._prefill_seconds = time.perf_counter() - self._started

    def timed(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps of one row, unchanged."""
        first = True
        while True:
            before = time.perf_counter()
            step = next(steps, None)
            now = time.perf_counter()
            if step is None:
                return
            if self._prefill_seconds == 0.0:
                self._prefill_seconds = now - self._started
            if step.token_id is not None:
                self._tokens += 1
                first = first and not self._searching
                self._rows += first
                self._decode_seconds += 0.0 if first else now - before
                first = False
            self._drafted += step.drafted
            self._accepted += step.was_drafted
            yield step

    def stats(self, prompt_tokens: int, load_seconds: float) -> Stats:
        counted = self._tokens - self._rows
        rate = counted / self._decode_seconds if counted and self._decode_seconds else 0.0
        return Stats(
            prompt_tokens=prompt_tokens,
            prefill_seconds=self._prefill_seconds,
            new_tokens=self._tokens,
            decode_seconds=self._decode_seconds,
            tokens_per_second=rate,
            load_seconds=load_seconds,
            peak_rss_bytes=peak_rss_bytes(),
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
        )
