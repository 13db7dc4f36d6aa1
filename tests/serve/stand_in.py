"""A scheduler made of `Model.astream`, until the real one is there."""
from contextlib import aclosing
from dataclasses import dataclass
from threading import Event

from edgelm.errors import ClosedError


@dataclass
class Load:
    waiting: int
    decoding: int
    max_rows: int
    max_waiting: int


class Submission:
    def __init__(self, owner, run, model):
        self.owner, self.run, self.model = owner, run, model
        self.event = Event()
        self.prompt_tokens, self.seed, self.config = len(run.ids), run.seed, run.config

    def cancel(self):
        self.event.set()

    async def __aiter__(self):
        from contextvars import copy_context
        from functools import partial

        from edgelm.generation.asynchronous import EitherCancel, stream_in_thread
        self.owner.running += 1
        try:
            async with aclosing(stream_in_thread(partial(self.model._texts.stream, self.run), EitherCancel(self.event), self.model._workers.pool(), copy_context())) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self.owner.running -= 1


class StandIn:
    def __init__(self, model, max_rows=8, max_waiting=64):
        self.model, self.running, self.max_waiting, self.closed = model, 0, max_waiting, False

    def load(self):
        return Load(max(0, self.running - 8), min(8, self.running), 8, self.max_waiting)

    def submit(self, prompt, *, key="", deadline_seconds=None, **options):
        if self.closed:
            raise ClosedError("closed")
        event = Event()
        config = self.model.generation_config.updated({**options, "cancel": event} | ({"max_time": deadline_seconds} if deadline_seconds else {}))
        config.check_batch()
        submission = Submission(self, self.model._texts.run(prompt, config), self.model)
        submission.event = event
        return submission

    def close(self, *, drain_seconds=0.0):
        self.closed = True
