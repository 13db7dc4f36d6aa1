"""Many prompts in one batch: the scheduler's ids joined into completions."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.scheduler import Handle, Scheduler
from edgelm.engine.memory import peak_rss_bytes
from edgelm.generation.chunk_stream import ChunkStream
from edgelm.generation.results import Chunk, Stats


@dataclass
class BatchPrompt:
    """A prompt of a batch, what was asked for it, and the streams of text its rows go to."""

    ids: list[int]
    config: GenerationConfig
    seed: int
    rows: list[ChunkStream]
    dropped_tokens: int = 0
    reused_tokens: int = 0
    open_rows: int = 0
    new_tokens: int = 0
    first_token: float = 0.0
    last_token: float = 0.0
    chunks: list[Chunk] = field(default_factory=list)

    def note_token(self) -> None:
        """A token came just now."""
        self.last_token = time.perf_counter()
        self.first_token = self.first_token or self.last_token
        self.new_tokens += 1

    def stats(self, started: float, load_seconds: float) -> Stats:
        """Rows share their time: the rate is that of the whole prompt, in the company it had."""
        seconds, counted = self.last_token - self.first_token, max(0, self.new_tokens - len(self.rows))
        return Stats(
            prompt_tokens=len(self.ids),
            prefill_seconds=(self.first_token or time.perf_counter()) - started,
            new_tokens=self.new_tokens,
            decode_seconds=seconds,
            tokens_per_second=counted / seconds if seconds else 0.0,
            load_seconds=load_seconds,
            peak_rss_bytes=peak_rss_bytes(),
            dropped_tokens=self.dropped_tokens,
            reused_tokens=self.reused_tokens,
        )


def generate_batch(scheduler: Scheduler, prompts: Sequence[BatchPrompt], load_seconds: float) -> None:
    """Run all `prompts` to their ends; their chunks are complete then.

    Raises:
        PromptError, ContextError, ConfigError: as `Scheduler.submit`; before anything is computed.
        ClosedError: the graph is closed, or was closed meanwhile.
        Exception: whatever the first text to fail raises.
    """
    started = time.perf_counter()
    owners: dict[Handle, tuple[int, int]] = {}
    for place, prompt in enumerate(prompts):
        prompt.open_rows = len(prompt.rows)
        for row in range(len(prompt.rows)):
            owners[scheduler.submit(prompt.ids, prompt.config, prompt.seed, row=row)] = place, row
    while scheduler.pending:
        for turn in scheduler.step():
            place, row = owners[turn.handle]
            prompt = prompts[place]
            if turn.step is None:
                assert turn.error is not None  # a turn has one of the two
                raise turn.error
            if turn.step.token_id is not None:
                if not prompt.new_tokens:
                    prompt.reused_tokens = turn.reused_tokens
                prompt.note_token()
            chunk = prompt.rows[row].push(turn.step)
            if chunk is None:
                continue
            prompt.chunks.append(chunk)
            if chunk.finish_reason is not None:
                scheduler.cancel(turn.handle)
                prompt.open_rows -= 1
            if not prompt.open_rows:
                prompt.chunks[-1] = replace(chunk, stats=prompt.stats(started, load_seconds))
