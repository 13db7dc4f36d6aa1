"""The decoders of the `tokenizers` library as steps of a stream: pieces of tokens go in, pieces of text come out.

In Rust each decoder turns the list of all tokens into another list, and the last list is joined. A step here does the
same work piece by piece and keeps back only what a later piece can change, so that steps in a row are a decoder whose
text is known as early as possible. `Fuse` and `ByteLevel` join all tokens to a single one, which ends with the text.

Three decoders wait by their own rules:

- ByteFallback keeps a run of byte tokens until another token ends it, because one wrong byte turns each byte of the
  run into U+FFFD. From the first wrong byte on it waits no more.
- Replace with a regular expression keeps each token until the token ends, because the expression may match at any
  length. Behind `Fuse` or `ByteLevel`, that is the end of the text.
- ByteLevel behind `Fuse` or another `ByteLevel` keeps the text until a character that is no byte in GPT-2's alphabet,
  because only then the text stands for itself.

tests/text/test_tokenizer.py and tests/text/test_text_after.py compare all steps with Rust.
"""

import codecs
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Regex, decoders

from edgelm.errors import PromptError, TokenizerError
from edgelm.text.rust import rust_errors

# The replacements of transformers' clean_up_tokenization, applied to the whole text one after the other.
CLEAN_UP = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")]
CLEAN_UP += [(" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]
# WordPiece and CTC replace the same and one phrase more, in each token by itself.
_CLEAN_UP_OF_TOKENS = [*CLEAN_UP[:7], (" do not", " don't"), *CLEAN_UP[7:]]

# GPT-2 writes a byte as one printable character: itself, or the next unused one from U+0100 on. Here each character of
# that alphabet becomes the one whose Latin-1 byte it stands for, and all other Latin-1 characters become U+FFFF.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_MOVED = [byte for byte in range(256) if byte not in _PRINTABLE]
LATIN_1_OF = dict.fromkeys(_MOVED, 0xFFFF) | {256 + i: byte for i, byte in enumerate(_MOVED)}

_BYTE_TOKEN = re.compile(r"<0x(\+[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")  # Rust parses a plus sign too
_BEGINS_BYTE_TOKEN = re.compile(r"<(0(x([+0-9A-Fa-f]([0-9A-Fa-f]>?)?)?)?)?")

Piece = tuple[str, bool]
"""Some text of the current token, and whether the token ends with it."""


class DecoderStep:
    """One decoder in the middle of a text. Its attributes are immutable, so that a shallow copy has its own state."""

    is_local: bool = False
    """Whether a token in the middle of a text always stands for the same bytes, whatever its neighbours are."""

    def bytes_of(self, token: str) -> bytes | None:
        """The bytes of a token that may be a part of a character; None for any other token."""
        return None

    def push(self, text: str, ends: bool) -> list[Piece]:
        """Take the next piece of the current token; return the pieces that are now certain."""
        raise NotImplementedError

    def close(self) -> list[Piece]:
        """Return the pieces that are certain because no token follows."""
        return []


class _Fuse(DecoderStep):
    """Joins all tokens to one."""

    is_local = True

    def push(self, text: str, ends: bool) -> list[Piece]:
        return [(text, False)] if text else []

    def close(self) -> list[Piece]:
        return [("", True)]


class _ByteLevel(DecoderStep):
    """Joins all tokens to one text of UTF-8 bytes; a token with a character outside the alphabet stands for itself."""

    is_local = True

    def __init__(self) -> None:
        self._token = ""
        self._stands_for_itself = False
        self._bytes = b""  # an unfinished character

    def bytes_of(self, token: str) -> bytes:
        try:
            return token.translate(LATIN_1_OF).encode("latin-1")
        except UnicodeEncodeError:
            return token.encode()

    def push(self, text: str, ends: bool) -> list[Piece]:
        try:
            data = b"" if self._stands_for_itself else text.translate(LATIN_1_OF).encode("latin-1")
        except UnicodeEncodeError:
            self._stands_for_itself = True
        if self._stands_for_itself:
            data, self._token = (self._token + text).encode(), ""
        elif not ends:
            self._token += text
            return []
        elif self._token:
            data, self._token = self._token.translate(LATIN_1_OF).encode("latin-1") + data, ""
        if ends:
            self._stands_for_itself = False
        data = self._bytes + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._bytes = data[used:]
        return [(text, False)] if text else []

    def close(self) -> list[Piece]:
        return [(self._bytes.decode("utf-8", "replace"), True)]


class _ByteFallback(DecoderStep):
    """Turns runs of tokens like <0xE4> into text, or into U+FFFD for each byte where they are not UTF-8."""

    is_local = True

    def __init__(self) -> None:
        self._token = ""  # the beginning of what may be a byte token
        self._inside = False  # whether the current token has begun and is no byte token
        self._run = 0  # bytes in the current run
        self._wrong = False  # whether the run has a wrong byte
        self._text, self._bytes = "", b""  # the run's text, and its unfinished character

    def bytes_of(self, token: str) -> bytes | None:
        byte = _BYTE_TOKEN.fullmatch(token)
        return None if byte is None else bytes([int(byte[1], 16)])

    def push(self, text: str, ends: bool) -> list[Piece]:
        if self._inside:
            self._inside = not ends
            return [(text, ends)]
        token, self._token = self._token + text, ""
        if ends and (byte := _BYTE_TOKEN.fullmatch(token)):
            return self._push_byte(int(byte[1], 16))
        if not ends and (not token or _BEGINS_BYTE_TOKEN.fullmatch(token)):
            self._token = token
            return []
        self._inside = not ends
        return [*self.close(), (token, ends)]

    def _push_byte(self, byte: int) -> list[Piece]:
        if self._wrong:
            return [("\ufffd", True)]
        self._run += 1
        data = self._bytes + bytes([byte])
        try:
            text, used = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError:
            self._wrong = True
            return [("\ufffd", True)] * self._run
        self._text, self._bytes = self._text + text, data[used:]
        return []

    def close(self) -> list[Piece]:
        pieces = [("\ufffd", True)] * self._run if self._bytes else [(self._text, True)]
        certain = [] if self._wrong or not self._run else pieces
        self._run, self._wrong, self._text, self._bytes = 0, False, "", b""
        return certain


class _Replace(DecoderStep):
    """Replaces a text in each token."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new
        self._held = ""  # an ending that may be the beginning of `old`
        self.is_local = len(old) == 1

    def push(self, text: str, ends: bool) -> list[Piece]:
        text, old = self._held + text, self._old
        if ends:
            self._held = ""
            return [(text.replace(old, self._new), True)]
        if not old:
            self._held = text
            return []
        *done, rest = text.split(old)
        certain = len(rest) - _begun(old, rest)
        self._held = rest[certain:]
        text = self._new.join([*done, rest[:certain]])
        return [(text, False)] if text else []


class _LongBlanks(DecoderStep):
    """Ends the token inside three blanks, behind the first one, which no clean-up can change any more.

    The clean-up takes two blanks away at most, as in "  ' s". Without this step, each of its replacements would keep
    the last blank that it gets, and ten replacements would keep ten.
    """

    def __init__(self) -> None:
        self._held = ""  # up to two blanks

    def push(self, text: str, ends: bool) -> list[Piece]:
        text = self._held + text
        cut = text.rfind("   ") + 1
        pieces = [(text[:cut], True)] if cut else []
        certain = len(text) if ends else max(len(text) - 2, len(text.rstrip(" ")))
        self._held = text[certain:]
        return [*pieces, (text[cut:certain], ends)] if ends or cut < certain else pieces


class _ReplaceInRust(DecoderStep):
    """Replaces the matches of a regular expression in each token; Rust has expressions of its own."""

    def __init__(self, decoder: decoders.Replace) -> None:
        self._decoder = decoder
        self._token = ""

    def push(self, text: str, ends: bool) -> list[Piece]:
        token, self._token = self._token + text, ""
        if ends:
            with rust_errors(PromptError, "the tokenizer cannot decode these ids", "give ids that this model produced"):
                return [(self._decoder.decode([token]), True)]
        self._token = token
        return []


class Strip(DecoderStep):
    """Takes away up to `start` characters `content` at the beginning of each token, and up to `stop` at its end."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self.stop = content, start, stop
        self.is_local = not stop
        self._begin_token()

    def _begin_token(self) -> None:
        self._length = 0  # characters of the token so far
        self._cut = 0  # characters taken away at its beginning
        self._run = 0  # how many characters `content` it ends with so far
        self._held = ""  # those of them that may be taken away

    def push(self, text: str, ends: bool) -> list[Piece]:
        at_start = self._cut == self._length
        leading = min(len(text) - len(text.lstrip(self._content)), self._start - self._cut) if at_start else 0
        trailing = len(text) - len(text.rstrip(self._content))
        self._cut += leading
        self._length += len(text)
        self._run = trailing + (self._run if trailing == len(text) else 0)
        text = self._held + text[leading:]
        stop = min(self.stop, self._run)
        certain = max(0, len(text) - stop)
        if not ends:
            self._held = text[certain:]
            return [(text[:certain], False)] if certain else []
        if self._run == self._length < self.stop or self._cut > self._length - stop:  # Rust panics here
            raise PromptError(
                f"the tokenizer cannot decode these ids (its decoder strips {self._start} characters "
                f"{self._content!r} from the beginning and {self.stop} from the end of each token, and one has only "
                f"{self._length}); give ids that this model produced"
            )
        self._begin_token()
        return [(text[:certain], True)]


class _WordPiece(DecoderStep):
    """Takes the prefix of a token away, or writes a space before the token; the first token stays as it is."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._inside = True  # whether the beginning of the current token is decided
        self._held = ""  # the beginning of what may be `prefix`

    def push(self, text: str, ends: bool) -> list[Piece]:
        if not self._inside:
            text, self._held = self._held + text, ""
            if not ends and len(text) < len(self._prefix) and self._prefix.startswith(text):
                self._held = text
                return []
            text = text.removeprefix(self._prefix) if text.startswith(self._prefix) else f" {text}"
        self._inside = not ends
        return [(text, ends)]


class _Metaspace(DecoderStep):
    """Turns a mark into a space; where texts begin with an added mark, the marks of the first token are left out."""

    is_local = True

    def __init__(self, mark: str, first: str) -> None:
        self._mark, self._space = mark, first

    def push(self, text: str, ends: bool) -> list[Piece]:
        text = text.replace(self._mark, self._space)
        if ends:
            self._space = " "
        return [(text, ends)]


class _WordEnds(DecoderStep):
    """Turns the suffix that ends words (</w>) into a space; the last token just loses it."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._held = ""  # the current token from its first suffix on
        self._ended = False  # whether that token is complete, and waits for the next one

    def push(self, text: str, ends: bool) -> list[Piece]:
        pieces = [(self._held.replace(self._suffix, " "), True)] if self._ended else []
        text = text if self._ended else self._held + text
        certain = text.find(self._suffix)
        self._ended = ends and certain >= 0
        if ends and certain < 0:
            self._held = ""
            return [*pieces, (text, True)]
        if certain < 0:
            certain = len(text) - _begun(self._suffix, text)
        self._held = text[certain:]
        return [*pieces, (text[:certain], False)] if certain else pieces

    def close(self) -> list[Piece]:
        return [(self._held.replace(self._suffix, ""), True)] if self._ended else []


class _NoRepeats(DecoderStep):
    """Leaves out a token that equals the one before it (CTC)."""

    def __init__(self) -> None:
        self._last: str | None = None
        self._token = ""

    def push(self, text: str, ends: bool) -> list[Piece]:
        self._token += text
        token, last = self._token, self._last
        if ends:
            self._last, self._token = token, ""
        if last is None:
            return [(text, ends)]
        return [(token, True)] if ends and token != last else []


class _NoEmptyTokens(DecoderStep):
    """Leaves out tokens without text (CTC)."""

    def __init__(self) -> None:
        self._inside = False  # whether the current token has text

    def push(self, text: str, ends: bool) -> list[Piece]:
        has_text = self._inside or bool(text)
        self._inside = has_text and not ends
        return [(text, ends)] if has_text else []


def _begun(pattern: str, text: str) -> int:
    """Return the length of the longest ending of `text` that is a beginning of `pattern`, but not all of it."""
    start = text.find(pattern[0], max(0, len(text) - len(pattern) + 1))
    while start >= 0 and not pattern.startswith(text[start:]):
        start = text.find(pattern[0], start + 1)
    return 0 if start < 0 else len(text) - start


def decoder_steps(decoder: Mapping[str, Any], *, clean_up: bool) -> list[DecoderStep]:
    """Return the steps of a decoder, at the beginning of a text.

    Args:
        decoder: the decoder's entry in tokenizer.json; {} where spaces join the tokens.
        clean_up: whether the text gets transformers' clean_up_tokenization.

    Raises:
        TokenizerError: the decoder is of an unknown type.
    """
    steps: list[DecoderStep] = list(_steps(decoder)) if decoder else [_WordPiece("\0no token\0")]
    if clean_up:
        steps += [_Fuse(), _LongBlanks(), *_replacements(CLEAN_UP)]
    joined = False  # whether all tokens are one
    for i, step in enumerate(steps):
        if joined and isinstance(step, _WordEnds):
            steps[i] = _Replace(step._suffix, "")  # the only token is the last one
        joined |= isinstance(step, _Fuse | _ByteLevel)
    return steps


def _replacements(pairs: list[tuple[str, str]]) -> Iterator[DecoderStep]:
    return (_Replace(old, new) for old, new in pairs)


def _steps(decoder: Mapping[str, Any]) -> Iterator[DecoderStep]:
    match decoder["type"]:
        case "Sequence":
            for entry in decoder["decoders"]:
                yield from _steps(entry)
        case "Fuse":
            yield _Fuse()
        case "ByteLevel":
            yield _ByteLevel()
        case "ByteFallback":
            yield _ByteFallback()
        case "Replace":
            pattern, new = decoder["pattern"], decoder["content"]
            if pattern.get("String"):
                yield _Replace(pattern["String"], new)
            else:  # an empty pattern has rules of its own too
                yield _ReplaceInRust(decoders.Replace(Regex(pattern["Regex"]) if "Regex" in pattern else "", new))
        case "Strip":
            yield Strip(decoder["content"], decoder["start"], decoder["stop"])
        case "Metaspace":
            yield _Metaspace(decoder["replacement"], " " if decoder["prepend_scheme"] == "never" else "")
        case "BPEDecoder":
            yield _WordEnds(decoder["suffix"])
        case "WordPiece":
            yield _WordPiece(decoder["prefix"])
            yield from _replacements(_CLEAN_UP_OF_TOKENS if decoder["cleanup"] else [])
        case "CTC":
            yield _NoRepeats()
            yield _Replace(decoder["pad_token"], "")
            if decoder["cleanup"]:
                yield from _replacements([*_CLEAN_UP_OF_TOKENS, (decoder["word_delimiter_token"], " ")])
            yield _NoEmptyTokens()
        case unknown:
            raise TokenizerError(f"the tokenizer has a decoder of the unknown type {unknown!r}: update edgelm")
