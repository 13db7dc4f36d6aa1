"""An explanation as JSON: what the page, the playground and the clients of a server read.

Shapes: L layers, A query heads, T tokens, P tokens of the prefix.
"""

import base64
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.scoring.explanation import Explanation

WHOLE = 255
"""A share of 1 in a byte."""
MAX_PAGE_ATTENTION_BYTES = 48 * 10**6
"""The most attention of an explanation that becomes a page, as float32. The page then has 8 MB."""


def explanation_data(explanation: Explanation, model: str) -> dict[str, Any]:
    """An explanation by `model`, for JSON; `attentions` are `packed_attention` in base64."""
    layers, heads = explanation.attentions.shape[:2]
    return {
        "model": model,
        "tokens": [asdict(token) for token in explanation.tokens],
        "following": [asdict(token) for token in explanation.following],
        "prefix_tokens": explanation.prefix_tokens,
        "layers": layers,
        "heads": heads,
        "attentions": base64.b64encode(packed_attention(explanation)).decode("ascii"),
    }


def packed_attention(explanation: Explanation) -> bytes:
    """Shares as bytes, 255 for a share of 1: by layer, then head, then token.

    Token t has t + 1 shares, those of the tokens up to itself. Where there is a prefix, the share of all its tokens
    together stands before them. The rest of a row is zeros, and left out.
    """
    shares = with_whole_prefix(explanation)  # (L, A, T, 1 + T) or (L, A, T, T)
    extra = shares.shape[3] - shares.shape[2]
    kept = np.tri(shares.shape[2], shares.shape[3], k=extra, dtype=bool)
    return np.rint(shares[:, :, kept] * WHOLE).clip(0, WHOLE).astype(np.uint8).tobytes()


def with_whole_prefix(explanation: Explanation) -> npt.NDArray[np.float32]:
    """The attention with one column for all tokens of the prefix: (L, A, T, 1 + T), or (L, A, T, T) without one."""
    prefix, shares = explanation.prefix_tokens, explanation.attentions
    if not prefix:
        return shares
    return np.concatenate([shares[..., :prefix].sum(axis=-1, keepdims=True), shares[..., prefix:]], axis=-1)


def script_json(content: object) -> str:
    """JSON inside of an element ``script``, which no text in it can end."""
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
