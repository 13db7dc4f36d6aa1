"""Documents packed into one stream of tokens, and the micro-batches of a run, cut from the stream by their index."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tokenizers

from edgelm.errors import TrainingError
from edgelm_train.data.bpe import encode
from edgelm_train.data.corpus import counted

Ids = npt.NDArray[np.int32]
IGNORED = -100
"""The label that torch's cross entropy ignores."""


@dataclass(frozen=True)
class Packed:
    """Documents end to end: `ids` (T,), with an end-of-text token before each document, which begins at starts[i]."""

    ids: Ids
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def shuffled(self, seed: int) -> Ids:
        """`ids` (T,) with the documents in a random order that depends on `seed` alone."""
        order = np.random.default_rng(seed).permutation(len(self.starts))
        ends = np.append(self.starts[1:], len(self.ids))
        return np.concatenate([self.ids[self.starts[i] : ends[i]] for i in order])


def pack(documents: Sequence[str], tokenizer: tokenizers.Tokenizer, end_of_text: int | None) -> Packed:
    """Tokenize `documents` and put them end to end, with the token `end_of_text` before each, unless it is None.

    Raises:
        TrainingError: the tokenizer cannot encode a document.
    """
    first = [] if end_of_text is None else [end_of_text]
    pieces = [np.array([*first, *encode(tokenizer, document)], dtype=np.int32) for document in documents]
    starts = np.cumsum([0, *map(len, pieces[:-1])], dtype=np.int64)
    return Packed(np.concatenate(pieces), starts)


def refuse_too_little(parts: Mapping[str, Packed], window: int, remedy: str) -> None:
    """Raise a TrainingError where one of the `parts` has fewer tokens than `window`.

    In the message, the name of the part follows "tokens", and `remedy` follows "give more text, or".
    """
    for name, packed in parts.items():
        if len(packed) < window:
            tokens = counted(len(packed), "token")
            raise TrainingError(f"only {tokens} {name}, less than one window of {window}; give more text, or {remedy}")


@dataclass(frozen=True)
class Phase:
    """A part of a run: `steps` optimizer steps whose windows have `window` tokens."""

    steps: int
    window: int


class BatchStream:
    """A torch dataset of a run's micro-batches. An index alone decides a micro-batch, so that a run can be resumed.

    Each epoch puts the documents end to end in a new order. The stream of all epochs is cut into batches, and these
    into micro-batches of whole windows. A micro-batch has ``input_ids`` and ``labels``, int64 arrays (B, W). The label
    of a window's first token is IGNORED, because no token predicts it.

    An optimizer step has `accumulate` micro-batches and `batch_tokens` tokens, a multiple of ``window * accumulate`` in
    every phase.
    """

    def __init__(self, packed: Packed, phases: Sequence[Phase], batch_tokens: int, accumulate: int, seed: int) -> None:
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
