"""The public way in: a bundle, a tokenizer and a session joined into a `Model`."""

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Unpack

from edgelm import text_scoring
from edgelm.batch_generation import BatchPrompt, generate_batch
from edgelm.bundle import Bundle
from edgelm.bundle_parts import bundle_config, bundle_tokenizer, default_bundle_path
from edgelm.chunk_stream import ChunkStream
from edgelm.completion import Choice, Chunk, Completion, Stats
from edgelm.decoding import EndsText, FinishReason, Step
from edgelm.errors import PromptError
from edgelm.generate import generate
from edgelm.generation_clock import GenerationClock
from edgelm.generation_config import GenerationConfig
from edgelm.generation_options import GenerationOptions
from edgelm.prompt_state import PromptState, StateDtype, read_state, write_state
from edgelm.prompts import Prompt, prompt_ids
from edgelm.scheduler import DEFAULT_MAX_ROWS, Scheduler
from edgelm.scores import LengthNormalization, Perplexity, Pooling, Score, Selection, TokenLogprobs
from edgelm.scoring import Vector
from edgelm.session import Session
from edgelm.session_pool import SessionPool
from edgelm.text_stream import TextStream
from edgelm.tokenizer import Tokenizer


class Model:
    """Text in, text out.

    Every generation runs in a cache of its own, so one model serves several threads and several open streams.
    `session` is the caller's, for stepping by hand.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        session: Session,
        generation_config: GenerationConfig | None = None,
        *,
        load_seconds: float = 0.0,
        prefix_cache_bytes: int = 0,
    ) -> None:
        """Args are finished parts; `load` builds them."""
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.session = session
        self.generation_config = generation_config or GenerationConfig()
        """Defaults of every generation, from the bundle's ``generation_config.json``."""
        self.load_seconds = load_seconds
        self._breaker_ids: dict[tuple[str | int, ...], tuple[int, ...]] = {}
        self._sessions = SessionPool(session, prefix_cache_bytes)

    def generate(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Completion:
        """Continue `prompt`, a text or token ids.

        Args:
            options: see `GenerationConfig`; what is not given is the bundle's default.

        Raises:
            PromptError: the prompt is empty, no text, or holds an unknown token id.
            ContextError: the prompt is longer than the context.
            ConfigError: an option is unknown, out of range or contradicts another.
        """
        ids, config, seed = self._prepare(prompt, options)
        return self._completion(prompt, ids, config, seed, list(self._stream(ids, config, seed)))

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        each: Sequence[GenerationOptions] | None = None,
        max_rows: int = DEFAULT_MAX_ROWS,
        **options: Unpack[GenerationOptions],
    ) -> list[Completion]:
        """Continue many prompts of any lengths side by side: each as `generate` would, several times faster in all.

        What a prompt gets does not depend on the others, bit for bit. Against `generate`, fp32 gives the same ids;
        in other recipes the last bits of logits differ, which counts where the likeliest two tokens are nearly tied.

        Args:
            each: options of each prompt, over `options`.
            max_rows: how many texts decode at a time; each takes the memory of one more context.

        Raises: as `generate`.
        """
        own: Sequence[GenerationOptions] = [{} for _ in prompts] if each is None else each
        if isinstance(prompts, str):
            raise PromptError("prompts must be a list, got one text: call generate for it")
        if len(own) != len(prompts):
            raise PromptError(f"each must hold options for every prompt: {len(prompts)} of them, got {len(own)}")
        batch = []
        for prompt, more in zip(prompts, own, strict=True):
            ids, config, seed = self._prepare(prompt, options, more)
            batch.append(BatchPrompt(ids, config, seed, self._rows(ids, config)))
        with self._sessions.borrowed() as (session, _):
            rows = min(max_rows, max(1, sum(len(prompt.rows) for prompt in batch)))
            scheduler = Scheduler(session, max_rows=rows, states=self._sessions.states)
            generate_batch(scheduler, batch, self.load_seconds)
        return [self._completion(p, b.ids, b.config, b.seed, b.chunks) for p, b in zip(prompts, batch, strict=True)]

    def save_state(self, path: str | os.PathLike[str], prompt: Prompt, *, dtype: StateDtype = "float32") -> None:
        """Write what the model remembers of `prompt` to the file `path`, to be loaded by `load_state`.

        Args:
            dtype: "float16" halves the file; results are then no longer the same to the last bit.

        Raises:
            PromptError, ContextError: as `generate`.
            StateError: the numbers do not fit into float16.
            OSError: the file cannot be written.
        """
        ids = prompt_ids(self.tokenizer, prompt)
        with self._sessions.borrowed(ids) as (session, reused):
            session.step(ids[reused:])
            state = PromptState(tuple(ids), session.remembered(len(ids)))
        write_state(path, self.bundle.manifest, state, dtype)

    def load_state(self, path: str | os.PathLike[str]) -> PromptState:
        """Read what `save_state` wrote: prompts that begin like it go on from there, until `forget`.

        Raises:
            StateError: the file is missing, damaged, or of another bundle.
        """
        state = read_state(path, self.bundle.manifest)
        self._sessions.add(state)
        return state

    def forget(self) -> None:
        """Forget prompts of earlier calls and loaded states: the next prompt is computed whole."""
        self._sessions.forget()

    def _completion(
        self, prompt: Prompt, ids: list[int], config: GenerationConfig, seed: int, chunks: list[Chunk]
    ) -> Completion:
        texts = [""] * config.num_return_sequences
        token_ids: list[list[int]] = [[] for _ in texts]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in texts]
        reasons: dict[int, FinishReason] = {}
        stats: Stats | None = None
        for chunk in chunks:
            texts[chunk.index] += chunk.text
            token_ids[chunk.index] += chunk.token_ids
            logprobs[chunk.index] += chunk.logprobs or ()
            if chunk.finish_reason is not None:
                reasons[chunk.index] = chunk.finish_reason
            stats = chunk.stats or stats
        assert stats is not None  # the last chunk always carries them
        choices = tuple(
            Choice(t, tuple(token_ids[i]), reasons[i], None if config.logprobs is None else tuple(logprobs[i]))
            for i, t in enumerate(texts)
        )
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
        return Completion(text, choices, seed if config.do_sample else None, stats)

    def stream(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Iterator[Chunk]:
        """Continue `prompt` piece by piece; the last chunk carries the finish reason and the stats.

        With `num_return_sequences` the rows follow one another; `Chunk.index` tells which.

        Raises: as `generate`, before the first chunk.
        """
        return self._stream(*self._prepare(prompt, options))

    def score(self, prompt: Prompt, continuation: Prompt) -> Score:
        """How likely `continuation` is after `prompt`, in all and token by token; see `edgelm.text_scoring.score`."""
        with self._sessions.borrowed() as (session, _):
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
        with self._sessions.borrowed() as (session, _):
            return text_scoring.choose(session, self.tokenizer, prompt, options, length_normalization, calibrate)

    def perplexity(self, text: Prompt, *, stride: int | None = None) -> Perplexity:
        """How surprised the model is by `text`, of any length; see `edgelm.scoring.perplexity`."""
        with self._sessions.borrowed() as (session, _):
            return text_scoring.perplexity(session, self.tokenizer, text, stride)

    def embed(self, text: Prompt, *, pooling: Pooling = "mean", normalize: bool = False) -> Vector:
        """`text` as a vector, float32 (D,), its last hidden states pooled; see `edgelm.scoring.embed`."""
        with self._sessions.borrowed() as (session, _):
            return text_scoring.embed(session, self.tokenizer, text, pooling, normalize=normalize)

    def _prepare(
        self, prompt: Prompt, options: GenerationOptions, over: GenerationOptions | None = None
    ) -> tuple[list[int], GenerationConfig, int]:
        config = self.generation_config.updated(dict(options)).updated(dict(over or {}))
        if config.dry_multiplier and any(isinstance(breaker, str) for breaker in config.dry_sequence_breakers):
            config = config.updated({"dry_sequence_breakers": self._breakers(config.dry_sequence_breakers)})
        return prompt_ids(self.tokenizer, prompt), config, secrets.randbits(63) if config.seed is None else config.seed

    def _stream(self, prompt_ids: list[int], config: GenerationConfig, seed: int) -> Iterator[Chunk]:
        clock = GenerationClock(searching=config.num_beams > 1)
        # Contrastive search compares the hidden states of the whole prompt: they are not kept.
        with self._sessions.borrowed(() if config.penalty_alpha is not None else prompt_ids) as (session, reused):
            ends_text = self._ends_text(prompt_ids, config)
            rows = generate(session, prompt_ids, config, seed, reused=reused, ends_text=ends_text)
            for chunk in self._stream_rows(rows, clock, prompt_ids, config):
                yield replace(chunk, stats=chunk.stats and replace(chunk.stats, reused_tokens=reused))

    def _stream_rows(
        self, rows: Iterator[Iterator[Step]], clock: GenerationClock, prompt_ids: list[int], config: GenerationConfig
    ) -> Iterator[Chunk]:
        for index, steps in enumerate(rows):
            clock.row_begins()
            chunks = self._chunks(prompt_ids, config, index)
            for step in clock.timed(steps):
                chunk = chunks.push(step)
                if chunk is None:
                    continue
                if chunk.finish_reason is None:
                    yield chunk
                    continue
                last = index == config.num_return_sequences - 1
                yield replace(chunk, stats=clock.stats(len(prompt_ids), self.load_seconds) if last else None)
                break

    def _rows(self, prompt_ids: list[int], config: GenerationConfig) -> list[ChunkStream]:
        return [self._chunks(prompt_ids, config, index) for index in range(config.num_return_sequences)]

    def _chunks(self, prompt_ids: list[int], config: GenerationConfig, index: int) -> ChunkStream:
        text = self._text_after(prompt_ids, config.stop_strings)
        return ChunkStream(self.tokenizer, text, index, logprobs=config.logprobs is not None)

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
    prefix_cache_bytes: int = 0,
) -> Model:
    """Load a bundle.

    Args:
        path: the bundle's folder; None for the model embedded in the package.
        device: "auto", "cpu", "cuda" or "cuda:N"; an explicit device never falls back.
        threads: CPU threads; None for all CPUs this process may use.
        prefix_cache_bytes: a prompt that begins like an earlier one is computed from where they differ. The last
            prompt is kept in any case, others while all take no more memory than this.

    Raises:
        BundleError: the folder is no valid bundle, or its parts disagree.
        DeviceError: ONNX Runtime is missing or the device cannot be used.
        TokenizerError: the bundle's tokenizer cannot be read.
    """
    started = time.perf_counter()
    bundle = Bundle.read(default_bundle_path() if path is None else path)
    tokenizer = bundle_tokenizer(bundle)
    config = bundle_config(bundle)
    session = Session.open(bundle, device=device, threads=threads)
    seconds = time.perf_counter() - started
    return Model(bundle, tokenizer, session, config, load_seconds=seconds, prefix_cache_bytes=prefix_cache_bytes)
