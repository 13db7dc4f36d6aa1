"""When `Model.choose` and the constraint `Choices` find the same text likeliest.

`choose` compares whole texts, each as the tokenizer spells it. A text that obeys `Choices` may be spelled in any way,
and greedy decoding takes the likeliest token at each place. So both agree

- with beams, where no choice begins another one (the end of a text has a probability too), the beams are as many as the
  spellings, `length_penalty` is 0, and the likeliest spelling is the tokenizer's own;
- with greedy decoding, where the likeliest token that may come first is a whole choice, and each choice is one token.
"""

import random
from typing import Any

import pytest

from edgelm import Choices, Model, load
from tests.conftest import TINY_BUNDLE

SEARCH: dict[str, Any] = {"length_penalty": 0.0, "early_stopping": "never", "do_sample": False}
WORDS = ["happy", "sad", "angry", "tired", "big", "small", "red", "blue", "dog", "cat", "tree", "ball", "park", "home"]
WORDS += ["fast", "slow", "good", "bad", "nice", "kind", "mean", "funny", "scared", "proud", "hungry", "hot", "cold"]
STORIES = ["Lily lost her doll. She felt", "Tom saw a", "The sky was", "One day, a little girl found a"]
STORIES += ["The dog was very"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(threads=1, device="cpu")


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load(TINY_BUNDLE, threads=1, device="cpu")


def spellings_of(model: Model, text: str) -> list[list[int]]:
    """Every list of tokens that spells `text`."""
    spelled = model.tokenizer.spellings()
    found: dict[bytes, list[list[int]]] = {b"": [[]]}
    whole = text.encode()
    for start in range(len(whole) - 1, -1, -1):
        rest = whole[start:]
        found[rest] = [
            [token, *more]
            for token, piece in enumerate(spelled)
            if piece and rest.startswith(piece)
            for more in found[rest[len(piece) :]]
        ]
    return found[whole]


def likeliest_spelling(model: Model, prompt: str, choices: list[str]) -> tuple[str, list[int], int]:
    """The choice with the likeliest spelling of all, that spelling, and how many there are."""
    ids, best, count = model.tokenizer.encode(prompt), (float("-inf"), "", list[int]()), 0
    for choice in choices:
        for spelling in spellings_of(model, choice):
            best = max(best, (model.score(ids, spelling).logprob, choice, spelling))
            count += 1
    return best[1], best[2], count


def is_own(model: Model, prompt: str, choice: str, spelling: list[int]) -> bool:
    """Whether the tokenizer spells `choice` so after `prompt`."""
    return model.tokenizer.encode(prompt + choice) == [*model.tokenizer.encode(prompt), *spelling]


def test_the_tiny_bundle_by_all_spellings() -> None:
    """fp32 and random weights: spellings are about equally likely, so the tokenizer's own is often not the first."""
    tiny, drawn = load(TINY_BUNDLE, threads=1, device="cpu"), random.Random(3)
    agreed = 0
    for _ in range(25):
        prompt = "".join(drawn.choices("abcdefgh ", k=drawn.randrange(1, 12))) + "x"
        choices = [f" {a}" for a in drawn.sample(["the", "an", "he", "on", "at", "is", "it"], drawn.randrange(2, 5))]
        best, spelling, count = likeliest_spelling(tiny, prompt, choices)
        searched = tiny.generate(prompt, constraint=Choices(choices), num_beams=max(2, count), **SEARCH)
        assert (searched.text, list(searched.choices[0].token_ids)) == (best, spelling)
        chosen = str(tiny.choose(prompt, choices))
        if is_own(tiny, prompt, best, spelling):
            assert searched.text == chosen
            agreed += 1
    assert agreed >= 5, agreed


def cases(count: int) -> list[tuple[str, list[str]]]:
    drawn = random.Random(1)
    return [
        (drawn.choice(STORIES), [f" {word}" for word in drawn.sample(WORDS, drawn.randrange(2, 7))])
        for _ in range(count)
    ]


def test_the_embedded_model_with_beams(model: Model) -> None:
    """A trained model finds the tokenizer's own spelling likeliest. 24 beams miss only spellings that are never it."""
    for prompt, choices in cases(30):
        searched = model.generate(prompt, constraint=Choices(choices), num_beams=24, **SEARCH)
        own = is_own(model, prompt, searched.text, list(searched.choices[0].token_ids))
        chosen = model.choose(prompt, choices)
        ranked = sorted((option.logprob for option in chosen.options), reverse=True)
        near_tie = ranked[0] - ranked[1] < 0.02  # int8: a batch's last bits differ from those of one text
        assert own and (searched.text == str(chosen) or near_tie), (prompt, choices, searched.text, str(chosen))


def test_greedy_decoding_agrees_where_each_choice_is_a_token(model: Model) -> None:
    """Where the likeliest first token is a whole choice, and all choices are tokens, no choice is likelier."""
    agreed = 0
    for prompt, choices in cases(60):
        length = {
            len(model.tokenizer.encode(prompt + choice)) - len(model.tokenizer.encode(prompt)) for choice in choices
        }
        greedy = model.generate(prompt, constraint=Choices(choices), do_sample=False)
        if length != {1} or len(greedy.choices[0].token_ids) != 1:
            continue
        assert greedy.text == str(model.choose(prompt, choices)), (prompt, choices)
        agreed += 1
    assert agreed >= 20, agreed


def test_greedy_decoding_may_take_a_branch_that_is_less_likely_as_a_whole(tiny: Model) -> None:
    """So greedy decoding is no replacement for `choose`."""
    drawn, differ = random.Random(0), 0
    for _ in range(20):
        prompt = "".join(drawn.choices("abcdefgh ", k=8)) + "x"
        choices = [" the hat", " on a mat", " it is"]
        greedy = tiny.generate(prompt, constraint=Choices(choices), do_sample=False)
        differ += greedy.text != str(tiny.choose(prompt, choices))
    assert differ
