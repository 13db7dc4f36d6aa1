"""Text that streams equals text decoded at once, for streams of ids cut anywhere, also inside characters.

EDGELM_STREAMS=100000 pytest tests/text/test_id_streams.py  runs as many streams; a few thousand by default.
"""

import os
import random

import pytest

from edgelm.text.stop_strings import TextStream
from edgelm.text.tokenizer import Tokenizer
from tests.conftest import DATA, TINY_BUNDLE

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
        "byte_bpe": Tokenizer.from_json((DATA / "tokenizers/byte_bpe_json/tokenizer.json").read_text(encoding="utf-8")),
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
