"""Text that streams equals text decoded at once, for streams of ids cut anywhere, also inside characters.

EDGELM_STREAMS=100000 pytest tests/text/test_id_streams.py  runs as many streams; a few thousand by default.
"""

import os
import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from edgelm.text.stop_strings import TextStream
from edgelm.text.tokenizer import Tokenizer
from tests.conftest import TINY_BUNDLE
from tests.text.goldens import finished

STREAMS = int(os.environ.get("EDGELM_STREAMS", "3000"))
PIECES = [
    "Hello, my name is",
    " the cat\n\n",
    "👩\u200d👩\u200d👧 🇫🇷 🙂🙃",
    "你好，世界",
    "한국어 日本語",
    "e\u0301 a\u0308\u0323 n\u0303",
    "naïve café ☕",
    "مرحبا",
    "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "\ufffd",
    "    \t",
]


def tokenizers() -> dict[str, Tokenizer]:
    return {
        "tiny": Tokenizer.from_json((TINY_BUNDLE / "tokenizer.json").read_text(encoding="utf-8")),
        "byte_bpe": finished("bpe-json"),
        "byte_fallback": finished("byte-fallback"),
        "wordpiece": finished("chinese"),
    }


def random_ids(rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Encoded texts with ids left out, ids put in and ends cut off."""
    ids: list[int] = []
    for _ in range(rng.randint(1, 5)):
        piece = tokenizer.encode("".join(rng.choices(PIECES, k=rng.randint(1, 2))), add_special_tokens=False)
        start = rng.randint(0, len(piece))
        ids += piece[start : rng.randint(start, len(piece))]
        ids += [rng.randrange(tokenizer.vocab_size) for _ in range(rng.choice([0, 0, 0, 1, 3]))]
    return ids


@pytest.mark.parametrize("name", tokenizers())
def test_a_stream_is_the_decoded_text(name: str) -> None:
    tokenizer, rng = tokenizers()[name], random.Random(name)
    for _ in range(STREAMS // 2):
        ids = random_ids(rng, tokenizer)
        stream = TextStream(tokenizer.stream(skip_special_tokens=True))
        pieces = [stream.push(token) for token in ids]
        pieces.append(stream.finish())
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids, skip_special_tokens=True), ids
        assert [token for piece in pieces for token in piece.token_ids] == ids


@pytest.mark.parametrize("name", tokenizers())
def test_a_stop_string_is_found_across_any_token_border(name: str) -> None:
    tokenizer, rng = tokenizers()[name], random.Random(name)
    for _ in range(STREAMS // 10):
        ids = random_ids(rng, tokenizer)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text:
            continue
        start = rng.randrange(len(text))
        stop = text[start : start + rng.randint(1, 4)]
        stream, found = TextStream(tokenizer.stream(skip_special_tokens=True), [stop]), ""
        for token in ids:
            found += stream.push(token).text
            if stream.stopped:
                break
        else:
            found += stream.finish().text
        assert stream.stopped
        assert found == text[: text.find(stop)]


def test_byte_fallback_streams_with_every_token_that_ends_a_run() -> None:
    tokenizer = finished("byte-fallback")
    stream = tokenizer.stream(skip_special_tokens=True)
    pieces = [stream.push(token) for token in tokenizer.encode("The river 今天 isn't 🎉 here.")]
    assert next(filter(None, pieces)) == "The"
    assert "".join(pieces) == "The river 今天 isn't 🎉 here." and stream.flush() == ""
    assert "🎉 " in pieces
    assert [stream.push(token) for token in byte_tokens(tokenizer, "天".encode())] == ["", "", ""]
    assert stream.flush() == "天"


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in data]
    return [token_id for token_id in ids if token_id is not None]


def test_a_wrong_byte_spoils_its_whole_run() -> None:
    tokenizer = finished("byte-fallback")
    word = tokenizer.encode("the", add_special_tokens=False)
    ids = [*word, *byte_tokens(tokenizer, b"A\xff\xe4\xbd\xa0"), *word, *byte_tokens(tokenizer, b"\xf0\x9f")]
    stream = tokenizer.stream()
    assert (
        "".join(map(stream.push, ids)) + stream.flush()
        == tokenizer.decode(ids)
        == "the" + "\ufffd" * 5 + " the\ufffd\ufffd"
    )


def decode_stream(tokenizer: Tokenizer, ids: list[int]) -> list[str | None]:
    backend, stream = Backend.from_str(tokenizer.to_json()), DecodeStream(skip_special_tokens=False)
    return [stream.step(backend, token_id) for token_id in ids]


def test_decode_stream_waits_for_the_end_of_replacement_characters() -> None:
    """The reasons why edgelm.text.stream_decoder does not use tokenizers' DecodeStream; see its docstring."""
    tokenizer = finished("bpe-json")
    ids = tokenizer.encode("\ufffd" * 50)
    assert decode_stream(tokenizer, ids) == [None] * len(ids)
    assert "".join(map(tokenizer.stream().push, ids)) == "\ufffd" * 50


def test_decode_stream_fails_on_a_wrong_byte() -> None:
    tokenizer = finished("byte-fallback")
    ids = [*byte_tokens(tokenizer, b"A\xff"), *tokenizer.encode("the", add_special_tokens=False)]
    with pytest.raises(Exception, match="prefix"):
        decode_stream(tokenizer, ids)
