"""Tokenizers of tests/data/tokenizers with what transformers makes of texts and ids, and the checks against it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from edgelm.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data" / "tokenizers"
GOLDENS = json.loads((DATA / "goldens.json").read_text(encoding="utf-8"))
CASES: dict[str, dict[str, Any]] = GOLDENS["cases"]

few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# Plain text is too tame: spaces, marks, cleanup patterns, special tokens and CJK must meet.
SEEDS = [
    "<|endoftext|>",
    "[SEP]",
    "<tool>",
    " n't",
    " ' ",
    " .",
    "'s",
    "é",
    "e\u0301",
    "🎉",
    "\u200d",
    "今天",
    "\n",
    "  ",
]
texts = st.lists(st.one_of(st.sampled_from(SEEDS), st.text(max_size=8)), max_size=12).map("".join)


@cache
def finished(name: str) -> Tokenizer:
    """The tokenizer of a case, from the tokenizer.json that the build side made of it."""
    return Tokenizer.from_json((DATA / "finished" / CASES[name]["finished"]).read_text(encoding="utf-8"))


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return "".join(map(stream.push, ids)) + stream.flush()


def check_golden(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    assert [tokenizer.encode(text) for text in GOLDENS["texts"]] == case["ids"]
    assert [tokenizer.encode(text, add_special_tokens=False) for text in GOLDENS["texts"]] == case["plain"]
    decoded = zip(case["ids"] + case["streams"], case["decoded"], case["skipped"], strict=True)
    for ids, text, skipped in decoded:
        assert tokenizer.decode(ids) == streamed(tokenizer, ids, False) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == streamed(tokenizer, ids, True) == skipped
