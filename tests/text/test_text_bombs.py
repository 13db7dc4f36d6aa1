"""Texts that are made to be slow take linear time, with every kind of tokenizer, or are refused with a number."""

import pytest

from edgelm.text.tokenizer import Tokenizer
from tests.text.text_bombs import BOMBS, ratio
from tests.text.tokenizer_kinds import text_of


@pytest.mark.parametrize("kind", ["gpt2", "gpt4o", "bert", "llama", "t5"])
def test_text_bombs_take_linear_time(kind: str) -> None:
    tokenizer = Tokenizer.from_json(text_of(kind))
    # What is quadratic takes a hundred times as long; the margin is for a busy machine.
    assert {name: factor for name, unit in BOMBS.items() if (factor := ratio(tokenizer, unit, 1_000)) > 50} == {}
