"""Generation with text on both ends: a prompt and options become a task, and a task's ids become chunks of text."""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.generation_options import GenerationOptions
from edgelm.decoding.loop import generate
from edgelm.decoding.request import EndsText, Step
from edgelm.decoding.scheduler import Scheduler, check_max_rows
from edgelm.decoding.window import WindowSession, behind_prefix, fitted
from edgelm.errors import ConfigError, ContextError, PromptError
from edgelm.generation.batch import BatchPrompt, generate_batch
from edgelm.generation.chunk_stream import ChunkStream
from edgelm.generation.results import Chunk, Completion, Stats
from edgelm.generation.stats import GenerationClock
from edgelm.reuse.pool import SessionPool
from edgelm.reuse.prompts import Prompt, PromptEncoder
from edgelm.text.stop_strings import TextStream

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class TextTask:
    """A prompt and what was asked for it, checked."""

    prompt: Prompt
    ids: list[int]
    """Behind those of a prefix."""
    prefix_tokens: int
    """How many of the ids those are."""
    config: GenerationConfig
    seed: int
    """Drawn where none was given."""


class TextGeneration:
    """Runs tasks in sessions of a pool; several threads may call it at the same time."""

    def __init__(self, encoder: PromptEncoder, sessions: SessionPool, context_length: int, load_seconds: float) -> None:
        """Args: the load time is for the stats."""
        self._encoder = encoder
        self._tokenizer = encoder.tokenizer
        self._sessions = sessions
        self._context_length = context_length
        self._load_seconds = load_seconds
        self._breaker_ids: dict[tuple[str | int, ...], tuple[int, ...]] = {}

    def task(self, prompt: Prompt, config: GenerationConfig) -> TextTask:
        """Check a prompt.

        Raises:
            PromptError: it is empty, no text, or holds an unknown token id.
        """
        if config.dry_multiplier and any(isinstance(breaker, str) for breaker in config.dry_sequence_breakers):
            config = config.updated({"dry_sequence_breakers": self._breakers(config.dry_sequence_breakers)})
        seed = secrets.randbits(63) if config.seed is None else config.seed
        ids = self._encoder.ids(prompt)
        return TextTask(prompt, ids, self._encoder.prefix_tokens(ids), config, seed)

    def stream(self, task: TextTask) -> Iterator[Chunk]:
        """The chunks of one task; its rows follow one another.

        Raises:
            ContextError, ConfigError, ClosedError: as `Model.generate`.
        """
        clock = GenerationClock(searching=task.config.num_beams > 1)
        kept, config = self._fitted(task)
        windowed = config.context_overflow == "window"
        # A window forgets its prompt; contrastive search compares the hidden states of the whole, which are not kept.
        known = () if config.penalty_alpha is not None else kept
        with self._sessions.borrowed(known, keep=not windowed) as (session, reused):
            window = WindowSession(session, config.pinned_tokens, kept[:reused]) if windowed else None
            ends_text = self._ends_text(kept, config)
            rows = generate(window or session, kept, config, task.seed, reused=reused, ends_text=ends_text)
            for chunk in self._chunks_of_rows(rows, clock, kept, config):
                if chunk.stats is not None:
                    chunk = replace(chunk, stats=self._with_prefix(chunk.stats, task, reused))
                yield with_long_text(chunk, len(task.ids) - len(kept), window)

    def batch(
        self,
        prompts: Sequence[Prompt],
        common: GenerationConfig,
        each: Sequence[GenerationOptions] | None,
        max_rows: int,
    ) -> list[Completion]:
        """All prompts side by side, `max_rows` rows at a time; each with its options over the `common` ones.

        Raises: as `Model.generate_batch`.
        """
        check_max_rows(max_rows)
        if isinstance(prompts, str):
            raise PromptError("prompts must be a list, got one text: call generate for it")
        prompts = _listed(prompts, "prompts must be a list of texts or of token ids")
        own = (
            [GenerationOptions() for _ in prompts] if each is None else _listed(each, "each must be a list of options")
        )
        if not all(isinstance(options, Mapping) for options in own):
            raise ConfigError("each must hold the options of every prompt as a dict")
        if len(own) != len(prompts):
            raise PromptError(f"each must hold options for every prompt: {len(prompts)} of them, got {len(own)}")
        tasks = [self.task(p, common.updated(dict(more))) for p, more in zip(prompts, own, strict=True)]
        batch = []
        for task in tasks:
            kept, config = self._fitted(task)
            rows = [self._chunks(kept, config, index) for index in range(config.num_return_sequences)]
            batch.append(BatchPrompt(kept, config, task.seed, rows, dropped_tokens=len(task.ids) - len(kept)))
        with self._sessions.borrowed() as (session, _):
            rows_at_once = min(max_rows, max(1, sum(len(prompt.rows) for prompt in batch)))
            scheduler = Scheduler(session, max_rows=rows_at_once, states=self._sessions.states)
            generate_batch(scheduler, batch, self._load_seconds)
        for task, prompt in zip(tasks, batch, strict=True):
            last = prompt.chunks[-1]
            assert last.stats is not None  # the last chunk always carries them
            prompt.chunks[-1] = replace(last, stats=self._with_prefix(last.stats, task, last.stats.reused_tokens))
        return [self.completion(task, prompt.chunks) for task, prompt in zip(tasks, batch, strict=True)]

    def completion(self, task: TextTask, chunks: Iterable[Chunk]) -> Completion:
        """All chunks of a task, joined."""
        text = task.prompt if isinstance(task.prompt, str) else self._tokenizer.decode(task.ids[task.prefix_tokens :])
        return Completion.of_chunks(text, chunks, task.seed if task.config.do_sample else None)

    def _fitted(self, task: TextTask) -> tuple[list[int], GenerationConfig]:
        """The ids that fit, those of the prefix among them, and a configuration that counts them all.

        Raises:
            ContextError: there is a prefix, and the prompt does not fit behind it.
        """
        own, room = task.ids[task.prefix_tokens :], self._context_length - task.prefix_tokens
        kept, config = fitted(own, task.config, room)
        before = task.prefix_tokens + self._encoder.learned_tokens
        if before and len(kept) > room:
            raise ContextError(
                f"the prompt has {len(kept)} tokens, but behind its prefix of {before} this model's context holds "
                f"{room}: shorten the prompt, or set context_overflow to 'truncate' or 'window'"
            )
        if task.prefix_tokens:
            config.new_token_limit(len(kept))  # refuses a max_length by the prompt's own length
            config = behind_prefix(config, task.prefix_tokens)
        return task.ids[: task.prefix_tokens] + kept, config

    def _with_prefix(self, stats: Stats, task: TextTask, reused: int) -> Stats:
        """The prefix counted by itself."""
        return replace(
            stats,
            prompt_tokens=stats.prompt_tokens - task.prefix_tokens,
            reused_tokens=max(0, reused - task.prefix_tokens),
            prefix_tokens=task.prefix_tokens + self._encoder.learned_tokens,
        )

    def _chunks_of_rows(
        self, rows: Iterator[Iterator[Step]], clock: GenerationClock, prompt: list[int], config: GenerationConfig
    ) -> Iterator[Chunk]:
        for index, steps in enumerate(rows):
            clock.row_begins()
            chunks = self._chunks(prompt, config, index)
            for step in clock.timed(steps):
                chunk = chunks.push(step)
                if chunk is None:
                    continue
                if chunk.finish_reason is None:
                    yield chunk
                    continue
                last = index == config.num_return_sequences - 1
                stats = clock.stats(len(prompt), self._load_seconds) if last else None
                yield replace(chunk, stats=stats)
                break

    def _chunks(self, prompt: list[int], config: GenerationConfig, index: int) -> ChunkStream:
        text = self._text_after(prompt, config.stop_strings)
        return ChunkStream(self._tokenizer, text, index, logprobs=config.logprobs is not None)

    def _ends_text(self, prompt: list[int], config: GenerationConfig) -> EndsText | None:
        """Whether new tokens complete a stop string: what beam search asks of each beam."""
        if not config.stop_strings or config.num_beams == 1:
            return None

        def ends(new: Sequence[int]) -> bool:
            text = self._text_after(prompt[-1:], config.stop_strings)
            for token in new:
                text.push(token)
            return text.stopped

        return ends

    def _breakers(self, breakers: tuple[str | int, ...]) -> tuple[int, ...]:
        """Token ids for the texts over which DRY looks for no repetition: every token that holds one."""
        if breakers not in self._breaker_ids:
            texts = [breaker for breaker in breakers if isinstance(breaker, str)]
            ids = {breaker for breaker in breakers if isinstance(breaker, int)}
            for token in range(self._tokenizer.vocab_size):
                text = self._tokenizer.decode([token])
                if any(breaker in text for breaker in texts):
                    ids.add(token)
            self._breaker_ids[breakers] = tuple(sorted(ids))
        return self._breaker_ids[breakers]

    def _text_after(self, prompt: list[int], stop_strings: Sequence[str]) -> TextStream:
        """A stream of the text that follows the prompt, spaced as the decoder spaces it there."""
        decoder = self._tokenizer.stream(skip_special_tokens=True)
        for token_id in prompt:
            decoder.push(token_id)
        return TextStream(decoder, stop_strings)


def _listed(values: Iterable[Item], wanted: str) -> list[Item]:
    try:
        return list(values)
    except TypeError:
        raise PromptError(f"{wanted}, got {type(values).__name__}") from None


def with_long_text(chunk: Chunk, dropped_tokens: int, window: WindowSession | None) -> Chunk:
    """The chunk with what the long text cost in its stats, where it has some."""
    if chunk.stats is None or (dropped_tokens == 0 and window is None):
        return chunk
    tokens, seconds = (window.reencoded_tokens, window.reencode_seconds) if window is not None else (0, 0.0)
    stats = replace(chunk.stats, dropped_tokens=dropped_tokens, reencoded_tokens=tokens, reencode_seconds=seconds)
    return replace(chunk, stats=stats)
