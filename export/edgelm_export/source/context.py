"""A shorter context: less memory for keys and values, and a smaller table of positions."""

import json
from dataclasses import replace

from edgelm.errors import ExportError
from edgelm_export.model.families import FAMILIES
from edgelm_export.source.checkpoint import Checkpoint

LEAST_TOKENS = 4
"""The shortest context that optimum traces."""


def shorten_context(checkpoint: Checkpoint, tokens: int) -> Checkpoint:
    """The checkpoint with a context of `tokens` tokens; what it computes for shorter texts stays the same.

    Raises:
        ExportError: the model's own context is shorter, or `tokens` is too few.
    """
    whole = checkpoint.architecture.context_length
    if not LEAST_TOKENS <= tokens <= whole:
        raise ExportError(f"--context must be from {LEAST_TOKENS} to the model's own context of {whole}, got {tokens}")
    family = FAMILIES[checkpoint.model.config.model_type]
    family.shorten(checkpoint.model, tokens)
    fields = json.loads(checkpoint.config_json) | {family.context_field: tokens}
    note = f"the context was shortened from {whole:,} to {tokens:,} tokens"
    return replace(
        checkpoint,
        config_json=json.dumps(fields, indent=2, ensure_ascii=False) + "\n",
        notes=(*checkpoint.notes, note) if tokens < whole else checkpoint.notes,
    )
