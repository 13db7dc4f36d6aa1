"""Decoding methods through the public API, on the tiny bundle: text, reasons and stats."""

import numpy as np
import numpy.typing as npt
import pytest

from edgelm import ConfigError, Model, load
from tests.conftest import TINY_BUNDLE, RunCommand

Row = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(TINY_BUNDLE, device="cpu", threads=1)


def test_beams_come_with_text_and_honest_stats(model: Model) -> None:
    """50 calls of decoding take longer than one call for the prompt, even on a busy machine."""
    model.generate("Hello", max_new_tokens=2)  # the first call of a model also allocates
    completion = model.generate("Hello", num_beams=4, num_return_sequences=3, max_new_tokens=50, eos_token_id=None)
    assert len({choice.token_ids for choice in completion.choices}) == 3
    assert all(choice.finish_reason == "length" and len(choice.token_ids) == 50 for choice in completion.choices)
    assert completion.stats.new_tokens == 150
    assert 0 < completion.stats.prefill_seconds < completion.stats.decode_seconds
    assert completion.stats.tokens_per_second == pytest.approx(150 / completion.stats.decode_seconds)
    assert completion.seed is None


def test_a_stream_of_beams_is_what_generate_returns(model: Model) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
    chunks = list(model.stream("Hello", **options))  # type: ignore[arg-type]
    whole = model.generate("Hello", **options)  # type: ignore[arg-type]
    for index, choice in enumerate(whole.choices):
        assert "".join(chunk.text for chunk in chunks if chunk.index == index) == choice.text


def test_beams_end_at_stop_strings(model: Model) -> None:
    stops = list("aeinst ")
    choices = model.generate(
        "Hello", num_beams=4, num_return_sequences=4, max_new_tokens=25, stop_strings=stops
    ).choices
    assert any(choice.finish_reason == "stop" for choice in choices)
    assert not any(stop in choice.text for stop in stops for choice in choices)


def test_groups_and_contrastive_search(model: Model) -> None:
    groups = model.generate("Hello", num_beams=4, num_beam_groups=2, diversity_penalty=2.0, max_new_tokens=6)
    assert len(groups.choices) == 1
    contrastive = model.generate("Hello", penalty_alpha=0.6, top_k=4, max_new_tokens=6)
    assert contrastive.text != model.generate("Hello", max_new_tokens=6, do_sample=False).text
    assert contrastive.stats.new_tokens == 6


def test_beams_leave_the_model_as_it_was(model: Model) -> None:
    choices = model.generate("Hello", max_new_tokens=8).choices
    model.generate("Hello there", num_beams=5, max_new_tokens=12)
    model.generate("Hello there", penalty_alpha=0.5, top_k=5, max_new_tokens=12)
    assert model.generate("Hello", max_new_tokens=8).choices == choices


def test_a_callers_own_processor(model: Model) -> None:
    banned = set(model.generate("Hello", max_new_tokens=12).choices[0].token_ids)

    def refuse(ids: npt.NDArray[np.int64], logits: Row) -> Row:
        logits[sorted(banned)] = -np.inf
        return logits

    assert not banned & set(model.generate("Hello", max_new_tokens=12, logits_processor=refuse).choices[0].token_ids)


def test_dry_breakers_are_texts_of_this_vocabulary(model: Model) -> None:
    loop = model.generate("Hello", max_new_tokens=40).choices[0].token_ids
    dry = model.generate("Hello", max_new_tokens=40, dry_multiplier=2.0, dry_allowed_length=1).choices[0].token_ids
    assert len(set(dry)) > len(set(loop))
    everywhere = [model.tokenizer.decode([token]) for token in set(loop)]
    breakers = [text for text in everywhere if "\ufffd" not in text] + sorted(set(loop))
    broken = model.generate("Hello", max_new_tokens=40, dry_multiplier=2.0, dry_sequence_breakers=breakers)
    assert broken.choices[0].token_ids == loop


def test_max_time_returns_the_tokens_so_far(model: Model) -> None:
    (choice,) = model.generate("Hello", max_time=1e-9, max_new_tokens=40).choices
    assert choice.finish_reason == "time"
    assert len(choice.token_ids) == 1


def test_tokens_outside_the_vocabulary_are_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match="suppress_tokens: token 300 is out of range, this model knows 0 to 299"):
        model.generate("Hello", suppress_tokens=[300])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--logit-bias", "x=1"], "Invalid value for '--logit-bias': token ids go like 11 or 11,42"),
        (["--logit-bias", "1,2=1"], "Invalid value for '--logit-bias': one token each, like 11=-3.5"),
        (["--sequence-bias", "1,2"], "Invalid value for '--sequence-bias': a bias goes like 11=-3.5"),
        (["--bad-words-ids", "a"], "Invalid value for '--bad-words-ids': token ids go like 11 or 11,42"),
        (["--num-beams", "2", "--num-return-sequences", "3"], "num_return_sequences is 3 but num_beams only 2"),
        (["--greedy", "--typical-p", "0.5"], "typical_p needs sampling, but do_sample is False"),
    ],
)
def test_wrong_flags_are_one_line(edgelm_command: RunCommand, flags: list[str], message: str) -> None:
    result = edgelm_command("run", "-m", str(TINY_BUNDLE), "Hello", *flags)
    assert result.status == 2
    assert message in result.one_line()


def test_flags_reach_the_model(edgelm_command: RunCommand, model: Model) -> None:
    flags = ["--num-beams", "3", "--early-stopping", "never", "--bad-words-ids", "5,6", "--suppress-tokens", "7,8"]
    flags += ["--sequence-bias", "9,10=-2", "--exponential-decay-length-penalty", "2", "1.1", "--renormalize-logits"]
    result = edgelm_command("run", "-m", str(TINY_BUNDLE), "--no-echo", "Hello", "-n", "9", *flags)
    completion = model.generate(
        "Hello",
        max_new_tokens=9,
        num_beams=3,
        early_stopping="never",
        bad_words_ids=[[5, 6]],
        suppress_tokens=[7, 8],
        sequence_bias={(9, 10): -2.0},
        exponential_decay_length_penalty=(2, 1.1),
        renormalize_logits=True,
    )
    assert result.stdout == completion.text + "\n"
