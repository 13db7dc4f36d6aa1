"""Scores of ids with a fake session and by hand, and of texts with the tiny bundle."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgelm
from edgelm import ConfigError, ContextError, Model, PromptError
from edgelm.bundle.folder import file_fact
from edgelm.reuse.prefix import PromptEncoder
from edgelm.scoring import token_scores as scoring_module
from edgelm.scoring.text_scores import split
from edgelm.scoring.token_scores import continuation_logprobs, embed, option_scores, perplexity
from tests.conftest import TINY_BUNDLE, FakeSession, edit_manifest

VOCABULARY = 7
ROWS = np.random.default_rng(0).normal(scale=2, size=(VOCABULARY, VOCABULARY)).astype(np.float32)
EXPECTED = ROWS - np.log(np.exp(ROWS.astype(np.float64)).sum(axis=1, keepdims=True))  # (V, V), next token given token
HIDDEN = np.random.default_rng(1).normal(size=(VOCABULARY, 3)).astype(np.float32)


@dataclass
class ScoringFake(FakeSession):
    """A fake that also returns all logits and hidden states; `computed` has the number of tokens of each call."""

    computed: list[int] = field(default_factory=list)

    def step(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        self.computed.append(len(ids))
        return super().step(list(ids))

    def score(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        self.step(ids)
        return self.rows[list(ids)]

    def step_hidden(
        self, ids: Sequence[int] | npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        return self.step(ids), HIDDEN[list(ids)]


class Silent(ScoringFake):
    """A fake whose hidden states are zeros."""

    def step_hidden(
        self, ids: Sequence[int] | npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        return self.step(ids), np.zeros((len(ids), 3), np.float32)


@pytest.fixture
def fake() -> ScoringFake:
    return ScoringFake(ROWS, context_length=8)


@pytest.fixture(scope="module")
def model() -> Model:
    return edgelm.load(TINY_BUNDLE, device="cpu", threads=1)


# Ids


def test_the_prompt_is_computed_once_and_rewound_to(fake: ScoringFake) -> None:
    result = continuation_logprobs(fake, [1, 2, 3], [[4], [5, 6], [4, 4, 0, 1, 2, 3]])
    assert fake.computed == [3, 1, 5]  # one token needs nothing more; the last token of each is not fed
    for logprobs, ids in zip(result, [[4], [5, 6], [4, 4, 0, 1, 2, 3]], strict=True):
        np.testing.assert_allclose(logprobs, EXPECTED[[3, *ids[:-1]], ids], atol=1e-6)


def test_long_continuations_are_scored_in_slices(fake: ScoringFake, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = continuation_logprobs(fake, [1], [[2, 3, 4, 5, 6, 0]])
    fake.reset()
    monkeypatch.setattr(scoring_module, "_LOGITS_ROWS", 2)
    fake.computed.clear()
    sliced = continuation_logprobs(fake, [1], [[2, 3, 4, 5, 6, 0]])
    assert fake.computed == [1, 2, 2, 1]
    assert np.array_equal(whole[0], sliced[0])


def test_what_does_not_fit_is_refused_before_it_is_tried(fake: ScoringFake) -> None:
    assert len(continuation_logprobs(fake, [1] * 4, [[2] * 5])[0]) == 5
    fake.reset()
    fake.computed.clear()
    with pytest.raises(ContextError, match="have 10 tokens, but this model, with a context of 8, scores 9 at most"):
        continuation_logprobs(fake, [1] * 4, [[2], [2] * 6])
    assert not fake.computed


def test_option_scores_by_hand() -> None:
    scores, probabilities = option_scores([math.log(0.3), math.log(0.1)], None, None)
    assert scores == pytest.approx([math.log(0.3), math.log(0.1)])
    assert probabilities == pytest.approx([0.75, 0.25])
    scores, probabilities = option_scores([-2.0, -3.0], None, [2, 3])
    assert scores == [-1, -1] and probabilities == pytest.approx([0.5, 0.5])
    scores, _ = option_scores([-2.0, -3.0], [-1.0, -5.0], None)
    assert scores == [-1, 2]
    scores, _ = option_scores([-2.0, -3.0], [-1.0, -5.0], [1, 4])
    assert scores == [-1, 0.5]
    assert option_scores([-1e6, -2e6], None, None)[1] == [1, 0]


def recipe(ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """The recipe "Perplexity of fixed-length models" of transformers, for a model that sees one token back."""
    nats, tokens, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        new = end - previous_end
        labels = [-100] * (end - begin - new) + ids[end - new : end]
        losses = [-EXPECTED[ids[begin + i], label] for i, label in enumerate(labels[1:]) if label != -100]
        if new > 1:  # the recipe has 0 * NaN, or counts nothing, here
            nats += float(np.mean(losses)) * (new - 1)
            tokens += new - 1
        previous_end = end
        if end == len(ids):
            break
    return math.exp(nats / tokens), tokens


@pytest.mark.parametrize("stride", [2, 3, 5, 7, 8])
@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 16, 17, 29])
def test_perplexity_is_the_recipes(fake: ScoringFake, length: int, stride: int) -> None:
    ids = np.random.default_rng(length).integers(0, VOCABULARY, length).tolist()
    result = perplexity(fake, ids, stride)
    value, tokens = recipe(ids, 8, stride)
    assert float(result) == pytest.approx(value, rel=1e-6)
    assert result.tokens == tokens


def test_the_stride_is_half_the_context_by_default(fake: ScoringFake) -> None:
    ids = [1, 2, 3, 4, 5, 6] * 5
    assert perplexity(fake, ids) == perplexity(fake, ids, 4)


@pytest.mark.parametrize("stride", [0, 1, -1, 9, 1.5, True, "4"])
def test_strides_are_checked(fake: ScoringFake, stride: Any) -> None:
    with pytest.raises(ConfigError, match="stride must be a whole number from 2 to 8, this model's context, got"):
        perplexity(fake, [1, 2, 3], stride)


def test_pooling_by_hand(fake: ScoringFake) -> None:
    np.testing.assert_allclose(embed(fake, [1, 2, 4]), HIDDEN[[1, 2, 4]].mean(axis=0), rtol=1e-6)
    fake.reset()
    assert np.array_equal(embed(fake, [1, 2, 4], "last"), HIDDEN[4])
    fake.reset()
    unit = embed(fake, [1, 2, 4], "last", normalize=True)
    np.testing.assert_allclose(unit, HIDDEN[4] / np.linalg.norm(HIDDEN[4]), rtol=1e-6)
    assert unit.dtype == np.float32
    fake.reset()
    assert embed(Silent(ROWS), [1, 2], normalize=True).tolist() == [0, 0, 0]  # a vector of zeros has no direction
    with pytest.raises(ConfigError, match="pooling must be 'mean' or 'last', got 'max'"):
        embed(fake, [1], "max")  # type: ignore[arg-type]
    with pytest.raises(ContextError, match="the text has 9 tokens, but this model's context holds 8"):
        embed(fake, [1] * 9)


# Texts


@pytest.mark.parametrize(("prompt", "continuation"), [("The cat", " sat"), ("The cat ", "sat")])
def test_a_space_belongs_to_either_side(model: Model, prompt: str, continuation: str) -> None:
    result = model.score(prompt, continuation)
    assert result == model.score("The cat", " sat")
    assert "".join(token.text for token in result.tokens) == " sat"
    assert float(result) == result.logprob == pytest.approx(sum(token.logprob for token in result.tokens))


def test_a_token_over_the_border_is_scored_whole(model: Model) -> None:
    prompt_ids, (after,) = split(PromptEncoder(model.tokenizer), "The c", ["at"])
    assert [*prompt_ids, *after] == model.tokenizer.encode("The cat")
    assert model.tokenizer.decode(after) == " cat"
    # Of several options every one is scored from the same place on.
    prompt_ids, (first, second) = split(PromptEncoder(model.tokenizer), "The c", ["at", "zz"])
    assert model.tokenizer.decode(prompt_ids) == "The"
    assert [model.tokenizer.decode(first), model.tokenizer.decode(second)] == [" cat", " czz"]


@given(st.text(min_size=1), st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_parts_make_up_the_whole_text(model: Model, prompt: str, continuations: list[str]) -> None:
    try:
        prompt_ids, after = split(PromptEncoder(model.tokenizer), prompt, continuations)
    except PromptError as error:
        assert "melts into" in str(error) or "surrogate" in str(error)
        return
    assert prompt_ids == model.tokenizer.encode(prompt)[: len(prompt_ids)] and prompt_ids
    for continuation, ids in zip(continuations, after, strict=True):
        assert ids and prompt_ids + ids == model.tokenizer.encode(prompt + continuation)


def test_ids_are_joined_as_they_are(model: Model) -> None:
    encode = model.tokenizer.encode
    assert split(PromptEncoder(model.tokenizer), encode("The c"), [encode("at")]) == (encode("The c"), [encode("at")])
    assert split(PromptEncoder(model.tokenizer), "The c", [encode("at")]) == (encode("The c"), [encode("at")])
    assert model.score(encode("The"), encode(" cat")) == model.score("The", " cat")
    assert model.score([1] * 60, [2] * 5).logprob < 0
    selection = model.choose([1, 2], [[3], [4, 5]])
    assert [option.text for option in selection.options] == [
        model.tokenizer.decode([3]),
        model.tokenizer.decode([4, 5]),
    ]


@pytest.fixture(scope="module")
def model_with_bos(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny bundle with a tokenizer that puts token 0 in front of every text."""
    bundle = Path(shutil.copytree(TINY_BUNDLE, tmp_path_factory.mktemp("bos") / "tiny"))
    path = bundle / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    token = content["added_tokens"][0]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token["content"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            token["content"]: {"id": token["content"], "ids": [token["id"]], "tokens": [token["content"]]}
        },
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    fact = file_fact(path)
    edit_manifest(
        bundle, lambda m: m["files"].update({path.name: {"size_bytes": fact.size_bytes, "sha256": fact.sha256}})
    )
    return edgelm.load(bundle, device="cpu", threads=1)


def test_only_the_beginning_of_a_text_gets_a_bos(model: Model, model_with_bos: Model) -> None:
    encode, encoder = model.tokenizer.encode, PromptEncoder(model_with_bos.tokenizer)
    bos, *rest = model_with_bos.tokenizer.encode("The")
    assert rest == encode("The")
    the, cat, sat = encode("The"), encode(" cat"), encode(" sat")
    assert split(encoder, "The", [" cat"]) == ([bos, *the], [cat])
    assert split(encoder, the, [" cat"]) == (the, [cat])  # ids stay as they are given
    assert split(encoder, "The", [" cat", sat]) == ([bos, *the], [cat, sat])
    assert model_with_bos.score([bos, *the], " cat") == model_with_bos.score("The", " cat")
    assert model_with_bos.score(the, " cat") == model.score(the, " cat")
    of_ids = model_with_bos.choose([bos, *the], [" cat", " sat"], calibrate=[bos, *encode("and the")])
    assert of_ids == model_with_bos.choose("The", [" cat", " sat"], calibrate="and the")
    assert [option.tokens for option in of_ids.options] == [len(cat), len(sat)]
    mixed = model_with_bos.choose("The", [" cat", sat], calibrate="and the")
    assert mixed.options == of_ids.options


def test_scores_are_those_of_one_pass(model: Model) -> None:
    ids = model.tokenizer.encode("The cat sat on the mat and the dog ran to the house")
    model.session.reset()
    logits = model.session.score(ids).astype(np.float64)
    expected = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]
    for cut in range(1, len(ids)):
        result = [token.logprob for token in model.score(ids[:cut], ids[cut:]).tokens]
        np.testing.assert_allclose(result, expected[cut - 1 :], atol=1e-4)
    whole = model.perplexity(ids, stride=64)
    assert whole.value == pytest.approx(math.exp(-expected.mean()), rel=1e-4) and whole.tokens == len(ids) - 1


def test_choose(model: Model) -> None:
    options = [" mat", " sat on the mat", " house", "☕"]
    result = model.choose("The cat sat on the", options)
    for option, text in zip(result.options, options, strict=True):
        single = model.score("The cat sat on the", text)
        assert (option.text, option.tokens) == (text, len(single.tokens))
        assert option.logprob == option.score == pytest.approx(single.logprob, abs=1e-5)
    assert sum(option.probability for option in result.options) == pytest.approx(1)
    weights = np.exp([option.logprob for option in result.options])
    assert [option.probability for option in result.options] == pytest.approx(list(weights / weights.sum()))
    assert result.best == result.options[result.index] == max(result.options, key=lambda option: option.score)
    assert str(result) == options[result.index]
    by_token = model.choose("The cat sat on the", options, length_normalization="token")
    by_character = model.choose("The cat sat on the", options, length_normalization="character")
    for option, token, character in zip(result.options, by_token.options, by_character.options, strict=True):
        assert token.score == pytest.approx(option.logprob / option.tokens)
        assert character.score == pytest.approx(option.logprob / len(option.text))


def test_calibration_subtracts_what_the_option_is_worth_anyway(model: Model) -> None:
    options = [" mat", " house"]
    result = model.choose("The cat sat on the", options, calibrate="and the")
    for option in result.options:
        alone = model.score("and the", option.text)
        assert option.score == pytest.approx(option.logprob - alone.logprob, abs=1e-5)
    same = model.choose("and the", options, calibrate="and the")
    assert [option.probability for option in same.options] == pytest.approx([0.5, 0.5])


def test_an_options_score_does_not_depend_on_its_neighbours(model: Model) -> None:
    one = model.choose("The cat", [" sat", " ran", " is here"]).options[2]
    other = model.choose("The cat", [" is here", " and the dog and the cat and the end"]).options[0]
    assert one.logprob == other.logprob


def test_embeddings(model: Model) -> None:
    vector = model.embed("The cat sat")
    assert vector.shape == (32,) and vector.dtype == np.float32
    model.session.reset()
    hidden = model.session.step_hidden(model.tokenizer.encode("The cat sat"))[1]
    np.testing.assert_allclose(vector, hidden.mean(axis=0), atol=1e-6)
    assert np.array_equal(model.embed("The cat sat", pooling="last"), hidden[-1])
    assert np.linalg.norm(model.embed("a", normalize=True)) == pytest.approx(1)


def test_the_callers_session_is_left_alone(model: Model) -> None:
    model.session.reset()
    model.session.step([1, 2])
    model.score("a", "b")
    model.choose("a", ["b", "c"])
    model.perplexity("a b c")
    model.embed("a")
    assert model.session.position == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.score("", "x"), PromptError, "the prompt is empty"),
        (lambda m: m.score("x", ""), PromptError, "the continuation is empty"),
        (lambda m: m.score("x", None), PromptError, "the continuation must be a text or a list of token ids, got None"),
        (lambda m: m.score([1], [300]), PromptError, "token id 300 is out of range"),
        (lambda m: m.score("ca", "t"), PromptError, "the prompt 'ca' melts into the continuation"),
        (lambda m: m.score([1] * 60, [1] * 6), ContextError, "have 66 tokens, but this model, with a context of 64"),
        (lambda m: m.choose("x", []), PromptError, "at least two options"),
        (lambda m: m.choose("x", ["a"]), PromptError, "at least two options"),
        (lambda m: m.choose("x", "ab"), PromptError, "at least two options"),
        (lambda m: m.choose("x", ["a", ""]), PromptError, "the continuation is empty"),
        (lambda m: m.choose("x", ["a", "b", "a"]), PromptError, "the option 'a' is given twice"),
        (
            lambda m: m.choose("x", ["a", "b"], length_normalization="word"),
            ConfigError,
            "'none', 'token' or 'character'",
        ),
        (lambda m: m.choose("x", ["a", "b"], calibrate=""), PromptError, "the prompt is empty"),
        (lambda m: m.perplexity(""), PromptError, "the text is empty"),
        (lambda m: m.perplexity([1]), PromptError, "the text has 1 token, and a perplexity needs 2 at least"),
        (lambda m: m.perplexity("abc", stride=65), ConfigError, "stride must be a whole number from 2 to 64"),
        (lambda m: m.embed(""), PromptError, "the text is empty"),
        (lambda m: m.embed([1] * 65), ContextError, "the text has 65 tokens, but this model's context holds 64"),
    ],
)
def test_bad_input_is_one_sentence(
    model: Model, call: Callable[[Model], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_perplexity_takes_texts_of_any_length(model: Model) -> None:
    assert model.perplexity("The cat sat on the mat. " * 60).tokens > 64
