"""Every way to generate gives `decode(prompt + new)[len(decode(prompt)):]`, whatever the tokenizer's decoder does."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

import edgelm
from edgelm import Completion, Model, PromptError
from edgelm.engine.graph import Graph
from edgelm.text.tokenizer import Tokenizer
from tests.conftest import TINY_BUNDLE
from tests.text.test_text_after import KINDS, Kind

VOCABULARY = 300  # of the tiny bundle's graph


@pytest.fixture(scope="module")
def graph() -> Iterator[Graph]:
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1) as model:
        yield model.graph


def model_of(kind: Kind, graph: Graph) -> Model:
    tokenizer = kind.tokenizer()
    tokenizer.limit_vocabulary(VOCABULARY)
    return Model(graph, tokenizer)


def options_of(kind: Kind, **more: Any) -> dict[str, Any]:
    """Options under which only tokens with a text are likely."""
    unused = range(len(kind.words) + 1, VOCABULARY)
    return {"max_new_tokens": 12, "eos_token_id": (), "suppress_tokens": list(unused), **more}


def prompts_of(name: str) -> list[list[int]]:
    kind, rng = KINDS[name], random.Random(name)
    return [[*kind.begin, *rng.choices(range(len(kind.words)), k=length)] for length in (1, 2, 3, 5, 8)]


def check(kind: Kind, prompt: list[int], completion: Completion) -> None:
    backend = kind.backend()
    before = len(kind.decode(prompt, backend))
    for choice in completion.choices:
        assert choice.finish_reason == "length" and len(choice.token_ids) == 12
        assert choice.text == kind.decode([*prompt, *choice.token_ids], backend)[before:]


SAMPLED = {"do_sample": True, "temperature": 8.0, "seed": 5, "num_return_sequences": 3}
BEAMS = {"num_beams": 4, "num_return_sequences": 3}


@pytest.mark.parametrize("more", [{}, SAMPLED, BEAMS], ids=["greedy", "sampled", "beams"])
@pytest.mark.parametrize("name", KINDS)
def test_text_after_a_prompt(graph: Graph, name: str, more: dict[str, Any]) -> None:
    kind = KINDS[name]
    model, options = model_of(kind, graph), options_of(kind, **more)
    for prompt in prompts_of(name):
        whole = model.generate(prompt, **options)
        check(kind, prompt, whole)
        chunks = list(model.stream(prompt, **options))
        for row, choice in enumerate(whole.choices):
            assert "".join(chunk.text for chunk in chunks if chunk.index == row) == choice.text
    if more is not BEAMS:
        for prompt, completion in zip(prompts_of(name), model.generate_batch(prompts_of(name), **options), strict=True):
            check(kind, prompt, completion)


@pytest.mark.parametrize("name", KINDS)
def test_stop_strings(graph: Graph, name: str) -> None:
    """A stop string that only the prompt holds ends nothing."""
    kind, backend, rng = KINDS[name], KINDS[name].backend(), random.Random(name)
    model = model_of(kind, graph)
    for prompt in prompts_of(name):
        full = model.generate(prompt, **options_of(kind, **SAMPLED)).choices
        before = kind.decode(prompt, backend)
        texts = [text for text in (before, *(choice.text for choice in full)) if text]
        text = rng.choice(texts)
        start = rng.randrange(len(text))
        stop = text[start : start + 2]
        stopped = model.generate(prompt, stop_strings=[stop], **options_of(kind, **SAMPLED))
        for choice, whole in zip(stopped.choices, full, strict=True):
            assert (choice.text, choice.finish_reason == "stop") == (whole.text.split(stop)[0], stop in whole.text)
        for choice in model.generate(prompt, stop_strings=[stop], **options_of(kind, **BEAMS)).choices:
            assert stop not in choice.text
            if choice.finish_reason == "length":
                assert choice.text == kind.decode([*prompt, *choice.token_ids], backend)[len(before) :]


def test_a_text_that_rust_cannot_decode_is_one_error(graph: Graph, capfd: pytest.CaptureFixture[str]) -> None:
    """The decoder takes a character from both ends of every token, also of a token that has only one."""
    kind = Kind(decoders.Strip("a", 1, 1), ["baab", "a"])
    model = model_of(kind, graph)
    with pytest.raises(PromptError, match=r"its decoder strips 1 characters 'a' .* has only 1\)"):
        model.generate([0], **options_of(kind, suppress_tokens=[0, *range(2, VOCABULARY)]))
    with pytest.raises(PromptError, match="its decoder strips"):
        model.stream([1])
    assert capfd.readouterr().err == ""


def tiny_tokenizer(decoder: decoders.Decoder, *, clean_up: bool) -> Tokenizer:
    """The tiny bundle's own tokenizer with another decoder."""
    backend = Backend.from_file(str(TINY_BUNDLE / "tokenizer.json"))
    backend.decoder = decoder
    return Tokenizer(backend, clean_up_tokenization_spaces=clean_up)


@pytest.mark.parametrize("prompt", ["the thing", "A: ", " It 's", "é"])
@pytest.mark.parametrize("clean_up", [False, True])
@pytest.mark.parametrize("strip", [False, True])
def test_a_text_does_not_come_out_again(graph: Graph, prompt: str, clean_up: bool, strip: bool) -> None:
    """tokenizers issue 1141 and transformers issue 31884: a decoder with Strip, and a blank that the clean-up takes."""
    steps = [decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]
    tokenizer = tiny_tokenizer(decoders.Sequence(steps) if strip else decoders.ByteLevel(), clean_up=clean_up)
    ids = tokenizer.encode(prompt)
    model = Model(graph, tokenizer)
    for seed in range(10):
        options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": (), "temperature": 3.0, "seed": seed}
        completion = model.generate(prompt, **options)
        whole = tokenizer.decode([*ids, *completion.choices[0].token_ids], skip_special_tokens=True)
        assert completion.text == whole[len(tokenizer.decode(ids, skip_special_tokens=True)) :]
        chunks = [chunk.text for chunk in model.stream(prompt, **options)]
        assert "".join(chunks) == completion.text and len(chunks) > 2
