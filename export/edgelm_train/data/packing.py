"""Documents packed into one stream of tokens, and the batches of a training run cut from it by index alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tokenizers

from edgelm.errors import TrainingError
from edgelm_train.data.bpe import encode
from edgelm_train.data.corpus import END_OF_TEXT

Ids = npt.NDArray[np.int32]
IGNORED = -100
"""The label torch's cross entropy leaves out."""


@dataclass(frozen=True)
class Packed:
    """Token ids of documents, each preceded by <|endoftext|>, end to end; document i begins at starts[i]."""

    ids: Ids
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def shuffled(self, seed: int) -> Ids:
        """The same documents in another order."""
        order = np.random.default_rng(seed).permutation(len(self.starts))
        ends = np.append(self.starts[1:], len(self.ids))
        return np.concatenate([self.ids[self.starts[i] : ends[i]] for i in order])


def pack(documents: Sequence[str], tokenizer: tokenizers.Tokenizer) -> Packed:
    """Tokenize `documents` and lay them end to end."""
    first = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [np.array([first, *encode(tokenizer, document)], dtype=np.int32) for document in documents]
    starts = np.cumsum([0, *map(len, pieces[:-1])], dtype=np.int64)
    return Packed(np.concatenate(pieces), starts)


def refuse_too_little(parts: Mapping[str, Packed], window: int, remedy: str) -> None:
    """Raises TrainingError where one of `parts`, by what they are for, does not fill a window.

    Args:
        remedy: what to give instead of more text.
    """
    for name, packed in parts.items():
        if len(packed) < window:
            raise TrainingError(
                f"only {len(packed)} tokens {name}, less than one window of {window}; give more text, or {remedy}"
            )


@dataclass(frozen=True)
class Phase:
    """So many optimizer steps with windows of one length."""

    steps: int
    window: int


class BatchStream:
    """Every micro-batch of a run, by index: no state, so a resumed run reads what an uninterrupted one would.

    The documents are laid end to end in a new order every epoch; the stream is cut into batches of `batch_tokens`,
    each of ``batch_tokens // window`` windows. As a torch dataset its item is a micro-batch: ``input_ids`` and
    ``labels``, (B, W) int64 arrays. A window's first token is predicted by nothing; its label is IGNORED.
    """

    def __init__(self, packed: Packed, phases: Sequence[Phase], batch_tokens: int, accumulate: int, seed: int) -> None:
        """`batch_tokens` is a multiple of every window times `accumulate`."""
        self._packed, self._phases, self._seed = packed, tuple(phases), seed
        self._batch_tokens, self._accumulate = batch_tokens, accumulate
        self._epoch, self._epoch_ids = -1, packed.ids

    def __len__(self) -> int:
        return sum(phase.steps for phase in self._phases) * self._accumulate

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[np.int64]]:
        window = self._window(index // self._accumulate)
        micro_tokens = self._batch_tokens // self._accumulate
        ids = self._read(index * micro_tokens, micro_tokens).reshape(-1, window).astype(np.int64)
        labels = ids.copy()
        labels[:, 0] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def _window(self, step: int) -> int:
        for phase in self._phases:
            if step < phase.steps:
                return phase.window
            step -= phase.steps
        raise IndexError(step)

    def _read(self, position: int, count: int) -> Ids:
        parts: list[Ids] = []
        while count:
            epoch, offset = divmod(position, len(self._packed))
            if epoch != self._epoch:
                self._epoch, self._epoch_ids = epoch, self._packed.shuffled(self._seed + epoch)
            part = self._epoch_ids[offset : offset + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts)
