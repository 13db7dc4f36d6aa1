"""Beam search and beam sampling over one prompt, as transformers 4.57's `_beam_search` does them.

All beams are rows of one batch. B beams, K candidates a step, T tokens so far, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgelm.decoding.logits_processors import Ids, LogitsProcessor, Row, process, processors_of
from edgelm.decoding.request import DecodingSession, FinishReason, Request
from edgelm.decoding.sampling import beam_uniforms, candidates, draw_without_replacement, filters_of, largest
from edgelm.errors import ConfigError

NEVER = np.float32(-1e9)
"""Score of a beam that must not win; finite, so that it can lead on where nothing else does."""

Finished = tuple[list[int], FinishReason]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Continuations by one token, the best first: of which beam, by which token, at which score; (K,) each."""

    beams: npt.NDArray[np.intp]
    tokens: npt.NDArray[np.intp]
    scores: Row


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished text and its rank."""

    score: np.float32
    """Log-probability / length ** length_penalty."""
    tokens: list[int]
    """The new part, without an end-of-text token."""
    reason: FinishReason


def beam_search(session: DecodingSession, request: Request, logits: Row) -> Iterator[Finished]:
    """The best `num_return_sequences` continuations, the best first, each with the reason it ended.

    Args:
        session: holds the prompt.
        logits: what follows the prompt, (V,).

    Raises:
        ConfigError: fewer continuations exist under these options.
    """
    config, prompt_tokens = request.config, len(request.prompt)
    beams = config.num_beams
    text, scores = request.text_buffer(beams), np.full(beams, NEVER)
    scores[0] = 0  # all beams begin alike: only the first may have offspring
    # An end of text takes a candidate's place; enough others must be left to go on with.
    wanted = max(2, 1 + len(config.eos_token_id)) * beams
    finished: list[Hypothesis] = []
    logits = np.broadcast_to(logits, (beams, request.vocab_size))
    batch = session.batch(beams, prompt_tokens + request.most_new_tokens - 1) if request.most_new_tokens > 1 else None
    for count in range(request.most_new_tokens):
        end = prompt_tokens + count
        found = _continuations(request, text[:, :end], logits, scores, wanted, count)
        reasons = _reasons(request, text[:, prompt_tokens:end], found, count)
        ended = np.array([reason is not None for reason in reasons])
        full = len(finished) == beams and config.early_stopping is True
        for place in np.flatnonzero(ended[:beams] & np.isfinite(found.scores[:beams])):
            reason = reasons[place]
            if reason is None or full:
                continue
            new = text[found.beams[place], prompt_tokens:end].tolist()
            new += [] if reason == "eos" else [int(found.tokens[place])]
            score = found.scores[place] / np.float32(float(count + 1) ** config.length_penalty)
            finished.append(Hypothesis(score, new, reason))
        finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[:beams]
        running = np.where(ended, found.scores + NEVER, found.scores)
        going = np.argsort(-running, kind="stable")[:beams]
        scores = running[going]
        if ended.all() or _is_over(request, finished, scores, count):
            break
        text = text[found.beams[going]]
        text[:, end] = found.tokens[going]
        assert batch is not None
        if count:  # at first all rows are the same
            batch.reorder(found.beams[going])
        logits = batch.step(text[:, end])
    if request.most_new_tokens == 0:
        finished = [Hypothesis(np.float32(0), [], request.last_reason)] * config.num_return_sequences
    yield from best_of(request, [(hypothesis.tokens, hypothesis.reason) for hypothesis in finished])


def best_of(request: Request, found: list[Finished]) -> list[Finished]:
    """As many of the texts `found`, the best first, as are to be returned.

    Raises:
        ConfigError: there are fewer.
    """
    wanted = request.config.num_return_sequences
    if len(found) < wanted:
        raise ConfigError(
            f"only {len(found)} of num_return_sequences={wanted} continuations exist under these options: "
            "lower it, or allow more tokens"
        )
    return found[:wanted]


def log_softmax(logits: Row) -> Row:
    """Log-probabilities of logits (V,)."""
    result: Row = logits - logits.max()
    result -= np.float32(np.log(np.exp(result).sum(dtype=np.float64)))
    return result


def _continuations(request: Request, texts: Ids, logits: Row, scores: Row, wanted: int, count: int) -> Candidates:
    """The best, or the drawn, `wanted` continuations of `texts` (B, T) by one token."""
    config = request.config
    filters = filters_of(config, at_least=1 + max(1, len(config.eos_token_id))) if config.do_sample else ()
    temperature = config.temperature if config.do_sample else 1.0
    tokens, values, beams = [], [], []
    for beam, score in enumerate(scores):
        if count == 0 and beam > 0 and not config.do_sample and request.vocab_size >= wanted:
            break  # their offspring cannot be among the best
        row = request.processed(texts[beam], log_softmax(logits[beam]), required=False)
        if np.isfinite(row.max()):
            kept, row = candidates(row, temperature, filters)
            places = np.arange(len(row)) if kept is None else kept
        else:  # no token may follow this beam
            places, row = np.zeros(1, np.intp), row[:1]
        if config.renormalize_logits and len(row) > 1:
            row = log_softmax(row)
        row = row + score
        if not config.do_sample:
            best = largest(row, wanted)
            places, row = places[best], row[best]
        tokens.append(places)
        values.append(row)
        beams.append(np.full(len(row), beam, np.intp))
    found = Candidates(np.concatenate(beams), np.concatenate(tokens), np.concatenate(values))
    if not np.isfinite(found.scores.max()):
        raise ConfigError(f"no beam can go on after {texts.shape[1]} tokens: the options rule out every token")
    if config.do_sample:
        uniforms = beam_uniforms(request.seed, count, len(scores) * request.vocab_size)
        drawn = uniforms[found.beams * request.vocab_size + found.tokens]
        chosen = draw_without_replacement(found.scores, wanted, drawn)
    else:
        chosen = largest(found.scores, wanted)
    return Candidates(found.beams[chosen], found.tokens[chosen], found.scores[chosen])


def _reasons(request: Request, texts: Ids, found: Candidates, count: int) -> list[FinishReason | None]:
    """Why each candidate ends its text; None where it goes on. `texts` are the beams' new tokens (B, T)."""
    late = request.interruption
    late = request.last_reason if count + 1 == request.most_new_tokens else late

    def reason(beam: int, token: int) -> FinishReason | None:
        if token in request.config.eos_token_id:
            return "eos"
        if request.ends_text is not None and request.ends_text([*texts[beam].tolist(), token]):
            return "stop"
        return late

    return [reason(int(beam), int(token)) for beam, token in zip(found.beams, found.tokens, strict=True)]


def _is_over(request: Request, finished: list[Hypothesis], scores: Row, count: int) -> bool:
    """Whether the running beams' `scores`, the best first, can no longer better the finished ones."""
    config = request.config
    if len(finished) < config.num_beams:
        return bool(scores[0] <= NEVER)
    if config.early_stopping is True:
        return True
    length = count + 1
    if config.early_stopping == "never" and config.length_penalty > 0:
        length = config.new_token_limit(len(request.prompt))
    best_possible = scores[0] / np.float32(float(length) ** config.length_penalty)
    return bool(best_possible <= finished[-1].score)


@dataclass
class _Group:
    """One group's beams and its best finished texts."""

    request: Request
    text: Ids  # (G, T), with room for all new tokens
    scores: Row  # (G,) log-probabilities
    finished: list[tuple[float, list[int], FinishReason]] = field(default_factory=list)
    done: bool = False

    def advance(self, logits: Row, processors: tuple[LogitsProcessor, ...], count: int) -> Ids:
        """Choose this step's tokens, given logits (G, V); returns the beams (G,) they follow."""
        config, size, vocab = self.request.config, len(self.scores), self.request.vocab_size
        end = len(self.request.prompt) + count
        if self.done:  # transformers feeds it padding, which later groups then avoid
            self.text[:, end] = config.eos_token_id[0]
            self.scores[:] = 0
            return np.zeros(size, np.int64)
        rows = [
            process(processors, ids, log_softmax(row), required=False) + score
            for ids, row, score in zip(self.text[:, :end], logits, self.scores, strict=True)
        ]
        scores = np.concatenate(rows)  # (G·V,)
        best = largest(scores, max(2, 1 + len(config.eos_token_id)) * size)
        going: list[int] = []
        for rank, place in enumerate(best.tolist()):
            beam, token = divmod(place, vocab)
            if token not in config.eos_token_id:
                going.append(place)
            elif rank < size:
                self.add(beam, end, float(scores[place]), "eos")
            if len(going) == size:
                break
        if len(going) < size:
            raise ConfigError(
                f"a group of {size} beams cannot go on: the vocabulary has too few other tokens than ends"
            )
        chosen = np.array(going)
        self.done = self._is_done(float(scores[best[0]]), count + 1)
        beams: Ids = chosen // vocab
        self.text, self.scores = self.text[beams], scores[chosen]
        self.text[:, end] = chosen % vocab
        return beams

    def add(self, beam: int, end: int, score: float, reason: FinishReason) -> None:
        """Note a finished text; an end-of-text token counts for its length."""
        if not np.isfinite(score):
            return
        new = self.text[beam, len(self.request.prompt) : end].tolist()
        rank = score / float(len(new) + (reason == "eos")) ** self.request.config.length_penalty
        if len(self.finished) < len(self.scores) or rank > min(self.finished)[0]:
            self.finished.append((rank, new, reason))
        if len(self.finished) > len(self.scores):
            worst = min(range(len(self.finished)), key=lambda place: self.finished[place][0])
            del self.finished[worst]

    def _is_done(self, best: float, length: int) -> bool:
        """Whether no running beam can better the worst finished text."""
        config = self.request.config
        if len(self.finished) < len(self.scores):
            return False
        if config.early_stopping is True:
            return True
        if config.early_stopping == "never" and config.length_penalty > 0:
            length = config.new_token_limit(len(self.request.prompt))
        return bool(min(self.finished)[0] >= best / float(length) ** config.length_penalty)


def group_beam_search(session: DecodingSession, request: Request, logits: Row) -> Iterator[Finished]:
    """The best `num_return_sequences` continuations over all groups, the best first.

    Stop strings do not steer the search: the caller cuts the texts.

    Args:
        session: holds the prompt.
        logits: what follows the prompt, (V,).

    Raises:
        ConfigError: a group has too few continuations.
    """
    config, prompt_tokens, beams = request.config, len(request.prompt), request.config.num_beams
    size = beams // config.num_beam_groups
    groups = []
    for _ in range(config.num_beam_groups):
        scores = np.full(size, NEVER)
        scores[0] = 0
        groups.append(_Group(request, request.text_buffer(size), scores))
    taken = np.zeros(request.vocab_size, np.float32)  # how often earlier groups chose a token in this step

    def avoid_taken(ids: Ids, logits: Row) -> Row:
        return logits - np.float32(config.diversity_penalty) * taken

    processors = processors_of(config, prompt_tokens, request.vocab_size, after_biases=[avoid_taken])
    logits = np.broadcast_to(request.finite(logits), (beams, request.vocab_size))
    batch = session.batch(beams, prompt_tokens + request.most_new_tokens - 1) if request.most_new_tokens > 1 else None
    end, reason = prompt_tokens, request.last_reason
    for count in range(request.most_new_tokens):
        order: list[int] = []
        taken[:] = 0
        for index, group in enumerate(groups):
            first = index * size
            order += (first + group.advance(logits[first : first + size], processors, count)).tolist()
            np.add.at(taken, group.text[:, end], 1)
        end += 1
        if all(group.done for group in groups) or count + 1 == request.most_new_tokens:
            break
        if request.interruption is not None:
            reason = request.interruption
            break
        assert batch is not None
        if count:
            batch.reorder(order)
        logits = request.finite(batch.step(np.concatenate([group.text[:, end - 1] for group in groups])))
    for group in groups:
        if not group.done and end > prompt_tokens:
            for beam, score in enumerate(group.scores):
                group.add(beam, end, float(score), reason)
    # Of equal ones the last comes first, as transformers takes them from the end of an ascending list.
    finished = sorted((found for group in groups for found in group.finished), key=lambda found: found[0])[::-1]
    if request.most_new_tokens == 0:
        finished = [(0.0, [], request.last_reason)] * config.num_return_sequences
    yield from best_of(request, [(tokens, why) for _, tokens, why in finished])
