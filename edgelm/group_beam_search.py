"""Beam search in groups that avoid each other's tokens (Vijayakumar et al., arXiv 1610.02424), as transformers 4.56.2
does it: each group is a beam search of its own, whose logits are lowered by what earlier groups chose in this step.

G beams a group, B beams in all, T tokens so far, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from edgelm.beam_search import NEVER, Finished, best_of, log_softmax
from edgelm.decoding import DecodingSession, FinishReason, Request
from edgelm.errors import ConfigError
from edgelm.logits_processors import Ids, LogitsProcessor, Row, process, processors_of
from edgelm.sampling import largest


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
