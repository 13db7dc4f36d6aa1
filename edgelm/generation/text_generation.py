"""Generation with text on both ends: prompts become runs, and runs are decoded one by one or side by side."""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from edgelm.decoding.constraint import TokenMatcher
from edgelm.decoding.draft_model import DraftModel
from edgelm.decoding.generation_config import GenerationConfig, GenerationOptions
from edgelm.decoding.loop import generate
from edgelm.decoding.request import behind_prefix, fitted
from edgelm.decoding.scheduler import Scheduler, check_max_rows
from edgelm.decoding.window import WindowSession
from edgelm.engine.call import step_cost
from edgelm.engine.session import Session
from edgelm.errors import ConfigError, ContextError, PromptError
from edgelm.generation.latent_prefix import LatentPrefix, LatentSessions
from edgelm.generation.results import Chunk, Completion
from edgelm.generation.run import TextRun
from edgelm.generation.runs_together import RunsTogether
from edgelm.reuse.pool import SessionPool
from edgelm.reuse.prefix import PromptEncoder
from edgelm.text.prompts import Prompt
from edgelm.text.token_healing import HealedPrompt, TokenHealer
from edgelm.text.token_matcher import ConstraintReader

Item = TypeVar("Item")


class TextGeneration:
    """Runs prompts in sessions of a pool. Several threads may call it at the same time."""

    def __init__(
        self,
        encoder: PromptEncoder,
        sessions: SessionPool,
        context_length: int,
        load_seconds: float,
        draft_sessions: SessionPool | None = None,
    ) -> None:
        """Join the parts of a model; `draft_sessions` are those of the model that drafts, if there is one."""
        self._encoder, self._sessions, self._load_seconds = encoder, sessions, load_seconds
        self._draft_sessions = draft_sessions
        self._context_length = context_length  # in tokens, behind a learned prefix
        self._constraints = ConstraintReader(encoder.tokenizer)
        self._healer: TokenHealer | None = None
        self._breaker_ids: dict[tuple[str | int, ...], tuple[int, ...]] = {}

    def run(self, prompt: Prompt, config: GenerationConfig, latent: LatentPrefix | None = None) -> TextRun:
        """Check a prompt, which may stand behind a `latent` vector, and fit it into the context.

        Raises:
            PromptError: the prompt is empty, is neither text nor token ids, has an unknown token id, or cannot be
                decoded; or it is token ids, and `token_healing` is on.
            ContextError: the prompt does not fit behind the prefix.
            ConfigError: `pinned_tokens` is more than half the context, `max_length` leaves no room, the constraint
                cannot be read or met, or `token_healing` does not know this kind of tokenizer.
        """
        if config.dry_multiplier and any(isinstance(breaker, str) for breaker in config.dry_sequence_breakers):
            config = config.updated({"dry_sequence_breakers": self._breakers(config.dry_sequence_breakers)})
        seed = secrets.randbits(63) if config.seed is None else config.seed
        if latent is None:
            ids = self._encoder.ids_to_continue(prompt)
            learned_tokens, context_length = self._encoder.learned_tokens, self._context_length
        else:
            ids = latent.ids(self._encoder.tokenizer, prompt)
            learned_tokens, context_length = latent.tokens, self._context_length - latent.tokens
        healed = self._healed(prompt, ids, latent) if config.token_healing else HealedPrompt(ids, None, 0)
        ids = healed.ids
        prefix_tokens = 0 if latent is not None else self._encoder.prefix_tokens(ids)
        prefix, own, room = ids[:prefix_tokens], ids[prefix_tokens:], context_length - prefix_tokens
        kept, config = fitted(own, config, room)
        if prefix_tokens + learned_tokens and len(kept) > room:
            raise ContextError(
                f"the prompt has {len(kept)} tokens, but behind its prefix of {prefix_tokens + learned_tokens} this "
                f"model's context holds {room}: shorten the prompt, or give "
                "context_overflow='truncate' or context_overflow='window'"
            )
        if prefix_tokens:
            config.new_token_limit(len(kept))  # refuses a max_length by the prompt's own length
        if prefix_tokens or config.context_overflow == "truncate":
            config = behind_prefix(config, prefix_tokens)  # nothing is left to cut
        matcher = healed.matcher or self._matcher(config, prefix_tokens + len(kept), context_length)
        return TextRun(
            self._encoder.tokenizer,
            prompt,
            prefix + kept,
            config,
            seed,
            matcher=matcher,
            prefix_tokens=prefix_tokens,
            learned_tokens=learned_tokens,
            dropped_tokens=len(own) - len(kept),
            healed_characters=healed.characters,
            load_seconds=self._load_seconds,
            latent=latent,
        )

    def stream(self, run: TextRun) -> Iterator[Chunk]:
        """Decode the rows of `run` one after another; yields their chunks. Raises as `Model.generate`."""
        run.begin()
        config, windowed = run.config, run.config.context_overflow == "window"
        # A window forgets its prompt. Contrastive search needs the hidden states of the whole text, which are not kept.
        known = () if config.penalty_alpha is not None or run.latent is not None else run.ids
        with ExitStack() as lent:
            session, reused = lent.enter_context(self._sessions.borrowed(known, keep=not windowed))
            if run.latent is not None:
                session.begin_after(run.latent.content)
            run.reused_tokens = reused
            run.window = WindowSession(session, config.pinned_tokens, run.ids[:reused]) if windowed else None
            decoder, asks = run.window or session, config.stop_strings and config.num_beams > 1
            rows = generate(
                decoder,
                run.ids,
                config,
                run.seed,
                reused=reused,
                ends_text=run.ends_text if asks else None,
                matcher=run.matcher,
                draft_model=self._draft_model(run, session, lent),
            )
            for row, steps in enumerate(rows):
                if config.num_beams > 1:
                    run.meter.search_begins()
                for step in run.meter.timed(steps):
                    chunk = run.push(row, step)
                    if chunk is not None:
                        yield chunk
                        if chunk.finish_reason is not None:
                            break

    def _draft_model(self, run: TextRun, session: Session, lent: ExitStack) -> DraftModel | None:
        """The model that drafts for `run` in `session`, where there is one that can; `lent` gets its session."""
        models, config = self.draft_models(session), run.config
        methods = (config.num_beams > 1, config.penalty_alpha, config.prompt_lookup_num_tokens, run.window, run.latent)
        if models is None or any(method not in (None, False) for method in methods):
            return None
        return lent.enter_context(models.borrowed())

    def draft_models(self, session: Session) -> "DraftSessions | None":
        """The small models that draft for texts in `session`, where there are any."""
        if self._draft_sessions is None or session.batch_invariant:
            return None
        return DraftSessions(self._draft_sessions, session)

    def batch(
        self,
        prompts: Sequence[Prompt],
        common: GenerationConfig,
        each: Sequence[GenerationOptions] | None,
        max_rows: int,
        latents: Sequence[LatentPrefix] | None = None,
    ) -> list[Completion]:
        """Decode all prompts side by side, as `Model.generate_batch`, with the options `common` to all prompts.

        `latents` are what stands before each prompt, one for each.
        """
        check_max_rows(max_rows)
        if isinstance(prompts, str):
            raise PromptError("prompts must be a list, got one text: call generate for it")
        prompts = _listed(prompts, "prompts must be a list of texts or of token ids")
        own = [GenerationOptions()] * len(prompts)
        if each is not None:
            own = _listed(each, "each must be a list of options")
        if not all(isinstance(options, Mapping) for options in own):
            raise ConfigError("each must hold the options of every prompt as a dict")
        if len(own) != len(prompts):
            raise PromptError(f"each must hold options for every prompt: {len(prompts)} of them, got {len(own)}")
        before = [None] * len(prompts) if latents is None else latents
        configs = [common.updated(dict(options)) for options in own]
        runs = [self.run(*of_prompt) for of_prompt in zip(prompts, configs, before, strict=True)]
        rows = sum(run.config.num_return_sequences for run in runs)
        with self._sessions.borrowed() as (session, _):
            max_rows = min(max_rows, max(1, rows))
            if latents:
                session.begin_after(latents[0].content)  # all vectors take as many tokens of the context
                keyed = {str(place): latent for place, latent in enumerate(latents)}
                scheduler = Scheduler(session, max_rows=max_rows, sessions=LatentSessions(session, keyed))
            else:
                scheduler = Scheduler(session, max_rows=max_rows, states=self._sessions.states)
            chunks = _decode_together(RunsTogether(scheduler), runs)
        return [run.completion(of_run) for run, of_run in zip(runs, chunks, strict=True)]

    def _healed(self, prompt: Prompt, ids: list[int], latent: LatentPrefix | None) -> HealedPrompt:
        """A prompt, encoded as `ids`, without the end that token healing takes back."""
        if not isinstance(prompt, str):
            raise PromptError(
                "token_healing needs the prompt as a text, because token ids stay as they are: give the text, or drop "
                "token_healing"
            )
        if self._healer is None:
            self._healer = TokenHealer(self._encoder.tokenizer)
        if latent is not None:
            return self._healer.heal(ids, 1, [latent.begin_token_id])  # the token before every text stays
        try:
            empty = self._encoder.ids_to_continue("")
        except PromptError:  # the model cannot begin with nothing
            empty = []
        return self._healer.heal(ids, self._encoder.prefix_tokens(ids), empty)

    def _matcher(self, config: GenerationConfig, prompt_tokens: int, context_length: int) -> TokenMatcher | None:
        """What the text must obey. Raises ConfigError if it needs more tokens than may follow the prompt."""
        if config.constraint is None:
            return None
        constraint = self._constraints.read(config.constraint, config.eos_token_id)
        limit, room = config.new_token_limit(prompt_tokens), context_length + 1 - prompt_tokens
        least = constraint.least_tokens(min(limit, room))
        if least > limit:
            raise ConfigError(
                f"the constraint needs at least {least} tokens, but max_new_tokens or max_length allows {limit}: "
                "raise it"
            )
        if config.context_overflow != "window" and 0 < room < least:  # a prompt without room is refused as such
            raise ConfigError(
                f"the constraint needs at least {least} tokens, but the context has room for {room}: shorten the prompt"
            )
        return constraint.matcher

    def _breakers(self, breakers: tuple[str | int, ...]) -> tuple[int, ...]:
        """The token ids at which DRY ends a repetition: the given ids, and every token that holds a given text."""
        if breakers not in self._breaker_ids:
            texts = [breaker for breaker in breakers if isinstance(breaker, str)]
            ids = {breaker for breaker in breakers if isinstance(breaker, int)}
            tokenizer = self._encoder.tokenizer
            token_texts = (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))
            ids.update(token for token, text in enumerate(token_texts) if any(breaker in text for breaker in texts))
            self._breaker_ids[breakers] = tuple(sorted(ids))
        return self._breaker_ids[breakers]


class DraftSessions:
    """Sessions of a small model, lent to the texts that it drafts for."""

    def __init__(self, pool: SessionPool, target: Session) -> None:
        """Lend sessions of `pool` to texts that `target` and its siblings decode."""
        self._pool, self._target = pool, target

    @contextmanager
    def borrowed(self) -> Iterator[DraftModel]:
        """Lend a small model that follows no text. Raises as `SessionPool.borrowed`."""
        target = self._target
        with self._pool.borrowed() as (small, _):
            yield DraftModel(small, step_cost(small.bundle.manifest, target.bundle.manifest), target.vocab_size)


def _decode_together(together: RunsTogether, runs: Sequence[TextRun]) -> list[list[Chunk]]:
    """Decode all rows of all `runs` to their ends; returns the chunks of each run.

    Raises the errors of `Scheduler.request` before anything is computed, those of `Scheduler.step`, and any exception
    of the first text that fails.
    """
    for place, run in enumerate(runs):
        run.begin()
        for row, request in enumerate(together.requests(run)):
            together.add(run, row, request, key=str(place) if run.latent is not None else "")
    chunks: dict[TextRun, list[Chunk]] = {run: [] for run in runs}
    while together.scheduler.pending:
        for run, result in together.step():
            if isinstance(result, Exception):
                raise result
            chunks[run].append(result)
    return list(chunks.values())


def _listed(values: Iterable[Item], expected: str) -> list[Item]:
    try:
        return list(values)
    except TypeError:
        raise PromptError(f"{expected}, got {type(values).__name__}") from None
