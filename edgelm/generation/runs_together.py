"""Runs whose rows decode side by side: the turns of a scheduler become chunks of text."""

from collections.abc import Iterable

from edgelm.decoding.request import FinishReason, Request, Step
from edgelm.decoding.scheduler import Handle, Scheduler, Turn
from edgelm.errors import pass_interrupts_on
from edgelm.generation.results import Chunk
from edgelm.generation.run import TextRun


class RunsTogether:
    """Rows of runs in one scheduler. Not for use by several threads at a time.

    Attributes:
        scheduler: the scheduler, which nobody else uses.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._rows: dict[Handle, tuple[TextRun, int]] = {}

    def requests(self, run: TextRun) -> list[Request]:
        """A request for each row of `run`. Any thread may call this. Raises as `Scheduler.request`."""
        rows = range(run.config.num_return_sequences)
        return [self.scheduler.request(run.ids, run.config, run.seed, matcher=run.matcher) for _ in rows]

    def add(self, run: TextRun, row: int, request: Request, *, key: str = "") -> None:
        """Queue a row of `run`. Its prompt continues from prompts of the same `key` only, or from saved states."""
        self._rows[self.scheduler.add(request, row=row, key=key)] = run, row

    def step(self) -> list[tuple[TextRun, Chunk | Exception]]:
        """Compute a token of every row, and parts of prompts; returns the text that this completes.

        An exception ends its run: the other rows of the run are removed. Raises as `Scheduler.step`.
        """
        results: list[tuple[TextRun, Chunk | Exception]] = []
        for turn in self.scheduler.step():
            if turn.handle not in self._rows:  # the error of another row ended the run
                continue
            run, row = self._rows[turn.handle]
            try:
                chunk = _pushed(run, row, turn)
            except Exception as error:
                pass_interrupts_on(error)
                self.remove(run)
                results.append((run, error))
                continue
            if chunk is not None:
                results.append((run, chunk))
                if chunk.finish_reason is not None:
                    self.scheduler.cancel(turn.handle)
                    del self._rows[turn.handle]
        return results

    def run_of_prompt(self) -> TextRun | None:
        """The run whose prompt is computed in the next step, if any."""
        handle = self.scheduler.first_waiting
        return None if handle is None else self._rows[handle][0]

    def end(self, run: TextRun, further_rows: Iterable[int], reason: FinishReason) -> list[Chunk | Exception]:
        """End the rows of `run` that are not finished, and `further_rows`, which were never added.

        Returns the last chunk of each row, or an exception.
        """
        try:
            rows = [*self.remove(run), *further_rows]
            return [chunk for row in rows if (chunk := run.push(row, Step(None, reason))) is not None]
        except Exception as error:
            pass_interrupts_on(error)
            return [error]

    def remove(self, run: TextRun) -> list[int]:
        """Free the rows of `run`; returns those that were not finished."""
        handles = [handle for handle, (other, _) in self._rows.items() if other is run]
        for handle in handles:
            self.scheduler.cancel(handle)
        return [self._rows.pop(handle)[1] for handle in handles]


def _pushed(run: TextRun, row: int, turn: Turn) -> Chunk | None:
    if turn.step is None:
        assert turn.error is not None  # a turn has a step or an error
        raise turn.error
    if turn.step.token_id is not None and not run.meter.new_tokens:
        run.reused_tokens = turn.reused_tokens
    return run.push(row, turn.step)
