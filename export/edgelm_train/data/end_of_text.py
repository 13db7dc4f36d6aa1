"""Where a text ends: one token for every way of training, and the same token where the result generates."""

import json
from dataclasses import dataclass
from pathlib import Path

from edgelm_export.source.checkpoint import Checkpoint
from edgelm_export.source.generation_settings import FILE, stop_ids
from edgelm_train.data.corpus import END_OF_TEXT


@dataclass(frozen=True)
class EndOfText:
    """The token that ends every text which a checkpoint learns."""

    token_id: int | None
    """None where the vocabulary has no such token."""
    other_stop_ids: tuple[int, ...]
    """The other ids at which the checkpoint ends a text that it generates."""
    is_new: bool
    """Whether the checkpoint's own settings do not end a text at this token."""
    notes: tuple[str, ...]
    """Remarks for the user, in sentences."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "EndOfText":
        """The tokenizer's own token, or else the first at which the checkpoint stops, or else <|endoftext|>.

        A token counts if it is in the model's vocabulary: many configs name 50256, GPT-2's, for a smaller vocabulary.
        """
        size = checkpoint.architecture.vocab_size
        stops = stop_ids(checkpoint.generation_settings, size)
        named = (checkpoint.tokenizer_eos_token_id, *stops, checkpoint.tokenizer.token_id(END_OF_TEXT))
        token_id = next((i for i in named if i is not None and i < size), None)
        others = tuple(i for i in stops if i != token_id)
        notes: tuple[str, ...] = ()
        if token_id is None:
            notes = (
                f"{checkpoint.name!r} has no end-of-text token among its {size:,} tokens: texts are learned without an "
                "end, and a generated text ends at its maximum length",
            )
        elif token_id not in stops:
            token = checkpoint.tokenizer.decode([token_id])
            notes = (
                f"texts end with the tokenizer's {token!r} (id {token_id}), at which {checkpoint.name!r} did not stop",
            )
        return cls(token_id, others, token_id is not None and token_id not in stops, notes)

    @property
    def stop_ids(self) -> int | list[int] | None:
        """The value of ``eos_token_id`` in the settings of a result."""
        if self.token_id is None:
            return None
        return [self.token_id, *self.other_stop_ids] if self.other_stop_ids else self.token_id

    def write_settings(self, folder: Path) -> Path:
        """Write a file for ``edgelm export --generation-config``, for a result whose base does not stop here."""
        path = folder / FILE
        path.write_text(json.dumps({"eos_token_id": self.stop_ids}) + "\n", encoding="utf-8")
        return path
