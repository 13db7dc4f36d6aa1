"""Texts longer than the context, with rotary positions: the model that torch computes gets only the tokens that stay.

Rotary models do not run out of rows of a table, but their positions begin with 0 too where the text is cut.
"""

from typing import Any

import pytest

from edgelm import Model
from edgelm.loading import load
from tests.export.checkpoints import SMALL_FAMILIES, Tiny, TinyExport, TorchModel

pytestmark = pytest.mark.export

PROMPT = [5, 6, 7, 8, 9, 10]
PINNED = 4
CONTEXT = 21
"""The context, shortened when the bundle is loaded."""


@pytest.fixture(params=["llama", "gemma3_text"])
def tiny(request: pytest.FixtureRequest, tiny_export: TinyExport) -> Tiny:
    """An fp32 bundle without a sliding window, or with one in some layers."""
    return tiny_export(SMALL_FAMILIES[request.param], "fp32")


def opened(tiny: Tiny) -> Model:
    return load(tiny.exported.bundle.path, device="cpu", threads=1, context=CONTEXT)


def new_ids(model: Model, prompt: list[int], count: int, **options: Any) -> list[int]:
    choice = model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=(), **options).choices[0]
    return list(choice.token_ids)


def windowed(model: TorchModel, prompt: list[int], context: int, count: int) -> list[int]:
    """What torch writes where a full context keeps its first `PINNED` tokens, and the newer half of the others."""
    seen, written = list(prompt), []
    for _ in range(count):
        if len(seen) > context:
            room = context - PINNED
            newest = seen.pop()
            seen = [*seen[:PINNED], *seen[len(seen) - room + room // 2 :], newest]
        written.append(int(model.logits(seen)[-1].argmax()))
        seen.append(written[-1])
    return written


def test_a_window_computes_the_kept_tokens_again(tiny: Tiny) -> None:
    """It slides twice."""
    ids = new_ids(opened(tiny), PROMPT, 30, context_overflow="window", pinned_tokens=PINNED)
    assert ids == windowed(tiny.torch, PROMPT, CONTEXT, 30)


def test_a_cut_prompt_is_its_newest_tokens(tiny: Tiny) -> None:
    prompt, count = tiny.text(1).tolist(), 4
    ids = new_ids(opened(tiny), prompt, count, context_overflow="truncate")
    assert ids == tiny.torch.greedy(prompt[len(prompt) - (CONTEXT + 1 - count) :], count)
    pinned = new_ids(opened(tiny), prompt, count, context_overflow="truncate", pinned_tokens=PINNED)
    kept = [*prompt[:PINNED], *prompt[len(prompt) - (CONTEXT + 1 - count - PINNED) :]]
    assert pinned == tiny.torch.greedy(kept, count)


def test_a_shorter_context_ends_where_torch_has_written_as_much(tiny: Tiny) -> None:
    assert new_ids(opened(tiny), PROMPT, 100) == tiny.torch.greedy(PROMPT, CONTEXT + 1 - len(PROMPT))
