"""Explanations by hand, for tests of pictures."""

import numpy as np

from edgelm.scoring.explanation import ExplainedToken, Explanation
from edgelm.scoring.results import TokenLogprob

HOSTILE_TEXTS = [
    "</script><script>alert(1)</script>",
    "<!--",
    "]]>",
    "&amp;",
    "\"'",
    "\x00\x1b",
    "\u202e",
    "\ufffd",
    "\n",
]


def explanation(texts: list[str], layers: int = 2, heads: int = 3, prefix: int = 0, seed: int = 0) -> Explanation:
    """An explanation of these tokens, with random shares."""
    rng, count = np.random.default_rng(seed), len(texts)
    shares = np.exp(rng.normal(size=(layers, heads, count, prefix + count)))
    shares *= np.tri(count, prefix + count, k=prefix)
    shares /= shares.sum(axis=-1, keepdims=True)
    top = tuple(TokenLogprob(i, text, -0.5 - i) for i, text in enumerate(texts[:3]))
    tokens = [ExplainedToken(0, texts[0], None, ()) if not prefix else ExplainedToken(0, texts[0], -2.0, top)]
    tokens += [ExplainedToken(i, text, -0.1 * i, top) for i, text in enumerate(texts[1:], 1)]
    return Explanation(tuple(tokens), top, shares.astype(np.float32), prefix)
