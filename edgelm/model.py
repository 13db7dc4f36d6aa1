"""The public way in: a bundle, a tokenizer and a session joined into a `Model`."""

import os
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Unpack

from edgelm import text_scoring
from edgelm.bundle import Bundle
from edgelm.completion import Choice, Chunk, Completion, Stats
from edgelm.decoding import EndsText, FinishReason, Step
from edgelm.errors import BundleError, ConfigError
from edgelm.generate import generate
from edgelm.generation_clock import GenerationClock
from edgelm.generation_config import GenerationConfig, config_from_file
from edgelm.generation_options import GenerationOptions
from edgelm.prompts import Prompt, prompt_ids
from edgelm.scores import LengthNormalization, Perplexity, Pooling, Score, Selection, TokenLogprobs
from edgelm.scoring import Vector
from edgelm.session import Session
from edgelm.strict_json import StrictJsonError, parse_json
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
    ) -> None:
        """Args are finished parts; `load` builds them."""
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.session = session
        self.generation_config = generation_config or GenerationConfig()
        """Defaults of every generation, from the bundle's ``generation_config.json``."""
        self.load_seconds = load_seconds
        self._breaker_ids: dict[tuple[str | int, ...], tuple[int, ...]] = {}
        self._idle: list[Session] = []  # a finished generation's session: its cache has its pages already

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
        texts = [""] * config.num_return_sequences
        token_ids: list[list[int]] = [[] for _ in texts]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in texts]
        reasons: dict[int, FinishReason] = {}
        stats: Stats | None = None
        for chunk in self._stream(ids, config, seed):
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
        with self._borrowed_session() as session:
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
        with self._borrowed_session() as session:
            return text_scoring.choose(session, self.tokenizer, prompt, options, length_normalization, calibrate)

    def perplexity(self, text: Prompt, *, stride: int | None = None) -> Perplexity:
        """How surprised the model is by `text`, of any length; see `edgelm.scoring.perplexity`."""
        with self._borrowed_session() as session:
            return text_scoring.perplexity(session, self.tokenizer, text, stride)

    def embed(self, text: Prompt, *, pooling: Pooling = "mean", normalize: bool = False) -> Vector:
        """`text` as a vector, float32 (D,), its last hidden states pooled; see `edgelm.scoring.embed`."""
        with self._borrowed_session() as session:
            return text_scoring.embed(session, self.tokenizer, text, pooling, normalize=normalize)

    def _prepare(self, prompt: Prompt, options: GenerationOptions) -> tuple[list[int], GenerationConfig, int]:
        config = self.generation_config.updated(dict(options))
        if config.dry_multiplier and any(isinstance(breaker, str) for breaker in config.dry_sequence_breakers):
            config = config.updated({"dry_sequence_breakers": self._breakers(config.dry_sequence_breakers)})
        return prompt_ids(self.tokenizer, prompt), config, secrets.randbits(63) if config.seed is None else config.seed

    def _stream(self, prompt_ids: list[int], config: GenerationConfig, seed: int) -> Iterator[Chunk]:
        clock = GenerationClock(searching=config.num_beams > 1)
        with self._borrowed_session() as session:
            rows = generate(session, prompt_ids, config, seed, ends_text=self._ends_text(prompt_ids, config))
            yield from self._stream_rows(rows, clock, prompt_ids, config)

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

    @contextmanager
    def _borrowed_session(self) -> Iterator[Session]:
        """An empty session for one generation; at most one is kept for the next."""
        try:
            session = self._idle.pop()  # atomic: two threads never get the same one
            session.reset()
        except IndexError:
            session = self.session.sibling()
        try:
            yield session
        finally:
            if not self._idle:
                self._idle.append(session)

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


def load(path: str | os.PathLike[str] | None = None, *, device: str = "auto", threads: int | None = None) -> Model:
    """Load a bundle.

    Args:
        path: the bundle's folder; None for the model embedded in the package.
        device: "auto", "cpu", "cuda" or "cuda:N"; an explicit device never falls back.
        threads: CPU threads; None for all CPUs this process may use.

    Raises:
        BundleError: the folder is no valid bundle, or its parts disagree.
        DeviceError: ONNX Runtime is missing or the device cannot be used.
        TokenizerError: the bundle's tokenizer cannot be read.
    """
    started = time.perf_counter()
    bundle = Bundle.read(default_bundle_path() if path is None else path)
    tokenizer = _bundle_tokenizer(bundle)
    config = _bundle_config(bundle)
    session = Session.open(bundle, device=device, threads=threads)
    return Model(bundle, tokenizer, session, config, load_seconds=time.perf_counter() - started)


def default_bundle_path() -> Path:
    """The folder of the embedded default model.

    Raises:
        BundleError: this installation has none.
    """
    try:
        folder: Path = import_module("edgelm_models").default_bundle_path()
    except ModuleNotFoundError:
        raise BundleError("this installation has no embedded model; name a bundle folder (-m/--model)") from None
    return folder


def _bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer.json says all; the files beside it are for other tools."""
    try:
        tokenizer = Tokenizer.from_json(bundle.file("tokenizer.json").read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise BundleError(f"tokenizer.json of {os.fspath(bundle.path)!r} is not UTF-8 text") from None
    vocab_size = bundle.manifest.architecture.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise BundleError(
            f"the tokenizer of {os.fspath(bundle.path)!r} knows {tokenizer.vocab_size} tokens but its graph only "
            f"{vocab_size}: they do not belong together"
        )
    tokenizer.pad_vocabulary(vocab_size)
    return tokenizer


def _bundle_config(bundle: Bundle) -> GenerationConfig:
    """The bundle's defaults, checked against its vocabulary."""
    name = "generation_config.json"
    try:
        content = parse_json(bundle.file(name).read_bytes())
        if not isinstance(content, dict):
            raise StrictJsonError("must be an object")
        config = config_from_file(content)
    except (StrictJsonError, ConfigError) as error:
        raise BundleError(f"{name} of {os.fspath(bundle.path)!r}: {error}") from None
    wrong = [token for token in config.eos_token_id if token >= bundle.manifest.architecture.vocab_size]
    if wrong:
        raise BundleError(f"{name} of {os.fspath(bundle.path)!r}: eos_token_id {wrong[0]} is not in the vocabulary")
    return config
