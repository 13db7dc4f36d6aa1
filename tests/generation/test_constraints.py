"""Constrained texts through the public API: of the tiny bundle, and of the embedded model."""

import asyncio
import itertools
import json
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgelm import Choices, ConfigError, GenerationConfig, Grammar, JsonSchema, Model, Regex, load
from edgelm.text.constraints import Constraint
from tests.conftest import TINY_BUNDLE
from tests.text.random_constraints import matches, random_regex, random_schema

Row = npt.NDArray[np.float32]
PERSON = JsonSchema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3},
        },
        "required": ["name", "age", "pets"],
        "additionalProperties": False,
    }
)
CASES: dict[str, tuple[Constraint, Callable[[str], object]]] = {
    "choices": (Choices([" happy", " sad", " very happy"]), [" happy", " sad", " very happy"].__contains__),
    "regex": (
        Regex(r" [A-Z][a-z]{2,8} was [0-9]{1,2} years old\."),
        re.compile(r" [A-Z][a-z]{2,8} was [0-9]{1,2} years old\.").fullmatch,
    ),
    "schema": (PERSON, lambda text: matches(PERSON, text)),
    "grammar": (
        Grammar('start: " " answer (" and " answer){0,4} "!"{1,3}\nanswer: "yes" | "no" | "(" answer ")"'),
        re.compile(r" \(*(yes|no)\)*( and \(*(yes|no)\)*){0,4}!{1,3}").fullmatch,
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"temperature": 1.5, "num_return_sequences": 3},
    "filters": {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
    "top_n_sigma": {"top_n_sigma": 1.0},
    "xtc": {"xtc_probability": 1.0},
    "mirostat": {"mirostat_tau": 3.0},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "dry_multiplier": 1.0},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "drawn beams": {"num_beams": 3, "do_sample": True},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 5},
    "window": {"do_sample": False, "context_overflow": "window"},
}


@pytest.fixture(scope="module")
def model() -> Model:
    return load(threads=1, device="cpu")


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load(TINY_BUNDLE, threads=1, device="cpu")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_every_method_obeys(model: Model, case: str, method: str) -> None:
    constraint, obeys = CASES[case]
    done = model.generate("Lily felt", constraint=constraint, max_new_tokens=150, seed=3, **METHODS[method])
    for choice in done.choices:
        assert choice.finish_reason in ("eos", "stop"), choice
        assert obeys(choice.text), choice
    assert done.stats.new_tokens == sum(len(choice.token_ids) for choice in done.choices)


def test_random_regular_expressions(model: Model) -> None:
    _obey(model, [random_regex(seed) for seed in range(40)])


def test_random_json_schemas(model: Model) -> None:
    _obey(model, [JsonSchema(random_schema(seed)) for seed in range(60)])


def _obey(model: Model, cases: list[Any]) -> None:
    """Side by side, each with a constraint of its own."""
    each = [{"constraint": case, "seed": seed} for seed, case in enumerate(cases)]
    done = model.generate_batch(["One day"] * len(cases), each=each, temperature=1.5, max_new_tokens=80)  # type: ignore[arg-type]
    ended = [
        (case, d.choices[0]) for case, d in zip(cases, done, strict=True) if d.choices[0].finish_reason != "length"
    ]
    assert len(ended) > len(cases) / 2
    for case, choice in ended:
        assert matches(case, choice.text), (case, choice)


LANGUAGES = {
    "(a|bc|H)(d|ello)? ?[0-9]{1,2}": [
        "".join(parts)
        for parts in itertools.product(
            ["a", "bc", "H"],
            ["", "d", "ello"],
            ["", " "],
            [str(n) for n in range(10)] + [f"{n:02}" for n in range(100)],
        )
    ],
    "(yes|no|é|今天){1,3}": [
        "".join(parts) for count in (1, 2, 3) for parts in itertools.product(["yes", "no", "é", "今天"], repeat=count)
    ],
}


@pytest.mark.parametrize("pattern", LANGUAGES)
def test_greedy_decoding_equals_masking_by_brute_force(tiny: Model, pattern: str) -> None:
    """The reference lists all texts, and masks every token that leads to none. Identity: nothing is forced."""
    texts = [text.encode() for text in LANGUAGES[pattern]]
    alphabet = {chr(char): byte for byte, char in _gpt2_bytes().items()}
    vocabulary = [tiny.tokenizer._token(i, skip_special_tokens=True) or "" for i in range(tiny.tokenizer.vocab_size)]
    spelled = [bytes(alphabet[char] for char in token) for token in vocabulary]
    for prompt in ("Hello", "The", "a b c"):
        ids, new = tiny.tokenizer.encode(prompt), b""
        expected: list[int] = []
        while True:
            left = [text for text in texts if text.startswith(new)]
            if left == [new]:
                break
            tiny.session.reset()
            logits = tiny.session.step([*ids, *expected])
            allowed = {text[: len(new) + n] for text in left for n in range(1, len(text) - len(new) + 1)}
            mask = np.array([bool(piece) and new + piece in allowed for piece in spelled])
            mask[list(tiny.generation_config.eos_token_id)] = new in texts
            token = int(np.argmax(np.where(mask, logits, -np.inf)))
            if token in tiny.generation_config.eos_token_id:
                break
            expected.append(token)
            new += spelled[token]
        got = tiny.generate(
            prompt, constraint=Regex(pattern), do_sample=False, logits_processor=lambda ids, logits: logits
        )
        assert list(got.choices[0].token_ids) == expected
        assert got.text == new.decode()


def _gpt2_bytes() -> dict[int, int]:
    """The character of each byte in GPT-2's alphabet."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(moved)}


def test_forced_text_is_spelled_as_the_tokenizer_spells_it(model: Model) -> None:
    text = " there was a little girl named Lily"
    done = model.generate("Once upon a time", constraint=Choices([text]), max_new_tokens=40)
    assert done.choices[0].token_ids == tuple(model.tokenizer.encode(text, add_special_tokens=False))


def test_a_stream_is_what_generate_returns(model: Model) -> None:
    for constraint, _ in CASES.values():
        whole = model.generate("Lily felt", constraint=constraint, max_new_tokens=150, seed=1).choices[0]
        chunks = list(model.stream("Lily felt", constraint=constraint, max_new_tokens=150, seed=1))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert chunks[-1].finish_reason == whole.finish_reason
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids


def test_side_by_side_as_alone_bit_for_bit(model: Model) -> None:
    """Whatever the neighbours are: constrained or not, with another constraint or the same."""
    each: list[Any] = [{"constraint": constraint} for constraint, _ in CASES.values()] + [{}, {"top_k": 3}]
    options: dict[str, Any] = {"max_new_tokens": 60, "seed": 5, "temperature": 1.2, "logprobs": 1}
    together = model.generate_batch(["Lily felt"] * len(each), each=each, **options)
    for own, done in zip(each, together, strict=True):
        (alone,) = model.generate_batch(["Lily felt"], each=[own], **options)
        assert alone.choices == done.choices
    with model.scheduler(max_rows=3) as scheduler:
        submitted = [scheduler.submit("Lily felt", **own, **options) for own in each]
        for submission, done in zip(submitted, together, strict=True):
            assert submission.completion().choices == done.choices


def test_fp32_has_the_same_ids_alone_and_side_by_side(tiny: Model) -> None:
    constraint = Regex(r"(Hello there|The dog){2,6} [a-z]{3,20}\.")
    for seed in range(5):
        alone = tiny.generate("Hello", constraint=constraint, seed=seed, do_sample=True, max_new_tokens=90)
        (together,) = tiny.generate_batch(
            ["Hello"], constraint=constraint, seed=seed, do_sample=True, max_new_tokens=90
        )
        assert alone.choices == together.choices


def test_batch_invariant_models_compute_the_same_bits() -> None:
    model = load(threads=1, device="cpu", batch_invariant=True)
    alone = model.generate("Lily felt", constraint=PERSON, max_new_tokens=100, seed=2)
    (together,) = model.generate_batch(["Lily felt"], constraint=PERSON, max_new_tokens=100, seed=2)
    assert alone.choices == together.choices


def test_asyncio(model: Model) -> None:
    constraint, obeys = CASES["regex"]
    assert obeys(asyncio.run(model.agenerate("Lily felt", constraint=constraint, max_new_tokens=60, seed=1)).text)


def test_threads_share_a_constraint(model: Model) -> None:
    constraint, obeys = CASES["schema"]
    texts: dict[int, str] = {}

    def work(seed: int) -> None:
        texts[seed] = model.generate("Lily felt", constraint=constraint, max_new_tokens=150, seed=seed % 2).text

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(obeys(text) for text in texts.values())
    assert texts[0] == texts[2] and texts[1] == texts[3]


def test_a_cut_text_is_marked(model: Model) -> None:
    done = model.generate("Lily felt", constraint=PERSON, max_new_tokens=20, seed=1)
    assert done.choices[0].finish_reason == "length"
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(done.text)


def test_what_cannot_be_met_is_refused_before_it_starts(model: Model) -> None:
    long = Choices([" there was a little girl named Lily", " a very long and winding story about a big dog"])
    for options in ({"max_new_tokens": 4}, {"max_length": 8}):
        with pytest.raises(ConfigError, match=r"the constraint needs at least [0-9]+ tokens"):
            model.generate("Once upon a time", constraint=long, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the constraint needs at least"):  # the beginning alone is too long
        model.generate("Once", constraint=Regex(" there was a little girl named [A-Z][a-z]+"), max_new_tokens=3)
    context = model.bundle.manifest.architecture.context_length
    with pytest.raises(ConfigError, match="the context has room for 2"):
        model.generate([1] * (context - 1), constraint=long, max_new_tokens=50)


def test_contradictions_are_refused_by_name(model: Model) -> None:
    for options in (
        {"stop_strings": ["x"]},
        {"forced_eos_token_id": 0},
        {"forced_bos_token_id": 5},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    ):
        with pytest.raises(ConfigError, match="constraint"):
            model.generate("Hello", constraint=Regex("a"), **options)
    bundles = GenerationConfig(stop_strings=("x",), forced_eos_token_id=(0,), penalty_alpha=0.5, top_k=4)
    assert bundles.updated({"constraint": Regex("a")}).stop_strings == ()


def test_no_special_token_gets_into_a_text(model: Model) -> None:
    done = model.generate("Hello", constraint=Regex(r"(?s:.){30}"), max_new_tokens=60, eos_token_id=None)
    assert len(done.text) == 30
