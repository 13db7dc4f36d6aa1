"""Callbacks of a run: they show progress, stop the run on a signal or at a time limit, and ask for checkpoints."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import transformers

_REDRAW_SECONDS = 0.5
_LINE_SECONDS = 30.0  # where stderr is not a terminal
_BAR_CELLS = 24
_LONGEST_WAIT_SECONDS = 5.0  # after a signal, for a step that is logged


class Stop:
    """Why a run stops after its present step: a signal (by its number), or the time limit."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.out_of_time = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """In this context, the first SIGINT or SIGTERM asks for a stop; the second has its usual effect.

        Outside the main thread this does nothing, because Python handles signals in the main thread only.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        caught = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.getsignal(number) for number in caught}

        def restore() -> None:
            for number, handler in handlers.items():
                signal.signal(number, handler)

        def ask(number: int, frame: FrameType | None) -> None:
            self.signal = number
            restore()

        for number in caught:
            signal.signal(number, ask)
        try:
            yield
        finally:
            restore()


class Clock(transformers.TrainerCallback):  # type: ignore[misc]
    """Counts the seconds of a run over all its parts, asks for a checkpoint every `save_seconds`, and stops the run.

    The run stops after `limit_seconds`, and on the signals of `stop`. `say` gets a line when a signal has come.

    A checkpoint is written only after a step that is logged, that is every `log_every` steps, so that a resumed run
    averages its losses over the same steps. After a signal the run waits at most five seconds for such a step.
    """

    def __init__(
        self, stop: Stop, log_every: int, save_seconds: float, limit_seconds: float | None, say: Callable[[str], None]
    ) -> None:
        self.seconds = 0.0
        self._stop, self._log_every, self._say = stop, log_every, say
        self._save_seconds, self._limit_seconds = save_seconds, limit_seconds
        self._ticked = self._saved = time.monotonic()
        self._asked: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self._ticked = self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self.seconds += now - self._ticked
        self._ticked = now
        if self._limit_seconds is not None and self.seconds >= self._limit_seconds:
            self._stop.out_of_time = True
        logged = state.global_step % self._log_every == 0
        if self._stop.out_of_time or (self._stop.signal is not None and (logged or self._waited_long())):
            control.should_log = control.should_save = control.should_training_stop = True
            # A run at its time limit is finished and is measured; one stopped by a signal can be resumed.
            control.should_evaluate = control.should_evaluate or self._stop.out_of_time
        elif logged and now - self._saved >= self._save_seconds:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = time.monotonic()

    def _waited_long(self) -> bool:
        if self._asked is None:
            self._asked = time.monotonic()
            self._say("stopping, and writing a checkpoint ...")
        return time.monotonic() - self._asked >= _LONGEST_WAIT_SECONDS


class ProgressBar(transformers.TrainerCallback):  # type: ignore[misc]
    """One line on stderr: progress, losses, tokens per second (`batch_tokens` in each step), and the remaining time."""

    def __init__(self, batch_tokens: int) -> None:
        self._batch_tokens = batch_tokens
        self._live = sys.stderr.isatty()
        self._loss = self._held_out = float("nan")
        self._began = self._drawn = 0.0
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = self._drawn = time.monotonic()
        self._first_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self._loss = logs.get("loss", self._loss)
        self._held_out = logs.get("eval_loss", self._held_out)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        last = state.global_step >= state.max_steps
        if now - self._drawn < (_REDRAW_SECONDS if self._live else _LINE_SECONDS) and not last:
            return
        self._drawn = now
        seconds_per_step = (now - self._began) / max(1, state.global_step - self._first_step)
        line = progress_line(
            state.global_step, state.max_steps, seconds_per_step, self._batch_tokens, self._loss, self._held_out
        )
        sys.stderr.write(f"\r{line}\033[K" if self._live else f"{line}\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._live:
            sys.stderr.write("\n")


def progress_line(
    step: int, steps: int, seconds_per_step: float, batch_tokens: int, loss: float, held_out: float
) -> str:
    """The line of a `ProgressBar`; a loss that is not known yet, NaN, is left out."""
    done = _BAR_CELLS * step // steps
    parts = [f"[{'#' * done}{'.' * (_BAR_CELLS - done)}] {step / steps:4.0%}  step {step:,}/{steps:,}"]
    if loss == loss:
        parts.append(f"loss {loss:.3f}")
    if held_out == held_out:
        parts.append(f"held out {held_out:.3f}")
    parts += [f"{batch_tokens / seconds_per_step:,.0f} tokens/s", f"{_clock((steps - step) * seconds_per_step)} left"]
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
