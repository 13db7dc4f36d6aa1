"""Text drawn from the source model itself, so that every language and domain has some to measure and calibrate on."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgelm_export.source.checkpoint import quiet_torch

MAX_ROW_TOKENS = 256
"""Rows are many and short rather than few and long: torch copies the whole cache at every token."""
_BATCH_ROWS = 64

Text = npt.NDArray[np.int64]


def draw_texts(model: Any, tokens: int, seed: int) -> list[Text]:
    """Rows that predict at least `tokens` ids in all (a row's first one is given), sampled at temperature 1.

    Every row starts with the model's BOS token, or with a random one where it has none, and runs to the end of the
    context or 256 tokens, straight through ends of text.
    """
    length = min(model.config.n_positions, MAX_ROW_TOKENS)
    rows = -(-tokens // (length - 1))
    generator = torch.Generator().manual_seed(seed)
    texts: list[Text] = []
    with quiet_torch(), torch.no_grad():
        for start in range(0, rows, _BATCH_ROWS):
            texts += _draw_batch(model, min(_BATCH_ROWS, rows - start), length, generator)
    return texts


def _draw_batch(model: Any, rows: int, length: int, generator: torch.Generator) -> list[Text]:
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
