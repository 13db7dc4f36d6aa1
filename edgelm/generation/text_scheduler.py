"""Generations of many callers side by side, for servers: any thread or event loop submits, one thread computes."""

import math
import threading
import time
from contextvars import Context, copy_context
from dataclasses import dataclass, replace
from typing import Self, Unpack

from edgelm.decoding.generation_config import Cancel, GenerationConfig, GenerationOptions, LogitsProcessor
from edgelm.decoding.options import number, whole
from edgelm.decoding.scheduler import Scheduler, check_max_rows
from edgelm.engine.fork import notice_fork, watch_forks
from edgelm.errors import ClosedError, ConfigError, QueueFullError, shown
from edgelm.generation.runs_together import RunsTogether
from edgelm.generation.scheduler_thread import SchedulerThread, check_program_goes_on
from edgelm.generation.submission import ScheduledRun, Submission
from edgelm.generation.text_generation import TextGeneration
from edgelm.reuse.pool import SessionPool, check_limit_bytes
from edgelm.text.prompts import Prompt

DEFAULT_MAX_WAITING = 64
MAX_WAITING = 1_000_000

_WAITING = whole(0, MAX_WAITING)
_DEADLINE = number("(0, 1e9]", "SECONDS", unit="seconds", optional=True)
_DRAIN = number("[0, 1e9]", "SECONDS", unit="seconds")


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """What a `TextScheduler` has to do at this moment."""

    waiting: int
    """Generations that have not begun, or not with all their rows."""
    decoding: int
    """Texts that have a row of the batch, or whose prompt is being computed."""
    max_rows: int
    """How many texts decode at a time."""
    max_waiting: int
    """How many generations may wait."""


class TextScheduler:
    """Generations of many callers, decoded side by side; a thread of its own computes them.

    Any thread or event loop may submit. Each text is that of `Model.generate_batch`, bit for bit, whatever runs beside
    it, unless a small model drafts (`Model.scheduler`). The thread starts with the first submission; in a forked child,
    with the first one there. ``with`` closes the scheduler. A scheduler that nobody holds any more ends its thread once
    all texts are finished.
    """

    def __init__(
        self,
        texts: TextGeneration,
        sessions: SessionPool,
        defaults: GenerationConfig,
        *,
        max_rows: int,
        max_waiting: int = DEFAULT_MAX_WAITING,
        prefix_cache_bytes: int = 0,
        drafts: bool = False,
    ) -> None:
        """Join finished parts; `Model.scheduler` explains the arguments."""
        self._thread: SchedulerThread | None = None
        check_max_rows(max_rows)
        _WAITING.checked("max_waiting", max_waiting)
        self._texts, self._sessions, self._defaults = texts, sessions, defaults
        self._max_rows, self._max_waiting = max_rows, max_waiting
        check_limit_bytes("prefix_cache_bytes", prefix_cache_bytes)
        self._kept = sessions.sibling(prefix_cache_bytes)
        self._drafts = drafts
        self._closed = False
        self._lock = threading.RLock()  # among submitters; the thread that computes never takes it
        watch_forks(self)

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._thread is not None:
            self._thread.retire()

    def submit(
        self,
        prompt: Prompt,
        *,
        key: str = "",
        deadline_seconds: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Submission:
        """Queue a generation with `options` of `GenerationConfig` over the bundle's defaults.

        Args:
            prompt: a text or token ids.
            key: who asks. Keys that wait take turns. A prompt reuses what was computed for prompts of its own key only,
                and loaded states, which serve all keys.
            deadline_seconds: end the text after this time, waiting included, with the finish reason "time".
            options: everything that `Model.generate_batch` takes.

        Raises:
            QueueFullError: `max_waiting` generations wait already.
            ClosedError: the scheduler or the model is closed.
            PromptError, ContextError, ConfigError: as `Model.generate_batch`.
        """
        if not isinstance(key, str):
            raise ConfigError(f"key must be a text, got {shown(key)}")
        _DEADLINE.checked("deadline_seconds", deadline_seconds)
        deadline = math.inf if deadline_seconds is None else time.monotonic() + deadline_seconds
        config = self._defaults.updated(dict(options))
        thread = self._running()
        self._refuse_if_full(thread)  # before the work of encoding the prompt
        run = self._texts.run(prompt, _in_context(config, copy_context()))
        requests = thread.requests(run)
        with self._lock:
            thread = self._running()
            self._refuse_if_full(thread)
            scheduled = ScheduledRun(run, requests, key, deadline, thread.mailbox)
            thread.submit(scheduled)
        if self._closed:  # meanwhile, so perhaps nobody else ends the thread
            thread.retire()
        return Submission(scheduled, config)

    def load(self) -> SchedulerLoad:
        """How much waits and decodes at this moment."""
        notice_fork()
        thread = self._thread
        if thread is None or thread.ended:
            return SchedulerLoad(0, 0, self._max_rows, self._max_waiting)
        return SchedulerLoad(thread.waiting, self._max_rows - thread.free_rows, self._max_rows, self._max_waiting)

    def forget(self) -> None:
        """Forget the prompts of all keys."""
        self._kept.forget()

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """Refuse submissions from now on, and end; waits until the thread has ended.

        What runs or waits goes on for at most `drain_seconds`, and then ends with the finish reason "cancelled".
        Closing twice is allowed; the second time then counts.
        """
        _DRAIN.checked("drain_seconds", drain_seconds)
        notice_fork()
        self._closed = True
        thread = self._thread
        if thread is not None:
            thread.close(drain_seconds)
            self._thread = None
        self._kept.close()

    def release(self) -> None:
        """Free the memory without waiting: for a model that closes, which ends all texts."""
        self._kept.close()
        if self._thread is not None:
            self._thread.retire()

    def after_fork(self) -> None:
        """In a forked child: the thread stayed behind, and perhaps held the lock."""
        self._lock = threading.RLock()
        self._thread = None

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the scheduler is closed: make a new one")
        self._sessions.check_open()

    def _running(self) -> SchedulerThread:
        """The thread, started if there is none."""
        notice_fork()
        check_program_goes_on()
        with self._lock:
            self._check_open()
            if self._thread is None or self._thread.ended:
                with self._kept.borrowed() as (session, _):
                    scheduler = Scheduler(
                        session,
                        max_rows=self._max_rows,
                        sessions=self._kept,
                        draft_models=self._texts.draft_models(session) if self._drafts else None,
                    )
                self._thread = SchedulerThread(RunsTogether(scheduler))
                if self._closed:  # by another thread, which saw no thread to end
                    self._thread.retire()
            return self._thread

    def _refuse_if_full(self, thread: SchedulerThread) -> None:
        if thread.waiting - thread.free_rows < self._max_waiting:
            return
        seconds = max(1, math.ceil(thread.seconds_until((self._max_waiting + 1) // 2)))
        raise QueueFullError(
            f"{self._max_waiting} generations wait already: try again in {seconds} s, or raise max_waiting", seconds
        )


class _CancelInContext:
    """A caller's cancel signal that sees the caller's context variables."""

    def __init__(self, cancel: Cancel, context: Context) -> None:
        self._cancel, self._context = cancel, context

    def is_set(self) -> bool:
        return self._context.run(self._cancel.is_set)


def _in_context(config: GenerationConfig, context: Context) -> GenerationConfig:
    """`config` with the caller's own functions, which see the context variables of the call in another thread too."""
    if config.cancel is None and not config.logits_processor:
        return config

    def in_context(processor: LogitsProcessor) -> LogitsProcessor:
        return lambda ids, logits: context.run(processor, ids, logits)

    return replace(
        config,
        cancel=None if config.cancel is None else _CancelInContext(config.cancel, context),
        logits_processor=tuple(map(in_context, config.logits_processor)),
    )
