"""Explanations: the arithmetic with hand-made pieces, and the whole with the tiny bundle and by hand in numpy."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import edgelm
from edgelm import BundleError, ClosedError, ConfigError, ContextError, DeviceError, Model, PromptError
from edgelm.bundle.onnx_file import Place, read_onnx
from edgelm.engine.device import Device
from edgelm.engine.limits import Room
from edgelm.errors import InsufficientMemoryError
from edgelm.ids import Attention, Logits
from edgelm.reuse.prefix import write_learned_prefix
from edgelm.scoring.explanation import Explanation, attention_bytes, joined, predicted
from tests.build_side import Report
from tests.conftest import TINY_BUNDLE, counting_rows, edit_manifest

TEXT = "The cat sat on the mat."


def loaded(bundle: Path | None = TINY_BUNDLE, **options: Any) -> Model:
    return edgelm.load(bundle, device="cpu", threads=1, **options)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with loaded() as model:
        yield model


VOCABULARY = 9


def logits_of(ids: Sequence[int], piece: int) -> Iterator[Logits]:
    """Logits after each of `ids`, `piece` rows at a time, under which the likeliest token after t is t + 1."""
    rows = counting_rows(VOCABULARY)
    return (rows[list(ids[start : start + piece])] for start in range(0, len(ids), piece))


def shares_of(places: Sequence[int], columns: int) -> Attention:
    """Shares of two layers and one head that say where they belong: 100 t + j of layer 0, and 1,000 more of layer 1."""
    shares = np.zeros((2, 1, len(places), columns), np.float32)
    for row, place in enumerate(places):
        shares[0, 0, row, : place + 1] = 100 * place + np.arange(place + 1)
        shares[1, 0, row, : place + 1] = shares[0, 0, row, : place + 1] + 1000
    return shares


def shares_in_pieces(first: int, count: int, piece: int) -> Iterator[Attention]:
    """The shares of `count` tokens from the place `first` on, `piece` of them at a time."""
    for start in range(first, first + count, piece):
        stop = min(start + piece, first + count)
        yield shares_of(range(start, stop), stop)


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
def test_predictions(piece: int) -> None:
    ids = [3, 4, 5, 1, 2]
    likely = 10 - math.log(math.exp(10) + 8)  # one logit is 10, the eight others are 0
    unlikely = likely - 10
    first, *predictions = predicted(logits_of(ids, piece), ids, 5, 2)
    assert first is None  # nothing stands before the first token
    for prediction, expected in zip(
        predictions,
        [
            [(4, likely), (4, likely), (0, unlikely)],  # 4 after 3; of equally likely tokens the lower id comes first
            [(5, likely), (5, likely), (0, unlikely)],
            [(1, unlikely), (6, likely), (0, unlikely)],  # 6 would have come after 5
            [(2, likely), (2, likely), (0, unlikely)],
            [(3, likely), (3, likely), (0, unlikely)],  # what comes next
        ],
        strict=True,
    ):
        assert prediction is not None
        assert [token for token, _ in prediction] == [token for token, _ in expected]
        assert [logprob for _, logprob in prediction] == pytest.approx([logprob for _, logprob in expected], abs=1e-9)


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
@pytest.mark.parametrize("before", [1, 3])
def test_the_token_before_the_text_predicts_its_first_one(piece: int, before: int) -> None:
    ids = [3, 4, 5, 6, 7][-before - 2 :]
    predictions = predicted(logits_of(ids, piece), ids, 2, 1)
    assert [one[0][0] for one in predictions if one is not None] == [6, 7, 8]
    assert all(one is not None and one[0] == one[1] for one in predictions), "each was the likeliest one"


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("cached", [0, 2])
def test_pieces_of_attention_make_one(piece: int, before: int, cached: int) -> None:
    """`cached` tokens are in the cache, `before` more are read in front of the text of four tokens."""
    everything = cached + before + 4
    found = joined(shares_in_pieces(cached, before + 4, piece), before, 4, everything)
    assert found.dtype == np.float32
    assert np.array_equal(found, shares_of(range(cached + before, everything), everything))


def stored(bundle: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The float tensors of a bundle's graph."""
    weights = (bundle / "model.onnx.data").read_bytes()
    found = {}
    for tensor in read_onnx((bundle / "model.onnx").read_bytes()).tensors:
        content = tensor.content
        raw = weights[content.offset : content.offset + content.length] if isinstance(content, Place) else content
        if tensor.dtype == "float32":
            found[tensor.name] = np.frombuffer(raw, np.float32).reshape(tensor.shape)
    return found


def test_the_first_layer_by_hand(model: Model) -> None:
    """Embeddings, LayerNorm, queries and keys, softmax: in float64, of the weights in the tiny bundle."""
    ids = model.tokenizer.encode(TEXT)
    weights = {name: array.astype(np.float64) for name, array in stored(TINY_BUNDLE).items()}
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][: len(ids)]
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    x = x * weights["h.0.attn_norm.weight"] + weights["h.0.attn_norm.bias"]
    qkv = x @ weights["transformer.h.0.attn.c_attn.weight"] + weights["h.0.qkv.bias"]  # (T, 96)
    query, key = (qkv[:, at : at + 32].reshape(-1, 4, 8).transpose(1, 0, 2) for at in (0, 32))  # (4, T, 8)
    scores = np.where(np.tri(len(ids), dtype=bool), query @ key.transpose(0, 2, 1) / math.sqrt(8), -np.inf)
    expected = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected /= expected.sum(axis=-1, keepdims=True)
    assert np.abs(model.explain(TEXT).attentions[0] - expected).max() <= 1e-6


def test_an_explanation(model: Model) -> None:
    found = model.explain(TEXT, top=3)
    ids = model.tokenizer.encode(TEXT)
    assert [token.token_id for token in found.tokens] == ids
    assert "".join(token.text for token in found.tokens) == TEXT
    first, *others = found.tokens
    assert (first.logprob, first.top) == (None, ())
    for token, expected in zip(others, model.token_logprobs(TEXT, top=3), strict=True):
        assert token.logprob == expected.logprob
        assert [one.token_id for one in token.top] == [one.token_id for one in expected.top]
    assert found.perplexity == pytest.approx(model.perplexity(TEXT).value, rel=1e-5)
    logits = model.graph.session().step(ids).astype(np.float64)
    likeliest = np.argsort(-logits)[:3]
    assert [one.token_id for one in found.following] == likeliest.tolist()
    assert found.following[0].logprob == pytest.approx(float(logits.max() - np.log(np.exp(logits).sum())), abs=1e-5)
    assert_shares(found, 2, 4)


def assert_shares(found: Explanation, layers: int, heads: int) -> None:
    tokens, before = len(found.tokens), found.prefix_tokens
    assert found.attentions.shape == (layers, heads, tokens, before + tokens)
    assert found.attentions.dtype == np.float32
    assert np.abs(found.attentions.sum(axis=-1) - 1).max() <= 1e-5
    assert not np.triu(found.attentions, before + 1).any(), "a token looks ahead"


def test_a_token_alone(model: Model) -> None:
    found = model.explain([7])
    assert (len(found.tokens), found.perplexity, len(found.following)) == (1, None, 5)
    assert found.attentions.tolist() == [[[[1.0]]] * 4] * 2


def test_ids_and_a_full_context(model: Model) -> None:
    ids = np.random.default_rng(0).integers(0, 300, 64).tolist()
    found = model.explain(ids, top=0)
    assert [token.token_id for token in found.tokens] == ids
    assert found.following == () and all(token.top == () for token in found.tokens)
    assert_shares(found, 2, 4)
    assert np.abs(found.attentions[:, :, :20, :20] - model.explain(ids[:20]).attentions).max() <= 1e-6


def test_a_text_of_several_pieces() -> None:
    """The embedded model reads 256 tokens at a time."""
    with loaded(None) as model:
        ids = np.random.default_rng(0).integers(0, 4096, 512).tolist()
        found = model.explain(ids)
        assert_shares(found, 6, 4)
        expected = [token.logprob for token in model.token_logprobs(ids)]
        assert [token.logprob for token in found.tokens[1:]] == expected, "other commands say the same, to the last bit"


def test_a_text_as_a_prefix(model: Model, tmp_path: Path) -> None:
    """A baked text changes nothing but where the explanation begins; its first token has a probability too."""
    begin, end = "The cat sat", " on the mat."
    whole = model.explain(begin + end)
    model.save_prefix(tmp_path / "text.prefix", begin)
    with loaded(prefix=tmp_path / "text.prefix") as behind:
        found = behind.explain(end)
        alike = behind.token_logprobs(end)
    before = len(model.tokenizer.encode(begin))
    assert [token.logprob for token in alike] == [token.logprob for token in found.tokens]
    assert found.prefix_tokens == before
    assert_shares(found, 2, 4)
    assert np.abs(found.attentions - whole.attentions[:, :, before:]).max() <= 1e-6
    assert [token.logprob for token in found.tokens] == pytest.approx(
        [token.logprob for token in whole.tokens[before:]], abs=1e-5
    )
    assert [token.top[0].token_id for token in found.tokens] == [t.top[0].token_id for t in whole.tokens[before:]]


def test_a_learned_prefix(model: Model, tiny_copy: Path, tmp_path: Path) -> None:
    """Keys and values of a text, said to be learned: nothing predicts the first token."""
    begin, end = "The cat sat", " on the mat."
    model.save_prefix(tmp_path / "text.prefix", begin)
    with loaded(prefix=tmp_path / "text.prefix") as baked:
        assert baked.prefix is not None
        content = baked.prefix.content
        expected = baked.explain(end)
    edit_manifest(tiny_copy, lambda m: m["source"].update(body_sha256="ab" * 32))
    write_learned_prefix(tmp_path / "l.prefix", content, source="tiny-gpt2", body_sha256="ab" * 32)
    with loaded(tiny_copy, prefix=tmp_path / "l.prefix") as behind:
        found = behind.explain(end)
        assert found.prefix_tokens == content.shape[2]
        assert np.abs(found.attentions - expected.attentions).max() <= 1e-6
        assert found.tokens[0].logprob is None
        room = 64 - content.shape[2]
        with pytest.raises(
            ContextError, match=rf"{room + 1} tokens behind a prefix of {content.shape[2]}, but .* context holds 64"
        ):
            behind.explain([5] * (room + 1))
        assert len(behind.explain([5] * room).tokens) == room


@pytest.mark.parametrize(
    "text, top, kind, words",
    [
        ("", 5, PromptError, "the text is empty"),
        ([300], 5, PromptError, "token id 300 is out of range"),
        ([1] * 65, 5, ContextError, "the text has 65 tokens, but this model's context holds 64: shorten the text"),
        ("a", -1, ConfigError, "top must be a whole number from 0 to 1024, got -1"),
        ("a", True, ConfigError, "top must be"),
    ],
)
def test_what_is_refused(model: Model, text: Any, top: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        model.explain(text, top=top)


def test_a_limit_of_memory_names_the_sizes(model: Model) -> None:
    facts = model.bundle.manifest.architecture
    assert attention_bytes(facts, 50, 60) == 2 * 4 * 50 * 60 * 4
    with pytest.raises(
        PromptError, match=r"50 tokens in 2 layers of 4 heads takes 0 MB, more than 0 MB: explain a sho"
    ):
        model.explain([1] * 50, max_attention_bytes=79_999)
    assert len(model.explain([1] * 50, max_attention_bytes=80_000).tokens) == 50
    with pytest.raises(ConfigError, match="max_attention_bytes"):
        model.explain([1], max_attention_bytes=-1)


def test_there_must_be_room_for_a_second_model(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    forecast = model.memory.forecast_bytes
    monkeypatch.setattr("edgelm.engine.memory.rooms", lambda: [Room(forecast, "a limit")])
    with pytest.raises(InsufficientMemoryError, match="a limit leaves"):
        model.explain(TEXT)
    monkeypatch.setattr("edgelm.engine.memory.rooms", lambda: [Room(forecast + 10**6, "a limit")])
    assert model.explain(TEXT)


def test_another_device_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.graph, "device", Device("cuda"))
    with pytest.raises(DeviceError, match=r"on the CPU only, not on cuda:0: load the model with device='cpu'"):
        model.explain(TEXT)


def test_a_replaced_bundle_is_noticed(tiny_copy: Path) -> None:
    with loaded(tiny_copy) as model:
        edit_manifest(tiny_copy, lambda m: m["source"].update(name="another"))
        with pytest.raises(BundleError, match="was replaced after it was loaded"):
            model.explain(TEXT)


def test_a_graph_file_that_was_written_into_is_noticed(tiny_copy: Path) -> None:
    with loaded(tiny_copy) as model:
        graph = (tiny_copy / "model.onnx").read_bytes()
        (tiny_copy / "model.onnx").write_bytes(graph[:-1] + bytes([graph[-1] ^ 1]))
        with pytest.raises(BundleError, match=r"'model\.onnx' of .* was written into"):
            model.explain(TEXT)


def test_a_closed_model(tiny_copy: Path) -> None:
    model = loaded(tiny_copy)
    model.close()
    with pytest.raises(ClosedError):
        model.explain(TEXT)


def test_every_kind_of_model_explains_the_same(model: Model) -> None:
    expected = model.explain(TEXT)
    for options in ({"batch_invariant": True}, {"context": 32}):
        with loaded(**options) as other:
            found = other.explain(TEXT)
        assert np.abs(found.attentions - expected.attentions).max() <= 1e-6


def test_the_copy_computes_what_the_graph_computes(model: Model, report: Report) -> None:
    """Its attention has another kernel, and where activations are rounded, that makes more of its last bits."""
    story = "Once upon a time, there was a little girl named Lily. She loved to play with her red ball in the park."
    for each, most in ((model, 1e-5), (loaded(None), 0.05)):
        ids = each.tokenizer.encode(story if each is not model else TEXT)
        with each.graph.showing_attention(0) as copy:
            difference = np.abs(copy.session().score(ids) - each.graph.session().score(ids)).mean()
        report(f"the copy of {each.bundle.path.name} moves logits by {difference:.2g} on average")
        assert difference <= most
