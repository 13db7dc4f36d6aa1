"""The number of micro-batches in a batch."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from edgelm_train.run.machine import activation_bytes, free_bytes, parts_that_fit

pytestmark = pytest.mark.export

CONFIG = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=32, vocab_size=1000)


@pytest.mark.parametrize(
    ("contexts_that_fit", "parts"), [(100, 1), (12, 1), (11.9, 2), (6, 2), (5, 3), (1, 12), (0, 12)]
)
def test_as_few_parts_as_fit(contexts_that_fit: float, parts: int) -> None:
    free = 2 * contexts_that_fit * 32 * activation_bytes(CONFIG) * 1.0001
    assert parts_that_fit(CONFIG, 12 * 32, free) == parts


@given(st.integers(1, 300), st.floats(0, 1e12))
def test_parts_are_whole_contexts(contexts: int, free: float) -> None:
    parts = parts_that_fit(CONFIG, contexts * 32, free)
    assert contexts % parts == 0


def test_memory_is_counted_in_what_shapes_took() -> None:
    """Measured: peak resident memory of a forward and backward pass in float32, less that of a tiny model."""
    for layers, width, vocabulary, measured in ((6, 256, 4096, 198_180), (12, 768, 50257, 1_475_611)):
        config = transformers.GPT2Config(n_layer=layers, n_embd=width, n_head=4, vocab_size=vocabulary)
        assert activation_bytes(config) == pytest.approx(measured, rel=0.05)


def test_some_memory_is_free() -> None:
    assert free_bytes(torch.device("cpu")) > 2**20
