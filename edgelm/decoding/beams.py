"""Beam search, beam sampling and group beam search over one prompt.

The first two work as transformers 4.57's `_beam_search`, groups as `_group_beam_search` of transformers 4.56.2. All
beams are rows of one batch, which is computed a step at a time.

Shapes: B beams, G beams of a group, K candidates of a step, T tokens so far, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from edgelm.decoding.constraint import BeamConstraints
from edgelm.decoding.generation_config import LogitsProcessor
from edgelm.decoding.logits_processors import MASKED, process, processors_of
from edgelm.decoding.logprobs import log_softmax
from edgelm.decoding.request import DecodingBatch, DecodingSession, FinishReason, Request
from edgelm.decoding.sampling import beam_uniforms, candidates, draw_without_replacement, filters_of, largest
from edgelm.errors import ConfigError
from edgelm.ids import IdArray, Indices, Logits

NEVER = np.float32(-1e9)
"""Score of a beam that must not win; finite, so that the beam goes on if no other beam can."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished text and its rank."""

    rank: float
    """Log-probability / length ** length_penalty."""
    tokens: list[int]
    """The new part, without an end-of-text token."""
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Candidates:
    """Continuations by one token, the best first."""

    beams: Indices
    """The beam that each one continues, (K,)."""
    tokens: Indices
    """(K,)"""
    scores: Logits
    """Log-probabilities of the whole texts, (K,)."""

    def at(self, indices: Indices) -> "Candidates":
        """The candidates at these indices."""
        return Candidates(self.beams[indices], self.tokens[indices], self.scores[indices])


def beam_search(session: DecodingSession, request: Request, logits: Logits) -> Iterator[Hypothesis]:
    """The best `num_return_sequences` continuations, the best first, given the `logits` (V,) after the prompt.

    `session` holds the prompt. The configuration has more than one beam, in one group. Raises ConfigError if fewer
    continuations exist under these options, and DeviceError if the model computes NaN.
    """
    config, prompt_tokens = request.config, len(request.prompt)
    beams = config.num_beams
    text, scores = request.text_buffer(beams), _first_scores(beams)
    finished: list[Hypothesis] = []
    logits = np.broadcast_to(logits, (beams, request.vocab_size))
    batch = _batch(session, request)
    constraints = None if request.matcher is None else BeamConstraints(request.matcher, config)
    whole_first = constraints is not None and not config.token_healing
    if constraints is not None and constraints.of([]) is None:
        yield from [Hypothesis(0.0, [], "stop")] * config.num_return_sequences
        return
    for count in range(request.new_token_limit):
        end = prompt_tokens + count
        next_tokens = _continuations(request, constraints, text[:, :end], logits, scores, count)
        reasons = _reasons(request, constraints, text[:, prompt_tokens:end], next_tokens, count)
        ended = np.array([reason is not None for reason in reasons])
        full = len(finished) == beams and config.early_stopping is True
        for index in np.flatnonzero(ended[:beams] & np.isfinite(next_tokens.scores[:beams])):
            reason = reasons[index]
            if reason is None or full:
                continue
            new = text[next_tokens.beams[index], prompt_tokens:end].tolist()
            new += [] if reason == "eos" else [int(next_tokens.tokens[index])]
            rank = next_tokens.scores[index] / np.float32(float(count + 1) ** config.length_penalty)
            finished.append(Hypothesis(float(rank), new, reason))
        finished = sorted(finished, key=partial(_place, whole_first=whole_first))[:beams]
        running = np.where(ended, next_tokens.scores + NEVER, next_tokens.scores)
        order = np.argsort(-running, kind="stable")[:beams]
        going, scores = next_tokens.at(order), running[order]
        if ended.all() or _is_over(request, finished, scores, count + 1):
            break
        text = text[going.beams]
        text[:, end] = going.tokens
        assert batch is not None
        if count:  # at first all rows are equal
            batch.reorder(going.beams)
        logits = batch.step(text[:, end])
    yield from _best_of(request, finished)


def _place(text: Hypothesis, whole_first: bool) -> tuple[bool, float]:
    """Sorts finished texts, the best first; with `whole_first`, those that were cut off come last."""
    return whole_first and text.reason not in ("eos", "stop"), -text.rank


def _first_scores(beams: int) -> Logits:
    """Scores (B,) before the first step: all beams are equal then, so only the first may have offspring."""
    scores = np.full(beams, NEVER)
    scores[0] = 0
    return scores


def _batch(session: DecodingSession, request: Request) -> DecodingBatch | None:
    """The rows of all beams; None if there is nothing to feed, because the last new token never is."""
    if request.new_token_limit <= 1:
        return None
    return session.batch(request.config.num_beams, len(request.prompt) + request.new_token_limit - 1)


def _candidates_per_beam(request: Request) -> int:
    """Candidates for each beam: each end-of-text token may take the place of one, and one must be left to continue."""
    return max(2, 1 + len(request.config.eos_token_id))


def _best_of(request: Request, texts: list[Hypothesis]) -> list[Hypothesis]:
    """The first `num_return_sequences` of a search's `texts`; raises ConfigError if there are fewer."""
    requested = request.config.num_return_sequences
    if request.new_token_limit == 0:
        return [Hypothesis(0.0, [], request.limit_reason)] * requested
    if len(texts) < requested:
        raise ConfigError(
            f"only {len(texts)} of num_return_sequences={requested} continuations exist under these options: "
            "lower it, or allow more tokens"
        )
    return texts[:requested]


def _divisor_of_best(request: Request, length: int) -> float:
    """The divisor of a running beam's score that gives the best rank it may reach, given its `length` so far."""
    config = request.config
    if config.early_stopping == "never" and config.length_penalty > 0:
        length = config.new_token_limit(len(request.prompt))
    divisor: float = float(length) ** config.length_penalty
    return divisor


def _continuations(
    request: Request,
    constraints: BeamConstraints | None,
    texts: IdArray,
    logits: Logits,
    scores: Logits,
    count: int,
) -> Candidates:
    """The best continuations of `texts` (B, T) by one token, or drawn ones, given logits (B, V) and scores (B,)."""
    config = request.config
    requested = _candidates_per_beam(request) * config.num_beams
    filters = filters_of(config, at_least=1 + max(1, len(config.eos_token_id))) if config.do_sample else ()
    temperature = config.temperature if config.do_sample else 1.0
    parts = []
    if constraints is not None:
        constraints.forget_shorter(count)
    for beam, score in enumerate(scores):
        if count == 0 and beam > 0 and not config.do_sample and request.vocab_size >= requested:
            break  # the offspring of these beams cannot be among the best
        row = log_softmax(logits[beam], np.float32)
        row = process(request.processors, texts[beam], row, may_rule_out_all=True)
        if constraints is not None:
            constraint = constraints.of(texts[beam, len(request.prompt) :].tolist())
            row = np.full_like(row, MASKED) if constraint is None else constraint.masked(row, may_rule_out_all=True)
        if np.isfinite(row.max()):
            kept, row = candidates(row, temperature, filters)
            tokens = np.arange(len(row)) if kept is None else kept
        else:  # no token may follow this beam
            tokens, row = np.zeros(1, np.intp), row[:1]
        if config.renormalize_logits and len(row) > 1:
            row = log_softmax(row, np.float32)
        row = row + score
        if not config.do_sample:
            best = largest(row, requested)
            tokens, row = tokens[best], row[best]
        parts.append((np.full(len(row), beam, np.intp), tokens, row))
    every = Candidates(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    if not np.isfinite(every.scores.max()):
        raise ConfigError(f"no beam can go on after {texts.shape[1]} tokens: the options rule out every token")
    if config.do_sample:
        uniforms = beam_uniforms(request.seed, count, len(scores) * request.vocab_size)
        drawn = uniforms[every.beams * request.vocab_size + every.tokens]
        return every.at(draw_without_replacement(every.scores, requested, drawn))
    return every.at(largest(every.scores, requested))


def _reasons(
    request: Request, constraints: BeamConstraints | None, new: IdArray, next_tokens: Candidates, count: int
) -> list[FinishReason | None]:
    """Why each candidate ends its text, None if it goes on; `new` holds the beams' new tokens so far, (B, T)."""
    late = request.limit_reason if count + 1 == request.new_token_limit else request.interruption
    reasons: list[FinishReason | None] = []
    for beam, token, score in zip(
        next_tokens.beams.tolist(), next_tokens.tokens.tolist(), next_tokens.scores.tolist(), strict=True
    ):
        if not math.isfinite(score):  # it is ruled out, and only fills a place
            reasons.append(late)
        elif token in request.config.eos_token_id:
            reasons.append("eos")
        else:
            ends = request.ends_text is not None and request.ends_text([*new[beam].tolist(), token])
            ends |= constraints is not None and constraints.is_finished(new[beam].tolist(), token)
            reasons.append("stop" if ends else late)
    return reasons


def _is_over(request: Request, finished: list[Hypothesis], scores: Logits, length: int) -> bool:
    """Whether the running beams' `scores`, the best first, can no longer improve the finished texts."""
    config = request.config
    if len(finished) < config.num_beams:
        return bool(scores[0] <= NEVER)
    best_rank = scores[0] / np.float32(_divisor_of_best(request, length))
    return config.early_stopping is True or bool(best_rank <= finished[-1].rank)


def group_beam_search(session: DecodingSession, request: Request, logits: Logits) -> Iterator[Hypothesis]:
    """As `beam_search`, with more than one group of beams; the texts are the best of all groups.

    Source: Vijayakumar et al., arXiv 1610.02424. Stop strings do not steer the search; the caller cuts the texts.
    Raises ConfigError if a group has too few continuations, and DeviceError if the model computes NaN.
    """
    config, prompt_tokens, beams = request.config, len(request.prompt), request.config.num_beams
    size = beams // config.num_beam_groups
    taken = np.zeros(request.vocab_size, np.float32)  # how often earlier groups chose each token in this step

    def avoid_taken(ids: IdArray, logits: Logits) -> Logits:
        return logits - np.float32(config.diversity_penalty) * taken

    processors = processors_of(config, prompt_tokens, request.vocab_size, after_biases=[avoid_taken])
    groups = [
        _Group(request, processors, request.text_buffer(size), _first_scores(size))
        for _ in range(config.num_beam_groups)
    ]
    logits = np.broadcast_to(logits, (beams, request.vocab_size))
    batch = _batch(session, request)
    end = prompt_tokens
    reason: FinishReason = request.limit_reason
    for count in range(request.new_token_limit):
        order: list[int] = []
        taken[:] = 0
        for index, group in enumerate(groups):
            first = index * size
            order += (first + group.advance(logits[first : first + size], count)).tolist()
            np.add.at(taken, group.text[:, end], 1)
        end += 1
        if all(group.done for group in groups) or count + 1 == request.new_token_limit:
            break
        if request.interruption is not None:
            reason = request.interruption
            break
        assert batch is not None
        if count:  # at first all rows are equal
            batch.reorder(order)
        logits = batch.step(np.concatenate([group.text[:, end - 1] for group in groups]))
    for group in groups:
        if not group.done and end > prompt_tokens:
            for beam, score in enumerate(group.scores):
                group.add(beam, end, float(score), reason)
    # Of equal ranks the last comes first, because transformers takes texts from the end of an ascending list.
    finished = sorted((text for group in groups for text in group.finished), key=lambda text: text.rank)[::-1]
    yield from _best_of(request, finished)


@dataclass
class _Group:
    """One group's beams and its best finished texts."""

    request: Request
    processors: tuple[LogitsProcessor, ...]
    text: IdArray
    """The beams' texts with room for all new tokens, (G, T)."""
    scores: Logits
    """Their log-probabilities, (G,)."""
    finished: list[Hypothesis] = field(default_factory=list)
    done: bool = False

    def advance(self, logits: Logits, count: int) -> IdArray:
        """Choose the tokens of step `count`, given logits (G, V); returns the beams (G,) that they follow."""
        config, size, vocab_size = self.request.config, len(self.scores), self.request.vocab_size
        end = len(self.request.prompt) + count
        if self.done:  # transformers feeds the group padding, which later groups then avoid
            self.text[:, end] = config.eos_token_id[0]
            self.scores[:] = 0
            return np.zeros(size, np.int64)
        rows = [
            process(self.processors, ids, log_softmax(row, np.float32), may_rule_out_all=True) + score
            for ids, row, score in zip(self.text[:, :end], logits, self.scores, strict=True)
        ]
        scores = np.concatenate(rows)  # (G·V,)
        best = largest(scores, _candidates_per_beam(self.request) * size)
        going: list[int] = []
        for rank, index in enumerate(best.tolist()):
            beam, token = divmod(index, vocab_size)
            if token not in config.eos_token_id:
                going.append(index)
            elif rank < size:
                self.add(beam, end, float(scores[index]), "eos")
            if len(going) == size:
                break
        if len(going) < size:
            raise ConfigError(
                f"a group of {size} beams cannot go on: the vocabulary has too few tokens beside those that end a text"
            )
        if len(self.finished) == size:
            best_rank = float(scores[best[0]]) / _divisor_of_best(self.request, count + 1)
            worst_rank = min(text.rank for text in self.finished)
            self.done = config.early_stopping is True or worst_rank >= best_rank
        chosen = np.array(going)
        beams: IdArray = chosen // vocab_size
        self.text, self.scores = self.text[beams], scores[chosen]
        self.text[:, end] = chosen % vocab_size
        return beams

    def add(self, beam: int, end: int, score: float, reason: FinishReason) -> None:
        """Note the text of a beam as finished, if it is one of the best; its length counts an end-of-text token."""
        if not np.isfinite(score):
            return
        new = self.text[beam, len(self.request.prompt) : end].tolist()
        rank = score / float(len(new) + (reason == "eos")) ** self.request.config.length_penalty
        if len(self.finished) == len(self.scores):
            worst = min(self.finished, key=lambda text: text.rank)
            if rank <= worst.rank:
                return
            self.finished.remove(worst)
        self.finished.append(Hypothesis(rank, new, reason))
