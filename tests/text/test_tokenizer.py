"""Finished tokenizers: goldens from transformers, streams, damaged tokenizer.json files and hostile text."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from edgelm.errors import PromptError, TokenizerError
from edgelm.text.tokenizer import Tokenizer
from tests.text.goldens import CASES, DATA, check_golden, few, finished, streamed, texts

BOTH = [False, True]
NAMES = [name for name, case in CASES.items() if case["finished"]]
DIFFERENT = [name for name in NAMES if CASES[name]["finished"] == f"{name}.json"]


@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers_goldens(name: str) -> None:
    check_golden(finished(name), CASES[name])


@pytest.mark.parametrize("name", DIFFERENT)
def test_to_json_and_from_json_are_inverse(name: str, tmp_path: Path) -> None:
    content = finished(name).to_json()
    assert content == (DATA / "finished" / f"{name}.json").read_text(encoding="utf-8")
    finished(name).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == content


@pytest.mark.parametrize("name", DIFFERENT)
@few
@given(data=st.data(), skip=st.booleans())
def test_streams_join_to_decode(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = finished(name)
    ids = data.draw(
        st.one_of(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60), texts.map(tokenizer.encode))
    )
    stream = tokenizer.stream(skip_special_tokens=skip)
    pieces = [stream.push(token_id) for token_id in ids]
    text = tokenizer.decode(ids, skip_special_tokens=skip)
    assert text.startswith("".join(pieces))
    assert "".join(pieces) + stream.flush() == text
    assert stream.flush() == ""  # a flushed stream is as good as new
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_stream_never_splits_a_character() -> None:
    tokenizer = finished("bpe-json")
    text = "é 今天 🎉👨‍👩‍👧 a\u0301!"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # the small vocabulary cuts inside characters
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) == text and stream.flush() == ""
    assert not any("\ufffd" in piece for piece in pieces)
    assert [stream.push(token_id) for token_id in tokenizer.encode("🎉")[:-1]][-1] == ""
    assert stream.flush() == "\ufffd"


def test_stream_holds_back_what_the_clean_up_may_change() -> None:
    tokenizer = finished("bpe-json-clean-up")
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in tokenizer.encode("do n't ' x ' .")]
    assert "".join(pieces) + stream.flush() == "don't'x '." == tokenizer.decode(tokenizer.encode("do n't ' x ' ."))


DECODERS = {
    "null": None,
    "fuse": decoders.Fuse(),
    "wordpiece": decoders.WordPiece(prefix="##", cleanup=True),
    "metaspace": decoders.Metaspace(),
    "bpe": decoders.BPEDecoder(suffix="</w>"),
    "ctc": decoders.CTC(),
    "byte-level": decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
    "llama": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "llama-strip": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "fallback": decoders.ByteFallback(),
    "fallback-strange": decoders.Sequence([decoders.Replace("a", "<0xE4>"), decoders.ByteFallback()]),
    "strip": decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0), decoders.Fuse()]),
    "two": decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 1, 0)]),
    "two-letters": decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "metaspace-strip": decoders.Sequence([decoders.Metaspace(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "nested": decoders.Sequence([decoders.Sequence([decoders.WordPiece("##", True)]), decoders.Replace("a", "b")]),
    "empty": decoders.Sequence([]),
}


@pytest.mark.parametrize("clean_up", BOTH)
@pytest.mark.parametrize("kind", DECODERS)
def test_every_kind_of_decoder_streams(kind: str, clean_up: bool) -> None:
    words = [
        "a",
        "▁a",
        "▁",
        "##a",
        "##",
        "b</w>",
        "<pad>",
        "|",
        ".",
        " .",
        "'",
        " ",
        "n't",
        "'s",
        "<0xE4>",
        "<0xBD>",
        "<0xA0>",
        "<0x41>",
        "\ufffd",
        "ä",
    ]
    words += ["Ġ", "Ã", "©", " '", "' ", "", "[UNK]", "!"]
    backend = Backend(models.WordLevel({word: 2 * i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.add_special_tokens(["<pad>", "<new>", "Ġ🎉"])
    backend.decoder = DECODERS[kind]
    tokenizer = Tokenizer(backend, clean_up_tokenization_spaces=clean_up)
    again = Tokenizer.from_json(tokenizer.to_json())
    rng = random.Random(kind)
    for _ in range(150):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(12))]  # every other id is a hole
        for skip in BOTH:
            text = tokenizer.decode(ids, skip_special_tokens=skip)
            assert streamed(tokenizer, ids, skip) == text
            assert again.decode(ids, skip_special_tokens=skip) == streamed(again, ids, skip) == text


def test_utf8_replacement_equals_rust() -> None:
    """Streams decode in Python, decode in Rust: both must replace broken bytes alike."""
    tokenizer = finished("bpe-json")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_ids = [tokenizer.token_id(char) for char in alphabet]
    edges = "A\x7f\x80\x8f\x90\x9f\xa0\xbf\xc0\xc1\xc2\xdf\xe0\xe1\xec\xed\xee\xef\xf0\xf1\xf3\xf4\xf5\xff".encode(
        "latin-1"
    )
    ids = {char: token_id for char, token_id in zip(alphabet, byte_ids, strict=True) if token_id is not None}
    assert len(ids) == 256
    printable = {tokenizer_byte(char): token_id for char, token_id in ids.items()}
    rng = random.Random(3)
    for _ in range(3000):
        raw = bytes(rng.choice(edges) for _ in range(rng.randrange(1, 7)))
        one_by_one = [printable[byte] for byte in raw]
        assert tokenizer.decode(one_by_one) == streamed(tokenizer, one_by_one, False) == raw.decode("utf-8", "replace")


def tokenizer_byte(char: str) -> int:
    """Spell out GPT-2's table a second way: the 68 unprintable bytes stand at U+0100 to U+0143, in order."""
    moved = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
    return moved[ord(char) - 256] if ord(char) >= 256 else ord(char)


def test_encode_prompt_drops_only_what_closes_the_text() -> None:
    chinese = finished("chinese")
    cls, sep = chinese.token_id("[CLS]"), chinese.token_id("[SEP]")
    ids = chinese.encode("今天")
    assert ids[0] == cls and ids[-1] == sep
    assert chinese.encode_prompt("今天") == ids[:-1]
    assert chinese.encode_prompt("") == [cls]
    assert chinese.encode_prompt("今天[SEP]")[-1] == sep  # typed by the user, so it stays
    bos = finished("bpe-files-bos")
    assert bos.encode_prompt("x") == bos.encode("x") and bos.encode_prompt("")


def test_encode_prompt_needs_no_token_that_it_leaves_out() -> None:
    """The closing token of a tokenizer may lie beyond the vocabulary: a prompt does not have it."""
    chinese = Tokenizer.from_json(finished("chinese").to_json())
    sep = chinese.token_id("[SEP]")
    whole = chinese.encode("[UNK]")
    assert sep == whole[-1] == max(whole)
    beyond = chinese.limit_vocabulary(sep)
    assert beyond[0] == "[SEP]"
    assert chinese.encode_prompt("[UNK]") == whole[:-1]
    for encode in (chinese.encode, chinese.encode_prompt):
        with pytest.raises(PromptError, match=rf"needs the token '\[SEP\]' \(id {sep}\)"):
            encode("[SEP]")


@pytest.mark.parametrize("kind", ["bert", "roberta", "template", "sequence", "none"])
def test_encode_prompt_knows_every_post_processor(kind: str) -> None:
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    template = processors.TemplateProcessing(
        single="<s> $A </s> </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    post = {
        "bert": processors.BertProcessing(("</s>", 1), ("<s>", 0)),
        "roberta": processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
        "template": template,
        "sequence": processors.Sequence([processors.ByteLevel(), template]),
    }
    if kind in post:
        backend.post_processor = post[kind]
    assert Tokenizer(backend).encode_prompt("a") == ([2] if kind == "none" else [0, 2])


def test_backend_truncation_and_padding_go_off() -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(1)
    backend.enable_padding(length=9)
    assert Tokenizer(backend).encode("a b a") == [0, 1, 0]


def test_holes_and_vocab_size() -> None:
    tokenizer = Tokenizer(Backend(models.WordLevel({"a": 0, "b": 7}, unk_token="a")))
    assert tokenizer.vocab_size == 8
    assert tokenizer.decode([0, 3, 7]) == "a b" == streamed(tokenizer, [0, 3, 7], False)
    assert tokenizer.token_id("b") == 7 and tokenizer.token_id("c") is None


@pytest.mark.parametrize("bad", [-1, 512, True, False, 1.0, "1", None, 2**32, -(2**64), 1 << 20000], ids=range(10))
def test_bad_ids_are_named(bad: Any) -> None:
    tokenizer = finished("bpe-json")
    uses: list[Callable[[], str]] = [lambda: tokenizer.decode([5, bad]), lambda: tokenizer.stream().push(bad)]
    for use in uses:
        with pytest.raises(PromptError, match=r"token id .* outside the vocabulary; ids go from 0 to 511") as caught:
            use()
        assert len(str(caught.value)) < 200
        assert (isinstance(bad, int) and abs(bad) > 2**63) or repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", ["12", 5, None])
def test_ids_must_be_a_list(bad: Any) -> None:
    with pytest.raises(PromptError, match="token id"):
        finished("bpe-json").decode(bad)


@pytest.mark.parametrize("bad", ["a\ud800b", "\udfff", b"bytes", 5, None, ["a"]])
def test_bad_texts(bad: Any) -> None:
    tokenizer = finished("bpe-json")
    for use in (tokenizer.encode, tokenizer.encode_prompt, tokenizer.token_id):
        with pytest.raises(PromptError, match=r"surrogate|must be a str") as caught:
            use(bad)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bpe-json", "chinese", "chars"])
@pytest.mark.parametrize("bomb", ["a", "^", " ", "今", "\0", "א", "a" + "\u0301" * 999, "<|endoftext|>", "[SEP]"])
def test_text_bombs_take_linear_time(name: str, bomb: str) -> None:
    tokenizer = finished(name)
    text = bomb * (100_000 // len(bomb))
    begun = time.process_time()
    ids = tokenizer.encode(text)
    tokenizer.decode(ids)
    assert time.process_time() - begun < 5  # about 0.1 s; a quadratic way would need minutes


def test_long_streams_take_linear_time() -> None:
    tokenizer = finished("chinese")  # with clean-up
    stream = tokenizer.stream()
    ids = [7, 30, 100] * 20_000
    begun = time.process_time()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
    assert time.process_time() - begun < 10


DAMAGED = ["", "{", "[]", "{}", "null", '{"version": "1.0"}', '{"model": 5}', "[" * 100_000, '{"a": "\ud800"}']


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_tokenizer_json_is_refused(content: str) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer.json cannot be read") as caught:
        Tokenizer.from_json(content)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None


def test_panics_become_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """Like pyo3's: not an Exception."""

    class Backend:
        def encode(self, text: str, add_special_tokens: bool) -> None:
            raise PanicException("called `Option::unwrap()`\nsecond line")

    tokenizer = Tokenizer.from_json(finished("chars").to_json())
    monkeypatch.setattr(tokenizer, "_backend", Backend())
    with pytest.raises(PromptError, match=r"unwrap.*; shorten") as caught:
        tokenizer.encode("x")
    assert "second" not in str(caught.value)


@pytest.mark.parametrize("decoder", [decoders.Strip("a", 0, 1), decoders.Sequence([decoders.Fuse()] * 2)])
def test_a_panic_of_a_decoder_becomes_an_error(decoder: Any, capfd: pytest.CaptureFixture[str]) -> None:
    backend = Backend(models.WordLevel({"a": 0, "": 1}, unk_token="a"))
    backend.decoder = decoders.Sequence([decoder, decoders.Strip("a", 0, 1)])
    tokenizer = Tokenizer(backend)
    uses: list[Callable[[], object]] = [partial(tokenizer.decode, [1]), partial(tokenizer.stream, [1])]
    uses.append(partial(streamed, tokenizer, [1], False))
    for use in uses:
        with pytest.raises(
            PromptError, match="its decoder strips 0 characters 'a' from the beginning and 1 from the end"
        ):
            use()
    assert capfd.readouterr().err == ""  # Rust would write a panic's traceback here


def test_save_to_a_missing_folder_and_split_special_tokens(tmp_path: Path) -> None:
    backend = Backend.from_str(finished("bpe-json").to_json())
    backend.encode_special_tokens = True
    tokenizer = Tokenizer(backend)
    with pytest.raises(TokenizerError, match="cannot write"):
        tokenizer.save(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match="use save"):
        tokenizer.to_json()


def test_import_is_light() -> None:
    heavy = {"numpy", "huggingface_hub", "onnxruntime"}
    code = f"import sys, edgelm.text.tokenizer; print([m for m in sys.modules if m in {heavy}])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=DATA.parents[2])
    assert run.stdout.strip() == "[]"
