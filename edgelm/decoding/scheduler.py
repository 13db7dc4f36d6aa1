"""Continuous batching: texts come, decode side by side, and leave when they are finished. No text, threads or clock.

Source: iteration-level scheduling (Yu et al., "Orca", OSDI 2022).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from edgelm.decoding.constraint import TokenMatcher
from edgelm.decoding.draft_model import DraftModel, ModelDrafts
from edgelm.decoding.drafts import checked_draft
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.request import DecodingRow, Request, Step, fitted
from edgelm.engine.batch import IDLE_TOKEN
from edgelm.engine.session import Session
from edgelm.errors import ClosedError, ConfigError, EdgelmError, pass_interrupts_on, shown
from edgelm.ids import (
    LEAST_TOKENS,
    PREFILL_CHUNK_TOKENS,
    IdArray,
    Logits,
    TokenIds,
    as_ids,
    prompt_chunks,
    shared_tokens,
)
from edgelm.reuse.state import PromptState, most_shared

DEFAULT_MAX_ROWS = 8
SHORT_PROMPT_TOKENS = 64
"""The longest prompt, in tokens, that may be computed together with other prompts."""
_TOKEN_COST = 0.1
"""What a further token of a prompt costs, in calls of one token (docs/decisions.md)."""

Handle = int
"""The number of a submitted text, unique in its scheduler."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A result of a step for one text: a new token or, as its last turn, a reason to end or an error."""

    handle: Handle
    step: Step | None
    error: Exception | None = None
    reused_tokens: int = 0
    """With a text's first token: number of prompt tokens that a saved state or an earlier text had computed."""


class DraftModels(Protocol):
    """Lends each text a small model that drafts; `edgelm.generation.text_generation.DraftSessions` does."""

    def borrowed(self) -> AbstractContextManager[DraftModel]:
        """Lend a small model that follows no text."""


@dataclass
class _Drafting:
    """The drafts of one text, and the small model that it was lent."""

    drafts: ModelDrafts
    lent: ExitStack


@dataclass(frozen=True, slots=True)
class _Waiting:
    handle: Handle
    text: DecodingRow
    prompt: IdArray
    key: str


class PromptSessions(Protocol):
    """Lends the session that computes a prompt; `edgelm.reuse.pool.SessionPool` does, and keeps prompts for later."""

    def borrowed(self, prompt: Sequence[int], *, key: str) -> AbstractContextManager[tuple[Session, int]]:
        """Lend a session that holds the first n tokens of `prompt`, and n. Prompts of different keys share nothing."""


class _OneSession:
    """One session for all prompts. It remembers the last one."""

    def __init__(self, session: Session, states: Sequence[PromptState]) -> None:
        session.reset()
        self._session, self._states = session, states
        self._held: TokenIds = ()  # the prompt whose first tokens the session holds
        self._key = ""

    @contextmanager
    def borrowed(self, prompt: Sequence[int], *, key: str) -> Iterator[tuple[Session, int]]:
        session = self._session
        kept = shared_tokens(self._held[: session.position], prompt) if key == self._key else 0
        content, stored = most_shared(self._states, prompt)
        if content is not None and stored > kept:
            session.restore(content)
            kept = stored
        else:
            session.rewind(session.position - kept)
        self._held, self._key = prompt, key
        yield session, kept


class Scheduler:
    """Decodes up to `max_rows` texts at a time; further texts wait in the order in which they came.

    A prompt is computed alone, or in one call with other short prompts that wait, which gives each the same bits. It
    then joins the batch, whose steps compute an even number of rows. So a text's ids are the same, bit for bit,
    whatever texts are submitted before, beside or after it. Between two steps of the batch, about PREFILL_CHUNK_TOKENS
    tokens of prompts are computed at most. A scheduler must not be used by several threads at the same time.

    With `draft_models`, a small model guesses tokens for a text that decodes alone, and one call checks several tokens.
    Such a call computes other last bits than a step does (docs/quality.md), so with quantized weights a text may go on
    in another way beside others where two tokens are nearly tied. Texts side by side take no drafts, which gain nothing
    where texts share their steps (docs/batches.md).

    `session`, which is emptied first, computes the prompts. Prompts that begin like one of the saved `states` continue
    from it. With `sessions` given, these compute the prompts instead. Raises ConfigError if `max_rows` is out of range.
    """

    def __init__(
        self,
        session: Session,
        *,
        max_rows: int = DEFAULT_MAX_ROWS,
        states: Sequence[PromptState] = (),
        sessions: PromptSessions | None = None,
        draft_models: DraftModels | None = None,
    ) -> None:
        check_max_rows(max_rows)
        self._model = session
        self._max_rows = max_rows
        self._sessions = _OneSession(session, states) if sessions is None else sessions
        self._lent = ExitStack()  # the session of the first waiting prompt
        self._session = session  # that session, once it is lent
        # On a card, every call computes all rows of the cache, so it cannot compute several tokens of some rows.
        self._some_rows = session.device.kind == "cpu"
        self._draft_models = draft_models if self._some_rows else None
        self._drafting: dict[Handle, _Drafting] = {}
        self._batch = session.empty_batch(max_rows)
        self._waiting: deque[_Waiting] = deque()
        self._pieces: deque[IdArray] = deque()  # the part of the first waiting prompt that is left to compute
        self._reused = 0  # number of tokens of that prompt that were not computed again
        self._turns: list[Turn] = []  # of an unfinished step, because an error must not lose them
        self._stepping = False
        self._interrupted = False
        self._cancelled: list[Handle] = []  # during a step, by signals and processors
        self._rows: dict[Handle, int] = {}
        self._texts: dict[Handle, DecodingRow] = {}
        self._handles = 0

    @property
    def pending(self) -> int:
        """Number of texts that wait, decode or have a turn to come; 0 when there is nothing to do."""
        return len(self._waiting) + len(self._texts.keys() | {turn.handle for turn in self._turns})

    @property
    def free_rows(self) -> int:
        """How many further texts would find a row, beside those that wait."""
        return max(0, self._max_rows - len(self._texts) - len(self._waiting))

    @property
    def first_waiting(self) -> Handle | None:
        """The text whose prompt is computed next, or is being computed."""
        return self._waiting[0].handle if self._waiting else None

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the prompts that wait or are being computed."""
        return sum(len(waiting.prompt) for waiting in self._waiting)

    def submit(self, prompt_ids: Sequence[int], config: GenerationConfig, seed: int, *, row: int = 0) -> Handle:
        """Queue a text, row `row` of a prompt's `num_return_sequences`; the following steps return its turns.

        Each row of a `seed` has random numbers of its own. Raises as `request`.
        """
        return self.add(self.request(prompt_ids, config, seed), row=row)

    def request(
        self,
        prompt_ids: Sequence[int],
        config: GenerationConfig,
        seed: int,
        *,
        matcher: TokenMatcher | None = None,
    ) -> Request:
        """Check a prompt and its options, for `add`. Any thread may call this, also during a step.

        `matcher` says what the text must obey.

        Raises:
            PromptError: there are no ids, or an id is not in the vocabulary.
            ContextError: the prompt is longer than the context.
            ConfigError: an option cannot be used with this model, or not in a batch.
        """
        config.check_batch()
        ids = as_ids(prompt_ids, self._model.vocab_size).tolist()
        kept, config = fitted(ids, config, self._model.context_length)
        return Request.of(self._model, kept, config, seed, matcher=matcher)

    def add(self, request: Request, *, row: int = 0, key: str = "") -> Handle:
        """Queue row `row` of a request that this scheduler checked; see `submit`.

        Its prompt continues from earlier prompts of the same `key` only, or from the saved states.
        """
        self._handles += 1
        self._waiting.append(_Waiting(self._handles, DecodingRow(request, row), request.prompt, key))
        return self._handles

    def cancel(self, handle: Handle) -> None:
        """Forget a text, which then has no more turns; nothing happens if it is finished already.

        Signals and processors may call this in the middle of a step.
        """
        if self._stepping:
            self._cancelled.append(handle)
        else:
            self._forget(handle)

    def _forget(self, handle: Handle) -> None:
        if self._waiting and self._waiting[0].handle == handle:
            self._next_waits()
        self._waiting = deque(waiting for waiting in self._waiting if waiting.handle != handle)
        self._turns = [turn for turn in self._turns if turn.handle != handle]
        self._leave(handle)

    def step(self) -> list[Turn]:
        """Compute some tokens of waiting prompts, then a new token of every text that decodes, or several with drafts.

        An error in one text is that text's last turn. If the step itself fails (ClosedError, ForkError,
        InsufficientMemoryError), nothing is lost: the next step continues where this one stopped. After an exception of
        a signal handler, texts may lack a token: every further step is refused with ClosedError.
        """
        if self._interrupted:
            raise ClosedError("this scheduler was interrupted in the middle of a step: make a new one")
        self._stepping = True
        try:
            self._admit()
            self._decode()
        except EdgelmError:
            raise
        except BaseException:
            self._interrupted = True
            raise
        finally:
            self._stepping = False
            while self._cancelled:
                self._forget(self._cancelled.pop())
        turns, self._turns = self._turns, []
        return turns

    def _admit(self) -> None:
        left = PREFILL_CHUNK_TOKENS
        while left > 0 and self._waiting and not self._batch.is_full:
            first = self._waiting[0]
            ending = _ending(first.handle, first.text)
            if ending is not None:
                self._next_waits()
                self._turns.append(ending)
                continue
            if not self._pieces:
                if computed := self._admit_together():
                    left -= computed
                    continue
                self._begin(first)
            piece = self._pieces[0]
            logits = self._session.step(piece, as_in_batch=True)
            self._pieces.popleft()
            left -= len(piece)
            if self._pieces:
                continue
            self._rows[first.handle] = self._session.copy_into(self._batch)
            self._texts[first.handle] = first.text
            self._next_waits()
            self._choose(first.handle, logits[None], reused_tokens=self._reused)

    def _admit_together(self) -> int:
        """Compute several short prompts that wait in one call, if that is faster; returns the number of tokens."""
        if not self._some_rows:
            return 0
        candidates = list(self._waiting)[: self._batch.rows_behind]
        group = _worth_computing_together(candidates, self._model.piece_tokens)
        if len(group) < 2:
            return 0
        rows, reused, ids = list[int](), list[int](), list[IdArray]()
        try:
            for waiting in group:
                with self._sessions.borrowed(waiting.prompt.tolist(), key=waiting.key) as (session, kept):
                    rows.append(session.copy_behind(self._batch))
                reused.append(kept)
                ids.append(waiting.prompt[kept:])
            logits = self._batch.prefill(rows[0], ids)
        except EdgelmError:  # alone, a prompt fails with its own error
            for row in reversed(rows):
                self._batch.leave(row)
            return 0
        for waiting, row in zip(group, rows, strict=True):
            self._waiting.popleft()
            self._rows[waiting.handle], self._texts[waiting.handle] = row, waiting.text
        for waiting, of_row, kept in zip(group, logits, reused, strict=True):
            self._choose(waiting.handle, of_row[None], reused_tokens=kept)
        return sum(map(len, ids))

    def _decode(self) -> None:
        for handle, text in list(self._texts.items()):
            ending = _ending(handle, text)
            if ending is not None:
                self._leave(handle)
                self._turns.append(ending)
        if not self._texts:
            return
        if not self._waiting:
            self._close_gaps()
        if len(self._texts) == 1 and self._draft_models is not None:
            ((handle, text),) = self._texts.items()
            self._decode_with_drafts(handle, text, self._draft_models)
            return
        ids = [IDLE_TOKEN] * (max(self._rows.values()) + 1)
        for handle, text in self._texts.items():
            ids[self._rows[handle]] = int(text.ids[-1])
        logits = self._batch.step(ids)
        for handle in list(self._texts):
            self._choose(handle, logits[self._rows[handle], None])

    def _decode_with_drafts(self, handle: Handle, text: DecodingRow, draft_models: DraftModels) -> None:
        """Decode the only text of the batch."""
        self._close_gaps()  # several tokens of a text are computed in the first row
        try:
            if handle not in self._drafting:
                lent = ExitStack()
                small = lent.enter_context(draft_models.borrowed())
                self._drafting[handle] = _Drafting(ModelDrafts(small, text.guess, self._model.draft_cost), lent)
            drafts = self._drafting[handle].drafts
            draft = drafts.draft(text.ids, min(text.tokens_left, self._batch.room) - 1)
        except EdgelmError as error:
            self._turns.append(Turn(handle, None, error))
            self._leave(handle)
            return
        last = int(text.ids[-1])
        logits = self._batch.step_all([last, *draft]) if draft else self._batch.step([last])
        chosen = self._choose(handle, logits, draft)
        if chosen:
            drafts.learn(chosen)

    def _choose(
        self, handle: Handle, logits: Logits, draft: Sequence[int] = (), *, reused_tokens: int = 0
    ) -> list[int]:
        """Choose a text's next tokens, given the logits (T, V) after its last token and after those of its draft.

        Returns the tokens. Whatever a caller's logits_processor raises ends its own text only.
        """
        chosen, ended = list[int](), False
        try:
            for step in checked_draft(self._texts[handle], logits, draft):
                self._turns.append(Turn(handle, step, reused_tokens=reused_tokens))
                if step.token_id is None:
                    ended = True
                else:
                    chosen.append(step.token_id)
        except Exception as error:
            pass_interrupts_on(error)
            self._turns.append(Turn(handle, None, error))
            ended = True
        if ended:
            self._leave(handle)
        else:
            self._batch.rewind(self._rows[handle], len(logits) - len(chosen))
        return chosen

    def _begin(self, first: _Waiting) -> None:
        """Take a session that holds the longest computed beginning of the prompt, and queue the rest in pieces."""
        lent = self._sessions.borrowed(first.prompt.tolist(), key=first.key)
        self._session, self._reused = self._lent.enter_context(lent)
        self._pieces.extend(prompt_chunks(first.prompt[self._reused :]))

    def _next_waits(self) -> None:
        self._waiting.popleft()
        self._pieces.clear()
        self._lent.close()

    def _leave(self, handle: Handle) -> None:
        if handle in self._rows:
            self._batch.leave(self._rows.pop(handle))
            del self._texts[handle]
        if handle in self._drafting:
            self._drafting.pop(handle).lent.close()

    def _close_gaps(self) -> None:
        while (moved := self._batch.moved_down()) is not None:
            old, new = moved
            self._rows = {handle: new if row == old else row for handle, row in self._rows.items()}


def _worth_computing_together(waiting: Sequence[_Waiting], most_tokens: int) -> list[_Waiting]:
    """The first of these texts whose prompts are computed faster by one call than by a call for each.

    The call computes up to `most_tokens` tokens. All its rows are as long as the longest prompt, and what prompts of
    one key have in common at their beginning is computed for each.
    """
    group: list[_Waiting] = []
    alone = longest = 0  # tokens that calls for each would compute, and those of the longest prompt
    saved = -1.0  # calls of one token
    for text in waiting:
        length = len(text.prompt)
        if not LEAST_TOKENS <= length <= SHORT_PROMPT_TOKENS or _ending(text.handle, text.text) is not None:
            break
        alone += length - (shared_tokens(group[-1].prompt, text.prompt) if group and group[-1].key == text.key else 0)
        longest = max(longest, length)
        computed = longest * (len(group) + 1)
        saved_now = len(group) - _TOKEN_COST * (computed - alone)
        if computed > most_tokens or saved_now <= saved:
            break
        group.append(text)
        saved = saved_now
    return group


def check_max_rows(max_rows: object) -> None:
    """Raise ConfigError if `max_rows` is out of range."""
    if isinstance(max_rows, bool) or not (isinstance(max_rows, int) and 1 <= max_rows <= 1024):
        raise ConfigError(f"max_rows must be a whole number from 1 to 1024, got {shown(max_rows)}")


def _ending(handle: Handle, text: DecodingRow) -> Turn | None:
    """The last turn of a text that ends before its next token; an error that a caller's `cancel` raises ends it too."""
    try:
        reason = text.reason_to_end()
    except Exception as error:
        pass_interrupts_on(error)
        return Turn(handle, None, error)
    return None if reason is None else Turn(handle, Step(None, reason))
