"""`Model.generate_batch` answers each prompt as `generate` does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm import Completion, ConfigError, ContextError, Model, PromptError
from tests.conftest import TINY_BUNDLE

PROMPTS = ["Once upon a time", "A", "The cat sat on the mat and", "Lily"]


@pytest.fixture(scope="module")
def model() -> Model:
    return edgelm.load(TINY_BUNDLE, device="cpu", threads=1)


def without_stats(completion: Completion) -> Completion:
    """`completion` without its stats."""
    return replace(completion, stats=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": ()},
        {"temperature": 1.5, "seed": 3, "num_return_sequences": 3},
        {"seed": 1, "top_k": 20, "stop_strings": ["e", "a"], "logprobs": 1},
        {"repetition_penalty": 1.3, "max_new_tokens": 1},
        {"max_new_tokens": 0},
    ],
)
def test_each_is_what_generate_gives(model: Model, options: dict[str, Any], max_rows: int) -> None:
    completions = model.generate_batch(PROMPTS, max_rows=max_rows, **options)
    assert [without_stats(c) for c in completions] == [
        without_stats(model.generate(prompt, **options)) for prompt in PROMPTS
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_invariant_model_gives_each_the_same_bits_alone(threads: int) -> None:
    """The embedded model is int8, whose kernel for one row differs from that for several rows."""
    options: dict[str, Any] = {"max_new_tokens": 40, "seed": 2, "logprobs": 3, "num_return_sequences": 2}
    with edgelm.load(device="cpu", threads=threads, batch_invariant=True) as model:
        completions = model.generate_batch(PROMPTS, max_rows=5, **options)
        assert [without_stats(c) for c in completions] == [
            without_stats(model.generate(prompt, **options)) for prompt in PROMPTS
        ]


def test_options_of_each_prompt(model: Model) -> None:
    each: list[Any] = [{"max_new_tokens": 3}, {}, {"seed": 9, "temperature": 2.0}, {"do_sample": False}]
    completions = model.generate_batch(PROMPTS, each=each, max_new_tokens=6, seed=1, temperature=1.0)
    common: dict[str, Any] = {"max_new_tokens": 6, "seed": 1, "temperature": 1.0}
    for completion, prompt, own in zip(completions[:3], PROMPTS, each, strict=False):
        assert without_stats(completion) == without_stats(model.generate(prompt, **{**common, **own}))
    assert without_stats(completions[3]) == without_stats(model.generate(PROMPTS[3], max_new_tokens=6, do_sample=False))


def test_stats_say_what_a_prompt_took(model: Model) -> None:
    stats = model.generate_batch(PROMPTS, max_new_tokens=9, eos_token_id=())[2].stats
    assert stats.new_tokens == 9 and stats.prompt_tokens == len(model.tokenizer.encode(PROMPTS[2]))
    assert stats.prefill_seconds > 0 and stats.tokens_per_second == pytest.approx(8 / stats.decode_seconds)


def test_no_prompts_and_wrong_ones(model: Model) -> None:
    assert model.generate_batch([]) == []
    with pytest.raises(PromptError, match="2 of them, got 1"):
        model.generate_batch(["a", "b"], each=[{}])
    with pytest.raises(PromptError, match="prompts must be a list"):
        model.generate_batch("abc")
    with pytest.raises(ContextError, match="the prompt has 70 tokens"):
        model.generate_batch([[1], [1] * 70])
    with pytest.raises(ConfigError, match="num_beams works on one prompt at a time"):
        model.generate_batch(PROMPTS, num_beams=2)
    assert model.generate_batch([[1, 2]], max_new_tokens=2)[0].stats.new_tokens == 2


def test_an_error_in_one_prompt_is_the_callers(model: Model) -> None:
    with pytest.raises(ConfigError, match="no token is left to choose"):
        model.generate_batch(PROMPTS, each=[{}, {"suppress_tokens": list(range(300))}, {}, {}])


def test_stats_say_what_was_reused(model: Model, tmp_path: Path) -> None:
    """Tokens are reused of a state, and of the previous prompt."""
    ids = [1 + i % 200 for i in range(40)]
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1) as other:
        other.save_state(tmp_path / "state", ids[:30])
        other.load_state(tmp_path / "state")
        completions = other.generate_batch([[*ids, 7, 8], [*ids, 9, 9], [5, 5, 5]], max_new_tokens=3)
    assert [completion.stats.reused_tokens for completion in completions] == [30, 40, 0]


def test_any_iterable_of_prompts_will_do(model: Model) -> None:
    completions = model.generate_batch((prompt for prompt in PROMPTS), max_new_tokens=3)  # type: ignore[arg-type]
    assert [without_stats(c) for c in completions] == [
        without_stats(model.generate(prompt, max_new_tokens=3)) for prompt in PROMPTS
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["a"], "max_rows": "8"}, "max_rows must be a whole number from 1 to 1024, got '8'"),
        ({"prompts": ["a"], "max_rows": True}, "max_rows must be"),
        ({"prompts": ["a"], "max_rows": 1025}, "max_rows must be"),
        ({"prompts": None}, "prompts must be a list of texts or of token ids, got NoneType"),
        ({"prompts": ["a"], "each": 3}, "each must be a list of options, got int"),
        ({"prompts": ["a"], "each": [None]}, "each must hold the options of every prompt as a dict"),
        ({"prompts": ["a"], "each": {"seed": 1}}, "each must hold the options of every prompt as a dict"),
    ],
)
def test_wrong_arguments_get_a_sentence(model: Model, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(edgelm.EdgelmError, match=message):
        model.generate_batch(**arguments)
