"""Text drawn from the source model itself: every language and domain has such text for measuring and calibrating."""

import torch
import transformers

from edgelm.ids import IdArray
from edgelm_export.model.families import describe
from edgelm_export.source.checkpoint import quiet_torch

MAX_ROW_TOKENS = 256
"""Many short rows are faster than few long rows, because torch copies the whole cache at every token."""
_BATCH_ROWS = 64


def draw_texts(model: transformers.PreTrainedModel, tokens: int, seed: int) -> list[IdArray]:
    """Sample rows of token ids, (T,) each, at temperature 1.

    Every row starts with the model's BOS token, or with a random token where the model has none. It runs to the end of
    the context or to 256 tokens, even through ends of text.

    Args:
        tokens: minimum number of ids that all rows together predict. The first id of a row is not predicted.
    """
    length = min(describe(model).context_length, MAX_ROW_TOKENS)
    rows = -(-tokens // (length - 1))
    generator = torch.Generator().manual_seed(seed)
    texts: list[IdArray] = []
    with quiet_torch(), torch.no_grad():
        for start in range(0, rows, _BATCH_ROWS):
            texts += _draw_batch(model, min(_BATCH_ROWS, rows - start), length, generator)
    return texts


def _draw_batch(
    model: transformers.PreTrainedModel, rows: int, length: int, generator: torch.Generator
) -> list[IdArray]:
    vocab, bos = model.config.vocab_size, model.config.bos_token_id
    if bos is not None and 0 <= bos < vocab:
        ids = torch.full((rows, 1), bos)
    else:
        ids = torch.randint(vocab, (rows, 1), generator=generator)
    drawn, past = [ids], None
    for _ in range(length - 1):
        output = model(input_ids=ids, past_key_values=past, use_cache=True)
        past = output.past_key_values
        probabilities = torch.softmax(output.logits[:, -1].double(), dim=-1)  # (B, V)
        ids = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
        drawn.append(ids)
    return list(torch.cat(drawn, dim=1).numpy())  # (B, T)
