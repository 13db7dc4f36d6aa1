"""A byte-level BPE, the stream of its ids, and the batches that are cut from the stream."""

from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.errors import TrainingError
from edgelm_export.source.tokenizer import load_tokenizer
from edgelm_train.data.bpe import encode, load_bpe, save_bpe, train_bpe
from edgelm_train.data.packing import IGNORED, BatchStream, Packed, Phase, pack

pytestmark = pytest.mark.export

DOCUMENTS = [f"The {animal} sat on the {thing}. It was happy." for animal in ("cat", "dog") for thing in ("mat", "hat")]


def test_the_vocabulary_is_learned_and_read_back_by_all(tmp_path: Path) -> None:
    tokenizer = train_bpe(DOCUMENTS, 300)
    save_bpe(tokenizer, tmp_path)
    text = "The cat's naïve 猫\n <|endoftext|>"

    ids = tokenizer.encode(text).ids

    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert len(encode(tokenizer, DOCUMENTS[0])) < len(DOCUMENTS[0]) / 2
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids
    assert load_tokenizer(tmp_path).encode(text) == ids
    assert load_bpe(tmp_path)[0].decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("size", [256, 262_145])
def test_a_vocabulary_has_limits(size: int) -> None:
    with pytest.raises(TrainingError, match="257 to 262144 tokens"):
        train_bpe(DOCUMENTS, size)


def test_one_huge_line_is_tokenized_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_bpe(DOCUMENTS, 300)
    line = " ".join(DOCUMENTS * 5)
    whole = encode(tokenizer, line)
    monkeypatch.setattr("edgelm_train.data.bpe._PIECE_CHARACTERS", 50)

    assert encode(tokenizer, line) == whole
    assert tokenizer.decode(encode(tokenizer, "x" * 120)) == "x" * 120


def test_one_huge_word_is_learned_from_too() -> None:
    word = "abcdef" * 100_000

    tokenizer = train_bpe([word], 400)

    ids = encode(tokenizer, word)
    assert len(ids) < len(word) / 50
    assert tokenizer.decode(ids) == word


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    tokenizer = train_bpe(DOCUMENTS, 300)
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str().replace("<|endoftext|>", "<|other|>"), encoding="utf-8")

    with pytest.raises(TrainingError, match=r"has no token <\|endoftext\|>"):
        load_bpe(tmp_path)


def test_documents_are_packed_with_a_token_before_each() -> None:
    tokenizer = train_bpe(DOCUMENTS, 300)

    packed = pack(["cat", "dog hat"], tokenizer, 0)

    assert packed.ids.tolist() == [0, *encode(tokenizer, "cat"), 0, *encode(tokenizer, "dog hat")]
    assert packed.ids[packed.starts].tolist() == [0, 0]


def _numbered(*lengths: int) -> Packed:
    ids = np.concatenate([np.arange(100 * i, 100 * i + n) for i, n in enumerate(lengths)]).astype(np.int32)
    return Packed(ids, np.cumsum([0, *lengths[:-1]]))


def test_each_epoch_has_every_document_whole_in_its_own_order() -> None:
    packed = _numbered(3, 5, 7, 2, 4)

    orders = [packed.shuffled(seed) for seed in range(4)]

    assert all(sorted(order) == sorted(packed.ids) for order in orders)
    assert len({order.tobytes() for order in orders}) > 1
    for order in orders:
        jumps = np.flatnonzero(np.diff(order) != 1)
        assert len(jumps) == 4
        assert all(order[jump + 1] % 100 == 0 for jump in jumps)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([1, 2]), st.integers(0, 3))
def test_micro_batches_are_the_stream_in_order_whenever_they_are_read(
    lengths: list[int], accumulate: int, seed: int
) -> None:
    packed = _numbered(*lengths)
    phases = [Phase(2, 4), Phase(1, 8)]
    stream = BatchStream(packed, phases, batch_tokens=16, accumulate=accumulate, seed=seed)
    expected = np.concatenate([packed.shuffled(seed + epoch) for epoch in range(48)])[:48]

    backwards = [stream[index]["input_ids"] for index in reversed(range(len(stream)))][::-1]

    assert len(stream) == 3 * accumulate
    np.testing.assert_array_equal(np.concatenate([batch.ravel() for batch in backwards]), expected)
    assert backwards[0].shape == (4 // accumulate, 4)
    assert backwards[-1].shape == (2 // accumulate, 8)


def test_the_first_token_of_a_window_is_not_predicted() -> None:
    batch = BatchStream(_numbered(10, 10), [Phase(1, 4)], 8, 1, 0)[0]

    assert (batch["labels"][:, 0] == IGNORED).all()
    np.testing.assert_array_equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])
