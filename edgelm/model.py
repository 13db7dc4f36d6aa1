"""The public way in: a bundle, a tokenizer and a session joined into a `Model`."""

import asyncio
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Self, Unpack

from edgelm import text_scoring
from edgelm.async_model import EitherCancel, Workers, stream_in_thread
from edgelm.bundle import Bundle
from edgelm.bundle_parts import bundle_config, bundle_tokenizer, default_bundle_path
from edgelm.completion import Chunk, Completion
from edgelm.decoding import EndsText, Step
from edgelm.generate import generate
from edgelm.generation_clock import GenerationClock
from edgelm.generation_config import GenerationConfig
from edgelm.generation_options import GenerationOptions
from edgelm.long_context import WindowSession, fitted, with_long_text
from edgelm.memory_forecast import ModelMemory, refuse_if_too_large
from edgelm.prompts import Prompt, prompt_ids
from edgelm.scores import LengthNormalization, Perplexity, Pooling, Score, Selection, TokenLogprobs
from edgelm.scoring import Vector
from edgelm.session import Session
from edgelm.session_pool import SessionPool
from edgelm.text_stream import TextStream
from edgelm.tokenizer import Tokenizer


class Model:
    """Text in, text out.

    Every generation runs in a cache of its own, so one model serves several threads, several open streams and several
    tasks. `session` is the caller's, for stepping by hand, in one thread at a time. A model is pickled as its path,
    and works on in a forked child. ``with`` closes it.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        session: Session,
        generation_config: GenerationConfig | None = None,
        *,
        load_seconds: float = 0.0,
    ) -> None:
        """Args are finished parts; `load` builds them."""
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.session = session
        self.generation_config = generation_config or GenerationConfig()
        """Defaults of every generation, from the bundle's ``generation_config.json``."""
        self.load_seconds = load_seconds
        self._breaker_ids: dict[tuple[str | int, ...], tuple[int, ...]] = {}
        self._sessions = SessionPool(session)
        self._workers = Workers()

    def __enter__(self) -> Self:
        self._sessions.check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        parts = (os.fspath(self.bundle.path), str(self.session.device), self.session.threads, self.generation_config)
        return _loaded_as, parts

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._sessions.closed

    def close(self) -> None:
        """Free the model's memory. Generations that are open in other threads or tasks end with ClosedError.

        Waits for the token, or the piece of a prompt, that another thread is computing. Closing twice is no error.
        """
        self._workers.release()
        self._sessions.close()

    def generate(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Completion:
        """Continue `prompt`, a text or token ids.

        Args:
            options: see `GenerationConfig`; what is not given is the bundle's default.

        Raises:
            PromptError: the prompt is empty, no text, or holds an unknown token id.
            ContextError: the prompt is longer than the context.
            ConfigError: an option is unknown, out of range or contradicts another.
            ClosedError: the model is closed, or was closed meanwhile.
        """
        ids, config, seed = self._prepare(prompt, options)
        return self._completion(prompt, ids, config, seed, self._stream(ids, config, seed))

    def stream(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Iterator[Chunk]:
        """Continue `prompt` piece by piece; the last chunk carries the finish reason and the stats.

        With `num_return_sequences` the rows follow one another; `Chunk.index` tells which.

        Raises: as `generate`, before the first chunk.
        """
        return self._stream(*self._prepare(prompt, options))

    async def agenerate(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Completion:
        """As `generate`, without holding up the event loop; cancelling the task stops it within one token.

        Raises: as `generate`.
        """
        cancel = self._either_cancel(options)
        pool = self._workers.pool()
        loop = asyncio.get_running_loop()
        ids, config, seed = await loop.run_in_executor(pool, self._prepare, prompt, options | {"cancel": cancel})
        async with aclosing(stream_in_thread(partial(self._stream, ids, config, seed), cancel, pool)) as stream:
            chunks = [chunk async for chunk in stream]
        return self._completion(prompt, ids, config, seed, chunks)

    def astream(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> AsyncGenerator[Chunk, None]:
        """As `stream`, for ``async for``; cancelling the task, or ``aclose()``, stops it within one token.

        Raises:
            ConfigError: an option is unknown, out of range or contradicts another; the others of `generate` come
                before the first chunk.
        """
        cancel = self._either_cancel(options)
        begin = partial(self.stream, prompt, **(options | {"cancel": cancel}))
        return stream_in_thread(begin, cancel, self._workers.pool())

    def warmup(self) -> float:
        """Compute three tokens, so that the first request finds the weights in memory; returns the seconds it took.

        Raises:
            ClosedError: the model is closed.
        """
        started = time.perf_counter()
        with self._sessions.borrowed() as session:
            session.step([0, 0])
            session.step([0])
        return time.perf_counter() - started

    @property
    def memory(self) -> ModelMemory:
        """What this model is expected to take, and what this process has now."""
        return ModelMemory.of(self.bundle)

    def score(self, prompt: Prompt, continuation: Prompt) -> Score:
        """How likely `continuation` is after `prompt`, in all and token by token; see `edgelm.text_scoring.score`."""
        with self._sessions.borrowed() as session:
            return text_scoring.score(session, self.tokenizer, prompt, continuation)

    def choose(
        self,
        prompt: Prompt,
        options: Sequence[Prompt],
        *,
        length_normalization: LengthNormalization = "none",
        calibrate: Prompt | None = None,
    ) -> Selection:
        """Which of `options` is likeliest after `prompt`, with probabilities; see `edgelm.text_scoring.choose`."""
        with self._sessions.borrowed() as session:
            return text_scoring.choose(session, self.tokenizer, prompt, options, length_normalization, calibrate)

    def perplexity(self, text: Prompt, *, stride: int | None = None) -> Perplexity:
        """How surprised the model is by `text`, of any length; see `edgelm.scoring.perplexity`."""
        with self._sessions.borrowed() as session:
            return text_scoring.perplexity(session, self.tokenizer, text, stride)

    def embed(self, text: Prompt, *, pooling: Pooling = "mean", normalize: bool = False) -> Vector:
        """`text` as a vector, float32 (D,), its last hidden states pooled; see `edgelm.scoring.embed`."""
        with self._sessions.borrowed() as session:
            return text_scoring.embed(session, self.tokenizer, text, pooling, normalize=normalize)

    def _prepare(self, prompt: Prompt, options: GenerationOptions) -> tuple[list[int], GenerationConfig, int]:
        config = self.generation_config.updated(dict(options))
        if config.dry_multiplier and any(isinstance(breaker, str) for breaker in config.dry_sequence_breakers):
            config = config.updated({"dry_sequence_breakers": self._breakers(config.dry_sequence_breakers)})
        return prompt_ids(self.tokenizer, prompt), config, secrets.randbits(63) if config.seed is None else config.seed

    def _stream(self, prompt_ids: list[int], config: GenerationConfig, seed: int) -> Iterator[Chunk]:
        clock = GenerationClock(searching=config.num_beams > 1)
        kept, config = fitted(prompt_ids, config, self.session.context_length)
        with self._sessions.borrowed() as session:
            window = WindowSession(session, config.pinned_tokens) if config.context_overflow == "window" else None
            rows = generate(window or session, kept, config, seed, ends_text=self._ends_text(kept, config))
            for chunk in self._stream_rows(rows, clock, kept, config):
                yield with_long_text(chunk, len(prompt_ids) - len(kept), window)

    def _stream_rows(
        self, rows: Iterator[Iterator[Step]], clock: GenerationClock, prompt_ids: list[int], config: GenerationConfig
    ) -> Iterator[Chunk]:
        for index, steps in enumerate(rows):
            clock.row_begins()
            text = self._text_after(prompt_ids, config.stop_strings)
            waiting: deque[TokenLogprobs] = deque()  # of tokens whose text is not complete
            for step in clock.timed(steps):
                if step.logprobs is not None:
                    waiting.append(text_scoring.named_with_alternatives(self.tokenizer, step.logprobs))
                piece = text.finish() if step.token_id is None else text.push(step.token_id)
                logprobs = None if config.logprobs is None else tuple(waiting.popleft() for _ in piece.token_ids)
                reason = "stop" if text.stopped else step.finish_reason
                if reason is None:
                    if piece.text:
                        yield Chunk(piece.text, piece.token_ids, index, logprobs=logprobs)
                    continue
                last = index == config.num_return_sequences - 1
                stats = clock.stats(len(prompt_ids), self.load_seconds) if last else None
                yield Chunk(piece.text, piece.token_ids, index, reason, stats, logprobs)
                break

    def _either_cancel(self, options: GenerationOptions) -> EitherCancel:
        return EitherCancel(self.generation_config.updated(dict(options)).cancel)

    def _completion(
        self, prompt: Prompt, ids: list[int], config: GenerationConfig, seed: int, chunks: Iterable[Chunk]
    ) -> Completion:
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
        return Completion.of_chunks(text, chunks, seed if config.do_sample else None)

    def _ends_text(self, prompt_ids: list[int], config: GenerationConfig) -> EndsText | None:
        """Whether new tokens complete a stop string: what beam search asks of each beam."""
        if not config.stop_strings or config.num_beams == 1:
            return None

        def ends(new: Sequence[int]) -> bool:
            text = self._text_after(prompt_ids[-1:], config.stop_strings)
            for token in new:
                text.push(token)
            return text.stopped

        return ends

    def _breakers(self, breakers: tuple[str | int, ...]) -> tuple[int, ...]:
        """Token ids for the texts over which DRY looks for no repetition: every token that holds one."""
        if breakers not in self._breaker_ids:
            texts = [breaker for breaker in breakers if isinstance(breaker, str)]
            ids = {breaker for breaker in breakers if isinstance(breaker, int)}
            for token in range(self.tokenizer.vocab_size):
                text = self.tokenizer.decode([token])
                if any(breaker in text for breaker in texts):
                    ids.add(token)
            self._breaker_ids[breakers] = tuple(sorted(ids))
        return self._breaker_ids[breakers]

    def _text_after(self, prompt_ids: list[int], stop_strings: Sequence[str]) -> TextStream:
        """A stream of the text that follows the prompt, spaced as the decoder spaces it there."""
        decoder = self.tokenizer.stream(skip_special_tokens=True)
        for token_id in prompt_ids:
            decoder.push(token_id)
        return TextStream(decoder, stop_strings)


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    shared_threads: bool = False,
) -> Model:
    """Load a bundle.

    Args:
        path: the bundle's folder; None for the model embedded in the package.
        device: "auto", "cpu", "cuda" or "cuda:N"; an explicit device never falls back.
        threads: CPU threads; None for all CPUs this process may use.
        shared_threads: whether to run on threads that all models of the process share (all or none must): fewer
            threads, but slower, and no use after a fork.

    Raises:
        BundleError: the folder is no valid bundle, or its parts disagree.
        DeviceError: ONNX Runtime is missing or the device cannot be used.
        TokenizerError: the bundle's tokenizer cannot be read.
        InsufficientMemoryError: the model would not fit into the memory this process may use.
    """
    started = time.perf_counter()
    bundle = Bundle.read(default_bundle_path() if path is None else path)
    refuse_if_too_large(bundle)
    tokenizer = bundle_tokenizer(bundle)
    config = bundle_config(bundle)
    session = Session.open(bundle, device=device, threads=threads, shared_threads=shared_threads)
    return Model(bundle, tokenizer, session, config, load_seconds=time.perf_counter() - started)


def _loaded_as(path: str, device: str, threads: int, generation_config: GenerationConfig) -> Model:
    """What a pickled model becomes."""
    model = load(path, device=device, threads=threads)
    model.generation_config = generation_config
    return model
