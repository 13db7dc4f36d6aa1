"""The text end of one prompt's generation: steps of token ids go in, chunks of text and statistics come out."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from edgelm.decoding.constraint import TokenMatcher
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.request import Step
from edgelm.decoding.window import WindowSession
from edgelm.engine.memory import peak_rss_bytes
from edgelm.generation.latent_prefix import LatentPrefix
from edgelm.generation.results import Chunk, Completion, Stats, TextEnd
from edgelm.scoring import text_scores
from edgelm.scoring.results import TokenLogprobs
from edgelm.text.call_reader import CallReader
from edgelm.text.constraints import ToolUse
from edgelm.text.prompts import Prompt
from edgelm.text.stop_strings import TextStream
from edgelm.text.tokenizer import Tokenizer
from edgelm.text.tools import ToolCall


class Meter:
    """Times the tokens of one prompt, of all its rows together.

    Time counts while steps are computed. What happens between two steps that `timed` passes on does not count: the
    pauses that the caller makes, and turning tokens into text.
    """

    def __init__(self, *, searching: bool) -> None:
        """Start the clock.

        Args:
            searching: whether all tokens come at the end of a search. The whole search then counts as decoding.
        """
        self._searching = searching
        self._paused_seconds = 0.0
        self._pause_began: float | None = None
        self._started = time.perf_counter()
        self._first_step: float | None = None
        self._first_token = self._last_token = 0.0
        self._rows: set[int] = set()  # rows with a token
        self.new_tokens = self.drafted_tokens = self.accepted_tokens = 0

    def timed(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps of one row, unchanged; only the time that each of them takes counts."""
        while True:
            if self._pause_began is not None:
                self._paused_seconds += time.perf_counter() - self._pause_began
                self._pause_began = None
            step = next(steps, None)
            self._pause_began = time.perf_counter()
            if step is None:
                return
            yield step

    def search_begins(self) -> None:
        """Note that the prompt is computed: what follows, up to the first step, is the search."""
        if self._first_step is None:
            self._first_step = self._first_token = time.perf_counter() - self._paused_seconds

    def count(self, row: int, step: Step) -> None:
        """Count a step of `row`, which was computed just now."""
        now = (self._pause_began or time.perf_counter()) - self._paused_seconds
        if self._first_step is None:
            self._first_step = self._first_token = now
        if step.token_id is not None:
            self._last_token = now
            self._rows.add(row)
            self.new_tokens += 1
        self.drafted_tokens += step.drafted
        self.accepted_tokens += step.was_drafted

    def rates(self) -> tuple[float, float, float]:
        """`Stats.prefill_seconds`, `Stats.decode_seconds` and `Stats.tokens_per_second` of the steps so far."""
        assert self._first_step is not None
        decode_seconds = max(0.0, self._last_token - self._first_token)
        counted = self.new_tokens if self._searching else self.new_tokens - len(self._rows)
        rate = counted / decode_seconds if counted and decode_seconds else 0.0
        return self._first_step - self._started, decode_seconds, rate


class TextRun:
    """One prompt, checked and fitted into the context, and the texts of its rows.

    Whoever decodes feeds it: `begin`, then `push` for every step of every row, in any order of the rows. The loop that
    decodes rows one after another does so, and the scheduler that decodes them side by side.

    Attributes:
        ids: token ids to decode from, those of a text prefix included.
        config: options of the generation, for `ids`.
        seed: the caller's, or a random one.
        reused_tokens: how many of `ids` were not computed. The decoding loop sets it.
        matcher: what the texts must obey, at their beginning; None if they may be anything.
        latent: the latent vector that stands before `ids`; None for none.
        window: the window that the decoding loop uses, if any. The decoding loop sets it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Prompt,
        ids: list[int],
        config: GenerationConfig,
        seed: int,
        *,
        matcher: TokenMatcher | None = None,
        prefix_tokens: int = 0,
        learned_tokens: int = 0,
        dropped_tokens: int = 0,
        healed_characters: int = 0,
        load_seconds: float = 0.0,
        latent: LatentPrefix | None = None,
    ) -> None:
        """Make a run of finished parts; `TextGeneration.run` builds them.

        Args:
            tokenizer: turns tokens into text.
            prompt: the prompt as the caller gave it.
            ids: see the class.
            config: see the class.
            seed: see the class.
            matcher: see the class.
            prefix_tokens: how many of `ids` belong to a text prefix.
            learned_tokens: length of a learned prefix, which has no ids.
            dropped_tokens: tokens of the prompt that are not in `ids`, because they do not fit.
            healed_characters: how much of the prompt's end the new tokens spell again; it is no new text.
            load_seconds: how long the model took to load, for the statistics.
            latent: see the class.
        """
        self.ids, self.config, self.seed, self.matcher, self.latent = ids, config, seed, matcher, latent
        self.reused_tokens = 0
        self.window: WindowSession | None = None
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._prefix_tokens, self._learned_tokens, self._dropped_tokens = prefix_tokens, learned_tokens, dropped_tokens
        self._load_seconds = load_seconds
        rows = range(config.num_return_sequences)
        use = config.constraint if isinstance(config.constraint, ToolUse) else None
        special = {} if use is None else tokenizer.special_tokens
        # Those around calls are read as text.
        kept = {} if use is None else {token: i for token, i in special.items() if token in "".join(use.syntax.parts)}
        self._textless = frozenset(special.values()).difference(kept.values())
        self._decoder = tokenizer.stream(ids, skip_special_tokens=True, kept=kept)
        self._decoder.leave_out(healed_characters)
        self._texts = [self._new_text() for _ in rows]
        self._calls = [] if use is None else [CallReader(use) for _ in rows]
        # Log-probabilities of the tokens whose text is not whole yet, by row.
        self._logprobs: list[deque[TokenLogprobs]] = [deque() for _ in rows]
        self._open_rows = len(rows)
        self.begin()

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, without a prefix and without dropped tokens."""
        return len(self.ids) - self._prefix_tokens

    def begin(self) -> None:
        """Start the clock. Call it when decoding starts."""
        self.meter = Meter(searching=self.config.num_beams > 1)

    def push(self, row: int, step: Step) -> Chunk | None:
        """Take the next step of `row`; returns the text that it completes, if any.

        A row's last chunk has a finish reason: feed no more steps of that row. The chunk that ends the last row has the
        statistics.
        """
        self.meter.count(row, step)
        text, logprobs = self._texts[row], self._logprobs[row]
        named = None if step.logprobs is None else text_scores.named_with_alternatives(self._tokenizer, step.logprobs)
        if named is not None and step.token_id is not None:
            logprobs.append(named)
        piece = text.finish() if step.token_id is None else text.push(step.token_id)
        reason: TextEnd | None = "stop" if text.stopped else step.finish_reason
        end_logprobs = named if reason == "eos" else None
        calls: tuple[ToolCall, ...] = ()
        if self._calls:
            reader = self._calls[row]
            if step.token_id in self._textless:
                reader.gap()
            piece, calls = reader.push(piece) if reason is None else reader.finish(piece)
            if reader.made_calls and reason in ("eos", "stop"):
                reason = "tool_calls"
        ready = None if self.config.logprobs is None else tuple(logprobs.popleft() for _ in piece.token_ids)
        if reason is not None:
            self._open_rows -= 1
        elif not piece.text and not calls:
            return None
        stats = None if self._open_rows else self._stats()
        return Chunk(piece.text, piece.token_ids, row, reason, stats, ready, end_logprobs, calls)

    def completion(self, chunks: Iterable[Chunk]) -> Completion:
        """Join all chunks of this run."""
        prompt = self._prompt
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
        return Completion.of_chunks(text, chunks, self.seed if self.config.do_sample else None)

    def ends_text(self, new_ids: Sequence[int]) -> bool:
        """Whether `new_ids` complete a stop string: beam search asks this for each beam."""
        text = self._new_text()
        for token in new_ids:
            text.push(token)
        return text.stopped

    def _stats(self) -> Stats:
        meter, window = self.meter, self.window
        prefill_seconds, decode_seconds, tokens_per_second = meter.rates()
        return Stats(
            prompt_tokens=self.prompt_tokens,
            prefill_seconds=prefill_seconds,
            new_tokens=meter.new_tokens,
            decode_seconds=decode_seconds,
            tokens_per_second=tokens_per_second,
            load_seconds=self._load_seconds,
            peak_rss_bytes=peak_rss_bytes(),
            dropped_tokens=self._dropped_tokens,
            reencoded_tokens=0 if window is None else window.reencoded_tokens,
            reencode_seconds=0.0 if window is None else window.reencode_seconds,
            reused_tokens=max(0, self.reused_tokens - self._prefix_tokens),
            drafted_tokens=meter.drafted_tokens,
            accepted_tokens=meter.accepted_tokens,
            prefix_tokens=self._prefix_tokens + self._learned_tokens,
        )

    def _new_text(self) -> TextStream:
        """A stream of the text that follows the prompt: `decode(ids + new)[len(decode(prompt's ids)):]`."""
        return TextStream(self._decoder.copy(), self.config.stop_strings)
