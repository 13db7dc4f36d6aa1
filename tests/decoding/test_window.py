"""Texts longer than the context: cut prompts, and windows that go on."""

from typing import Any

import numpy as np
import pytest

import edgelm
from edgelm import ConfigError, ContextError, Model
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.request import fitted
from edgelm.decoding.window import WindowSession
from edgelm.engine.graph import Graph
from tests.conftest import TINY_BUNDLE, FakeSession, RunCommand, counting_rows


@pytest.fixture(scope="module")
def model() -> Model:
    return edgelm.load(TINY_BUNDLE, device="cpu", threads=1)


def config(**options: object) -> GenerationConfig:
    return GenerationConfig().updated(options)


def test_a_prompt_is_cut_so_that_its_continuation_fits() -> None:
    prompt = list(range(100))
    truncate = config(context_overflow="truncate", max_new_tokens=11)
    assert fitted(prompt, truncate, 40)[0] == prompt[-30:]
    assert fitted(prompt[:30], truncate, 40)[0] == prompt[:30]
    assert fitted(prompt[:35], truncate, 40)[0] == prompt[5:35]
    pinned = truncate.updated({"pinned_tokens": 4})
    assert fitted(prompt, pinned, 40)[0] == [0, 1, 2, 3, *prompt[-26:]]


def test_half_the_context_is_left_to_the_prompt() -> None:
    assert fitted(list(range(100)), config(context_overflow="truncate", max_new_tokens=500), 40)[0] == list(
        range(80, 100)
    )
    assert len(fitted(list(range(100)), config(context_overflow="truncate", max_new_tokens=0), 40)[0]) == 40


def test_stop_leaves_the_prompt_alone_and_a_window_takes_a_whole_context() -> None:
    prompt = list(range(100))
    assert fitted(prompt, config(), 40)[0] == prompt
    assert fitted(prompt, config(context_overflow="window"), 40)[0] == prompt[-40:]


def test_max_length_counts_the_whole_prompt() -> None:
    kept, changed = fitted(list(range(100)), config(context_overflow="truncate", max_length=110), 40)
    assert (len(kept), changed.new_token_limit(len(kept))) == (31, 10)
    with pytest.raises(ConfigError, match="max_length is 50 but the prompt already has 100 tokens"):
        fitted(list(range(100)), config(context_overflow="truncate", max_length=50), 40)


def test_too_many_pinned_tokens() -> None:
    with pytest.raises(ConfigError, match="pinned_tokens must be at most 20, half of this model's context, got 21"):
        fitted([1], config(context_overflow="window", pinned_tokens=21), 40)
    with pytest.raises(ConfigError, match="pinned_tokens does nothing without context_overflow"):
        config(pinned_tokens=3)


def test_a_window_keeps_the_pinned_tokens_and_the_newest() -> None:
    inner = FakeSession(counting_rows(50), context_length=10)
    window = WindowSession(inner, 2)
    window.step([0, 1, 2, 3])
    for token in range(4, 25):
        window.step([token])
        assert inner.fed[:2] == [0, 1]
        assert inner.fed[2:] == list(range(token + 3 - len(inner.fed), token + 1))
        assert len(inner.fed) <= 10
    assert window.position == 25
    assert window.reencoded_tokens == 16  # four slides, of four tokens each


@pytest.mark.parametrize("context", [1, 2, 3, 4, 7])
def test_a_window_of_a_tiny_context(context: int) -> None:
    inner = FakeSession(counting_rows(50), context_length=context)
    window = WindowSession(inner, 0)
    for token in range(20):
        assert int(np.argmax(window.step([token]))) == token + 1
        assert inner.fed[-1] == token


def test_rewinding_a_window_is_as_if_the_text_had_ended_there() -> None:
    def held(tokens: int, rewound: int) -> list[int]:
        inner = FakeSession(counting_rows(50), context_length=10)
        window = WindowSession(inner, 2)
        window.step([0, 1, 2, 3])
        for token in range(4, tokens + rewound):
            window.step([token])
        if rewound:
            window.rewind(rewound)
        return inner.fed

    for tokens in range(4, 30):
        for rewound in range(0, 20):
            assert held(tokens, rewound) == held(tokens, 0), (tokens, rewound)


def test_several_tokens_at_once_are_as_one_after_another() -> None:
    def window_after(pieces: list[list[int]]) -> list[int]:
        inner = FakeSession(counting_rows(50), context_length=10)
        window = WindowSession(inner, 2)
        for piece in pieces:
            window.step(piece)
        return inner.fed

    assert window_after([[*range(4)], [*range(4, 30)]]) == window_after([[*range(4)], *([t] for t in range(4, 30))])


def test_generation_goes_on_past_the_context(model: Model) -> None:
    context = model.session.context_length
    options: Any = {"max_new_tokens": 3 * context, "do_sample": False, "eos_token_id": []}
    stopped = model.generate([5, 6, 7], **options)
    assert stopped.choices[0].finish_reason == "context"
    endless = model.generate([5, 6, 7], context_overflow="window", pinned_tokens=2, **options)
    assert endless.choices[0].finish_reason == "length"
    ids = endless.choices[0].token_ids
    assert len(ids) == 3 * context and ids[: len(stopped.choices[0].token_ids)] == stopped.choices[0].token_ids
    assert (
        endless.stats.reencoded_tokens > context and 0 < endless.stats.reencode_seconds < endless.stats.decode_seconds
    )
    assert (stopped.stats.reencoded_tokens, stopped.stats.dropped_tokens) == (0, 0)


def test_a_window_gives_what_encoding_its_text_anew_gives(model: Model) -> None:
    """After the first slide the model sees the pinned tokens and the newest ones, at positions that begin with 0."""
    context, pinned = model.session.context_length, 4
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    kept = (context - pinned) - (context - pinned) // 2
    options: Any = {"max_new_tokens": context - len(prompt) + 8, "do_sample": False, "eos_token_id": []}
    ids = list(model.generate(prompt, context_overflow="window", pinned_tokens=pinned, **options).choices[0].token_ids)
    text = prompt + ids
    session = Graph.open(edgelm.Bundle.read(TINY_BUNDLE), device="cpu", threads=1).session()
    session.step(prompt[:pinned] + text[context - kept : context])
    after = []
    for token in text[context : context + 7]:
        after.append(int(np.argmax(session.step([token]))))
    assert after == text[context + 1 : context + 8]


def test_rows_of_a_window_do_not_depend_on_each_other(model: Model) -> None:
    context = model.session.context_length
    options: Any = {"max_new_tokens": 2 * context, "do_sample": True, "seed": 3, "context_overflow": "window"}
    options["eos_token_id"] = []
    three = model.generate([5, 6, 7], num_return_sequences=3, **options)
    assert three.choices[0] == model.generate([5, 6, 7], **options).choices[0]
    assert len({choice.token_ids for choice in three.choices}) == 3
    assert all(len(choice.token_ids) == 2 * context for choice in three.choices)


def test_a_long_prompt(model: Model) -> None:
    context = model.session.context_length
    prompt = [1 + i % 50 for i in range(3 * context)]
    with pytest.raises(ContextError, match="shorten the prompt, or give context_overflow='truncate'"):
        model.generate(prompt)
    cut = model.generate(prompt, context_overflow="truncate", max_new_tokens=5)
    assert (cut.stats.prompt_tokens, cut.stats.dropped_tokens) == (context - 4, 2 * context + 4)
    assert cut.choices == model.generate(prompt[-(context - 4) :], max_new_tokens=5).choices
    endless = model.generate(prompt, context_overflow="window", max_new_tokens=context, eos_token_id=[])
    assert endless.choices[0].finish_reason == "length"


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"penalty_alpha": 0.5, "top_k": 4}])
def test_searches_have_no_window(model: Model, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="context_overflow='window' works with greedy decoding and sampling only"):
        model.generate("Once", context_overflow="window", **options)


def test_the_flags(edgelm_command: RunCommand) -> None:
    long = "Once upon a time there was a dog. " * 100 + "One"
    command = ["run", "--no-echo", "--greedy", "-n", "5"]
    refused = edgelm_command(*command, long)
    assert (
        refused.status == 1 and "or give --context-overflow truncate or --context-overflow window" in refused.one_line()
    )
    done = edgelm_command(*command, "--context-overflow", "truncate", "--pinned-tokens", "4", long)
    assert (done.status, done.stderr) == (0, "") and done.stdout.strip()


def test_truncating_always_keeps_newest_tokens_too() -> None:
    truncate = config(context_overflow="truncate", max_new_tokens=500, pinned_tokens=20)
    assert fitted(list(range(100)), truncate, 40)[0] == [*range(20), *range(90, 100)]
    assert fitted([7, 8, 9], config(context_overflow="truncate", pinned_tokens=1), 2)[0] == [7, 9]


@pytest.mark.parametrize("pinned", [0, 3, 5, 6, 9, 100])
def test_rows_of_a_window_do_not_see_each_other(pinned: int) -> None:
    """Where more tokens are pinned than the prompt has, the second row must not keep new tokens of the first."""
    options: dict[str, Any] = {"context_overflow": "window", "pinned_tokens": pinned, "do_sample": True, "seed": 1}
    with edgelm.load(device="cpu", threads=1) as model:
        prompt = model.tokenizer.encode("Lily had a cat.")
        assert len(prompt) == 5
        long = model.generate(prompt, max_new_tokens=515, num_return_sequences=2, eos_token_id=(), **options)
        short = model.generate(prompt, max_new_tokens=30, num_return_sequences=2, eos_token_id=(), **options)
    assert [c.token_ids[:30] for c in long.choices] == [c.token_ids for c in short.choices]
