r"""Long texts are encoded in pieces, because the `tokenizers` library takes hundreds of bytes for each character.

The ids are those of the whole text. This is so for byte-level BPE behind the regular expressions of GPT-2, of GPT-4 and
Llama 3, and of Qwen; other tokenizers get their texts whole. A piece ends in one of two places:

- Where a word begins. The expressions do not look back, so what follows is cut into words as if the text began there.
  They look ahead to the end of a run of blanks, and at most two characters further: the piece has to show that much,
  and a whole added token more, because such a token cuts words too.
- Within a very long word, where a token begins, if the next piece begins with the same token. BPE merges the pair of
  least rank first, the leftmost of equals. If a pair of neighbouring tokens is the encoding of its own text, the first
  merge across their border never comes, whatever stands around them. So tokens are the encoding of a text if each two
  neighbours are the encoding of theirs (Vieira et al. 2025, "Language Models over Canonical Byte-Pair Encodings"), and
  each two neighbours of the joined pieces stood beside each other in one of the pieces.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from edgelm.text.decoder_steps import LATIN_1_OF
from edgelm.text.regexes import GPT2, GPT4, QWEN

PIECE_CHARACTERS = 8192
"""Longer texts are encoded in pieces of this length."""
_AHEAD_BYTES = 16
"""What an expression may look at behind a word: three characters at most, beside the rest of a run of blanks."""
_WORD_START_TOKENS = 256
"""If so many tokens before the end of a piece no word begins, the piece ends within a word."""
_AROUND_TOKENS = 8
"""A piece that ends within a word has to show so many tokens of the word on each side: two characters at least."""
_TRIES = 2
_BLANK = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
_NOT_BLANK = re.compile(rf"[^{_BLANK.pattern[1:]}")


@dataclass(frozen=True, slots=True)
class CutFacts:
    """What a tokenizer.json says about the places where a text may be cut."""

    added_bytes: Mapping[int, int]
    """The length of each added token in UTF-8, by id."""
    exclusive: tuple[str, ...]
    """Added tokens that take blanks away, or look at what stands around them: a text with one of them is not cut."""
    unknown: bytes
    """Bytes without a token. They are dropped, or become one token together, so a text with one of them is not cut."""
    is_normalized: bool
    """Whether the text is put into NFC first. Then a piece begins with an ASCII character, which NFC never joins."""


def cut_facts(content: Mapping[str, Any], parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> CutFacts | None:
    """What a checked tokenizer.json says about cuts; None if the text has to stay whole.

    Args:
        content: the file.
        parts: its normalizers, pre-tokenizers and post-processors, sequences taken apart.
    """
    model, normalizers = content["model"], [part["type"] for part in parts["normalizer"]]
    vocab = model.get("vocab")
    if (
        normalizers not in ([], ["NFC"])
        or not _cuts_words(parts["pre_tokenizer"])
        or not all(_keeps_text(part) for part in parts["post_processor"])
        or "merges" not in model
        or not isinstance(vocab, dict)
        or any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    ):
        return None
    added = [token for token in content.get("added_tokens", []) if token["content"]]
    exclusive = [t for t in added if any(t.get(flag) for flag in ("lstrip", "rstrip", "single_word"))]
    lengths = {token["id"]: len(token["content"].encode()) for token in added}
    unknown = "".join(letter for letter in ByteLevel.alphabet() if letter not in vocab).translate(LATIN_1_OF)
    return CutFacts(
        lengths, tuple(token["content"] for token in exclusive), unknown.encode("latin-1"), bool(normalizers)
    )


def _cuts_words(parts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these pre-tokenizers cut a text into words by one of the known expressions, and then into bytes."""
    match [dict(part) for part in parts]:
        case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}, last]:
            known = regex in (GPT2, GPT4, QWEN) and last.get("use_regex") is False
        case [{"type": "Digits", "individual_digits": True}, last] | [last]:
            known = last.get("use_regex", True)
        case _:
            return False
    return bool(known and last["type"] == "ByteLevel" and last.get("add_prefix_space") is False)


def _keeps_text(processor: Mapping[str, Any]) -> bool:
    """Whether a post-processor leaves the text's tokens as they are, and puts special tokens around them at most."""
    pieces = processor.get("single", [{"Sequence": {"id": "A"}}])
    return [piece["Sequence"]["id"] for piece in pieces if "Sequence" in piece] == ["A"]


class _Piece(NamedTuple):
    """A part of a text, encoded."""

    encoding: Encoding
    ids: list[int]


class LongTexts:
    """Encodes long texts in pieces."""

    def __init__(self, backend: Tokenizer, facts: CutFacts) -> None:
        self._backend, self._facts = backend, facts
        self._bytes = _TokenBytes(facts.added_bytes, backend.id_to_token)
        self._margin_bytes = max(facts.added_bytes.values(), default=0) + _AHEAD_BYTES

    def encode(self, text: str) -> list[int]:
        """The ids of `text` without the special tokens around it; what Rust raises is raised."""
        if self._backend.encode_special_tokens or any(token in text for token in self._facts.exclusive):
            return self._whole(text).ids
        ids: list[int] = []
        start, piece = 0, self._whole(text[:PIECE_CHARACTERS])
        while start + PIECE_CHARACTERS < len(text):
            following = self._next(text, start, piece)
            if following is None:
                piece = self._whole(text[start:])
                break
            taken, start, next_piece = following
            ids += piece.ids[:taken]
            piece = next_piece
        ids += piece.ids
        return ids

    def _whole(self, text: str) -> _Piece:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return _Piece(encoding, encoding.ids)

    def _next(self, text: str, start: int, piece: _Piece) -> tuple[int, int, _Piece] | None:
        """How many tokens of the piece at `start` count, where the next piece starts, and that piece."""
        content, ids = text[start : start + PIECE_CHARACTERS], piece.ids
        data = content.encode()
        if len(data.translate(None, self._facts.unknown)) < len(data):
            return None
        if sum(map(self._bytes.__getitem__, ids)) != len(data):
            return None  # a tokenizer that changes the text in a way that is not known here
        if self._facts.is_normalized and self._backend.normalizer.normalize_str(content) != content:
            return None
        for taken, at, is_word_start in self._places(piece, data):
            next_start = start + len(data[:at].decode())
            following = self._whole(text[next_start : next_start + PIECE_CHARACTERS])
            if is_word_start or following.ids[0] == ids[taken]:
                return taken, next_start, following
        return None

    def _places(self, piece: _Piece, data: bytes) -> list[tuple[int, int, bool]]:
        """Where a piece may end, the best place first: tokens and bytes before it, and whether a word begins there."""
        encoding, ids = piece
        within: list[tuple[int, int, bool]] = []
        at, last, seen = len(data), len(data) - self._margin_bytes, 0
        for index in range(len(ids) - 1, 0, -1):
            at -= self._bytes[ids[index]]
            if at > last:
                continue
            seen += 1
            if seen > _WORD_START_TOKENS and within:
                break
            if data[at] & 0xC0 == 0x80 or (self._facts.is_normalized and data[at] >= 0x80):
                continue
            if encoding.token_to_word(index) != encoding.token_to_word(index - 1):
                # A run of blanks has to end before the piece does, or at an added token.
                around = data[at : at + 8].decode(errors="ignore")[:2]
                if _NOT_BLANK.search(around) or ids[index - 1] in self._facts.added_bytes:
                    return [(index, at, True)]
            elif len(within) < _TRIES and self._is_uniform(piece, data, index, at):
                within.append((index, at, False))
        return within

    def _is_uniform(self, piece: _Piece, data: bytes, index: int, at: int) -> bool:
        """Whether the word around `at` goes on behind it as if it began there, for all known expressions.

        It does within a run of letters, digits or marks, and in a word of blanks alone. It may not in line ends behind
        marks, which are part of a word of GPT-4's expression.
        """
        encoding, ids = piece
        first, end = encoding.word_to_tokens(encoding.token_to_word(index)) or (index, index)
        if not first + _AROUND_TOKENS <= index < end - _AROUND_TOKENS:
            return False
        around = data[at - 8 : at].decode(errors="ignore")[-1:] + data[at : at + 8].decode(errors="ignore")[:2]
        if not _BLANK.search(around):
            return True
        start = at - sum(map(self._bytes.__getitem__, ids[first:index]))
        return not _NOT_BLANK.search(data[start:at].decode(errors="ignore") + around)


class _TokenBytes(dict[int, int]):
    """How many bytes of text each token stands for, by id."""

    def __init__(self, added: Mapping[int, int], token_of: Callable[[int], str | None]) -> None:
        super().__init__(added)
        self._token_of = token_of

    def __missing__(self, token_id: int) -> int:
        self[token_id] = len(self._token_of(token_id) or "")  # a letter for each byte
        return self[token_id]
