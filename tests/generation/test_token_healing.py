"""Token healing through the public API: of the tiny bundle, and of the embedded model."""

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm import Choices, ConfigError, GenerationConfig, Model, PromptError, load
from edgelm.text.token_healing import TokenHealer
from tests.conftest import TINY_BUNDLE, RunCommand

TEXT = 'Once upon a time there was a little girl. She said: "Hello, 今天 is my birthday!" Her mother\'s café opened.'
TINY_TEXT = "The cat sat on the mat. Hello there, über 今天 the end of the things."


@pytest.fixture(scope="module")
def model() -> Model:
    return load(threads=1, device="cpu")


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load(TINY_BUNDLE, threads=1, device="cpu")


def cuts(text: str, count: int) -> list[str]:
    drawn = random.Random(0)
    return [text[:end] for end in sorted(drawn.sample(range(1, len(text) + 1), count))]


def healed_ids(model: Model, prompt: str) -> tuple[list[int], bytes]:
    """The tokens that are left of a prompt, and the bytes that were taken back."""
    ids = model.tokenizer.encode(prompt)
    left = TokenHealer(model.tokenizer).heal(ids, 0, model._encoder.ids_to_continue("")).ids
    spellings = model.tokenizer.spellings()
    whole, kept = (b"".join(spellings[token] for token in tokens) for tokens in (ids, left))
    return left, whole[len(kept) :]


@pytest.mark.parametrize("text", [TINY_TEXT, "Hel", "H", "a b c th"])
def test_greedy_decoding_equals_masking_by_brute_force(tiny: Model, text: str) -> None:
    """At each step the likeliest of all tokens that spell the rest, or a part of it, or go on behind it."""
    spellings = tiny.tokenizer.spellings()
    healed = 0
    for prompt in cuts(text, min(len(text), 25)):
        ids, rest = healed_ids(tiny, prompt)
        healed += bool(rest)
        expected: list[int] = []
        while len(expected) < 8:
            tiny.session.reset()
            logits = tiny.session.step([*ids, *expected])
            if rest:
                fits = [bool(s) and (s.startswith(rest) or rest.startswith(s)) for s in spellings]
                logits = np.where(fits, logits, -np.inf)
            token = int(np.argmax(logits))
            if token in tiny.generation_config.eos_token_id:
                break
            expected.append(token)
            rest = rest[len(spellings[token]) :]
        done = tiny.generate(prompt, token_healing=True, do_sample=False, max_new_tokens=8)
        assert list(done.choices[0].token_ids) == expected, prompt
    assert healed


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"temperature": 1.5, "num_return_sequences": 2},
        {"do_sample": False, "prompt_lookup_num_tokens": 4},
        {"do_sample": False, "context_overflow": "window"},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "logprobs": 1},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("name", ["tiny", "model"])
def test_no_text_is_shown_twice(name: str, options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """With every method and at every cut, the tokens spell the prompt's end and then the text, and the text alone
    is shown."""
    model: Model = request.getfixturevalue(name)
    for prompt in cuts(TINY_TEXT if name == "tiny" else TEXT, 6):
        ids, rest = healed_ids(model, prompt)
        done = model.generate(prompt, token_healing=True, max_new_tokens=12, seed=2, **options)
        assert done.prompt == prompt
        for choice in done.choices:
            spelled = model.tokenizer.decode([*ids, *choice.token_ids], skip_special_tokens=True)
            assert spelled == prompt + choice.text
            new = b"".join(model.tokenizer.spellings()[token] for token in choice.token_ids)
            assert new.startswith(rest)
            assert choice.logprobs is None or len(choice.logprobs) == len(choice.token_ids)


def test_words_that_are_cut_go_on(model: Model) -> None:
    """Without healing the model cannot go on inside a word that it knows as one token."""
    words = {"The dog wen": "t ", "Once upon a ti": "me", "Once upon a time there was a litt": "le "}
    for prompt, begins in words.items():
        healed = model.generate(prompt, token_healing=True, do_sample=False, max_new_tokens=6)
        assert healed.text.startswith(begins)
        assert not model.generate(prompt, do_sample=False, max_new_tokens=6).text.startswith(begins)


def test_a_blank_at_the_end_is_no_double_blank(model: Model) -> None:
    healed = model.generate("Once upon a time there was a ", token_healing=True, do_sample=False, max_new_tokens=8)
    plain = model.generate("Once upon a time there was a", do_sample=False, max_new_tokens=8)
    assert f" {healed.text}" == plain.text
    assert healed.choices[0].token_ids == plain.choices[0].token_ids


def test_a_stream_a_batch_and_a_scheduler_give_what_generate_gives(tiny: Model) -> None:
    prompts = cuts(TINY_TEXT, 10)
    options: dict[str, Any] = {"token_healing": True, "max_new_tokens": 9, "seed": 3, "do_sample": True}
    alone = [tiny.generate(prompt, **options).choices for prompt in prompts]
    for prompt, choices in zip(prompts, alone, strict=True):
        chunks = list(tiny.stream(prompt, **options))
        assert "".join(chunk.text for chunk in chunks) == choices[0].text
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == choices[0].token_ids
    assert [done.choices for done in tiny.generate_batch(prompts, **options)] == alone
    with tiny.scheduler(max_rows=3) as scheduler:
        submitted = [scheduler.submit(prompt, **options) for prompt in prompts]
        assert [submission.completion().choices for submission in submitted] == alone
    assert asyncio.run(tiny.agenerate(prompts[3], **options)).choices == alone[3]


def test_side_by_side_with_other_prompts(tiny: Model) -> None:
    """Only some of the prompts are healed."""
    each: list[Any] = [{}, {"token_healing": True}, {"constraint": Choices(["a", "b"])}]
    together = tiny.generate_batch(["Hello th"] * 3, each=each, max_new_tokens=6, do_sample=False)
    for own, done in zip(each, together, strict=True):
        assert tiny.generate("Hello th", max_new_tokens=6, do_sample=False, **own).choices == done.choices


def test_stop_strings_look_at_the_new_text_alone(model: Model) -> None:
    prompt = "The dog wen"
    free = model.generate(prompt, token_healing=True, do_sample=False, max_new_tokens=8).text
    stopped = model.generate(prompt, token_healing=True, do_sample=False, max_new_tokens=8, stop_strings=["wen"])
    assert stopped.text == free and free.startswith("t to")
    stopped = model.generate(prompt, token_healing=True, do_sample=False, max_new_tokens=8, stop_strings=[" to"])
    assert (stopped.text, stopped.choices[0].finish_reason) == ("t", "stop")


def test_lengths_count_the_tokens_that_spell_the_prompts_end(model: Model) -> None:
    prompt = "Once upon a time there was a litt"
    for limit in (0, 1, 2, 5):
        done = model.generate(prompt, token_healing=True, do_sample=False, max_new_tokens=limit)
        assert len(done.choices[0].token_ids) == done.stats.new_tokens == limit
        assert done.choices[0].finish_reason == "length"
    assert model.generate(prompt, token_healing=True, do_sample=False, max_new_tokens=1).text == "le"
    kept = len(healed_ids(model, prompt)[0])
    done = model.generate(prompt, token_healing=True, do_sample=False, max_length=kept + 3)
    assert (done.stats.prompt_tokens, done.stats.new_tokens) == (kept, 3)


def test_a_text_that_is_cut_before_the_end_is_spelled_is_empty(tiny: Model) -> None:
    """With one token for "今" of three bytes: nothing is new yet, and nothing is shown."""
    spellings = tiny.tokenizer.spellings()
    prompt = "Hello th"
    assert healed_ids(tiny, prompt)[1] == b" th"
    one_byte = [token for token, spelling in enumerate(spellings) if len(spelling) > 1]
    done = tiny.generate(prompt, token_healing=True, max_new_tokens=2, do_sample=False, suppress_tokens=one_byte)
    assert (done.text, len(done.choices[0].token_ids)) == ("", 2)


def test_behind_a_prefix(tiny: Model, tmp_path: Path) -> None:
    """The prefix's tokens stay, those that cross its end do not; results are those of one text."""
    tiny.save_prefix(tmp_path / "a.prefix", "The cat sat on th")
    behind = load(TINY_BUNDLE, prefix=tmp_path / "a.prefix", threads=1, device="cpu")
    for prompt in ("e", "e mat. Hello th", " mat "):
        whole = tiny.generate(f"The cat sat on th{prompt}", token_healing=True, do_sample=False, max_new_tokens=6)
        assert behind.generate(prompt, token_healing=True, do_sample=False, max_new_tokens=6).choices == whole.choices
    done = behind.generate("", token_healing=True, do_sample=False, max_new_tokens=6)
    new = b"".join(tiny.tokenizer.spellings()[token] for token in done.choices[0].token_ids)
    assert f"The cat sat on th{done.text}".endswith(new.decode(errors="replace"))


def test_truncated_prompts(tiny: Model) -> None:
    prompt = "The cat sat on the mat. " * 20 + "Hello th"
    done = tiny.generate(prompt, token_healing=True, context_overflow="truncate", max_new_tokens=6, do_sample=False)
    assert done.stats.dropped_tokens > 0
    new = b"".join(tiny.tokenizer.spellings()[token] for token in done.choices[0].token_ids)
    assert new.startswith(b" th") and new[3:].decode(errors="replace") == done.text


def test_an_empty_prompt_has_nothing_to_take_back(tiny: Model) -> None:
    healed = tiny.generate("", token_healing=True, do_sample=False, max_new_tokens=5)
    assert healed.choices == tiny.generate("", do_sample=False, max_new_tokens=5).choices


def test_what_cannot_be_healed_is_refused_by_name(tiny: Model) -> None:
    with pytest.raises(PromptError, match="token_healing needs the prompt as a text"):
        tiny.generate([1, 2, 3], token_healing=True)
    for options in (
        {"constraint": Choices(["a"])},
        {"forced_bos_token_id": 5},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    ):
        with pytest.raises(ConfigError, match="token_healing"):
            tiny.generate("Hello", token_healing=True, **options)
    with pytest.raises(ConfigError, match=r"no token is left to choose: .* \(or token_healing\) allows here"):
        tiny.generate("Hello th", token_healing=True, suppress_tokens=list(range(tiny.tokenizer.vocab_size - 1)))
    bundles = GenerationConfig(penalty_alpha=0.5, top_k=4)
    assert bundles.updated({"token_healing": True}).penalty_alpha is None
    assert not GenerationConfig(token_healing=True).updated({"constraint": Choices(["a"])}).token_healing


def test_the_command_prints_prompt_and_text_and_nothing_twice(edgelm_command: RunCommand, model: Model) -> None:
    for prompt in ("The dog wen", "Once upon a time there was a "):
        text = model.generate(prompt, token_healing=True, do_sample=False, max_new_tokens=6).text
        done = edgelm_command("run", "--greedy", "-n", "6", "--token-healing", prompt)
        assert (done.status, done.stdout, done.stderr) == (0, f"{prompt}{text}\n", "")
    done = edgelm_command("run", "--greedy", "-n", "6", "The dog ")
    assert done.stderr.endswith("leave it out, or give --token-healing\n")
    done = edgelm_command("chat", "--token-healing")
    assert done.status == 2 and "No such option" in done.stderr
