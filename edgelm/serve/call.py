"""What the handler of a route works with: the model, and ways to have it generate and compute."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from edgelm.decoding.generation_config import GenerationOptions
from edgelm.serve.errors import ApiError
from edgelm.serve.generating import Generation
from edgelm.serve.metrics import Metrics
from edgelm.serve.settings import ServeSettings
from edgelm.serve.shelf import ServedModel
from edgelm.text.prompts import Prompt

if TYPE_CHECKING:
    from edgelm.generation.submission import Submission
    from edgelm.model import Model

Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    """What the handler of an `Operation` works with."""

    settings: ServeSettings
    served: ServedModel
    metrics: Metrics
    caller: str
    """Says which requests come with the same API key."""
    created: int
    """When the request came, in seconds since 1970."""

    @property
    def model(self) -> "Model":
        """The model, which stays loaded until the answer is sent."""
        return self.served.model

    @property
    def name(self) -> str:
        """The model's name."""
        return self.served.name

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: equal ones give equal texts for equal seeds."""
        return f"fp_{self.model.bundle.manifest.digest[-10:]}"

    def ask_for_rows(self, count: int, options: GenerationOptions) -> int:
        """Have `options` ask for `count` texts of one prompt; returns how many are computed. Raises ConfigError.

        Where no token is drawn at random, all of them would be the same: one is computed, for the route to copy.
        """
        rows = count if self.model.generation_config.updated(dict(options)).do_sample else 1
        if rows > 1:
            options["num_return_sequences"] = rows
        return rows

    def check_max_tokens(self, count: int, field: str) -> None:
        """Raise ApiError if `count`, the value of `field`, is more than the model's context."""
        context = self.model.bundle.manifest.architecture.context_length
        if count > context:
            raise ApiError(400, f"{field} is {count}, but this model's context holds {context} tokens", param=field)

    async def submit(self, prompt: Prompt, options: GenerationOptions, *, max_time: float | None = None) -> Generation:
        """Queue a text, for at most `max_time` seconds and the server's limit. Raises as `TextScheduler.submit`.

        The prompt is tokenized in a thread. Where there is a constraint, whose reading may take seconds, the thread is
        one for all constraints of the model, so that nobody else waits.
        """
        scheduler, started = self.served.scheduler, time.monotonic()
        deadline = min(self.settings.max_seconds, max_time or self.settings.max_seconds)

        def submit() -> "Submission":
            return scheduler.submit(prompt, key=self.caller, deadline_seconds=deadline, **options)

        executor = self.served.constraint_thread if "constraint" in options else None
        submitted = asyncio.get_running_loop().run_in_executor(executor, submit)
        try:
            submission = await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel_submission)
            raise
        return Generation(submission, self.name, self.metrics, started)

    async def compute(self, function: Callable[[], Result]) -> Result:
        """``function()``, which uses the model for scores or vectors, in the model's thread."""
        return await self.served.compute(function)


def _cancel_submission(submitted: "asyncio.Future[Submission]") -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()
