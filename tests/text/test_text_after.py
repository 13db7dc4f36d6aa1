"""Text after a prompt is `decode(prompt + new)[len(decode(prompt)):]`, handed out as soon as it is certain.

The reference is the decoder in Rust, with transformers' clean-up behind it.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from edgelm.errors import PromptError, TokenizerError
from edgelm.text.decoder_steps import CLEAN_UP, decoder_steps
from edgelm.text.stop_strings import TextStream
from edgelm.text.tokenizer import Tokenizer
from tests.text.goldens import finished
from tests.text.test_tokenizer import DIFFERENT, tokenizer_byte

CHARACTER_OF = {tokenizer_byte(char): char for char in pre_tokenizers.ByteLevel.alphabet()}


def byte_words(*words: bytes) -> list[str]:
    """The words as a byte-level tokenizer writes them."""
    return ["".join(CHARACTER_OF[byte] for byte in word) for word in words]


@dataclass(frozen=True)
class Kind:
    """A decoder, and a vocabulary that meets its rules."""

    decoder: Any
    words: list[str]
    clean_up: bool = False
    begin: tuple[int, ...] = ()
    """Ids that every prompt begins with."""

    def backend(self) -> Backend:
        vocabulary = {word: i for i, word in enumerate([*self.words, "<special>"])}
        backend = Backend(models.WordLevel(vocabulary, unk_token="<special>"))
        backend.add_special_tokens(["<special>"])
        backend.decoder = self.decoder
        return backend

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.backend(), clean_up_tokenization_spaces=self.clean_up)

    def decode(self, ids: list[int], backend: Backend) -> str:
        text: str = backend.decode(ids, skip_special_tokens=True)
        for old, new in CLEAN_UP if self.clean_up else ():
            text = text.replace(old, new)
        return text


SPACED, BYTES = decoders.Replace("▁", " "), ["<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "<0x41>"]
CUT, MARKS = byte_words(b"\xe4", b"\xbd", b"\xa0", b"\xff"), [" ", ".", "'", "s", "n't", "a"]
LLAMA = [SPACED, decoders.ByteFallback(), decoders.Fuse()]
KINDS = {
    "byte-level": Kind(decoders.ByteLevel(), [*CUT, "a", "Ġ", "今!"]),
    "byte-level with clean-up": Kind(decoders.ByteLevel(), ["Ġ", *MARKS[1:], "今"], clean_up=True),
    "byte-level, blank taken away": Kind(
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]), ["Ġ", "the", "Ġthing", *CUT]
    ),
    "byte-level, blanks at the end taken away": Kind(
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("x", "yy"), decoders.Strip(" ", 0, 1)]),
        ["a", "Ġ", "Ġa", "aĠ", "x"],
        begin=(0,),  # Rust panics where there is no text
    ),
    "byte fallback": Kind(decoders.Sequence(LLAMA), [*BYTES, "▁a", "q"]),
    "byte fallback, blank taken away": Kind(
        decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]), [*BYTES, "▁a", "▁▁"]
    ),
    "byte fallback, two characters taken away": Kind(
        decoders.Sequence([*LLAMA, decoders.Strip("A", 2, 0)]), ["<0x41>", "<0xFF>", "AA", "b"]
    ),
    "byte fallback alone": Kind(decoders.ByteFallback(), [*BYTES, "a", "<0x"]),
    "wordpiece": Kind(decoders.WordPiece("##", True), ["##", "##a", ".", "n't", " ' ", "a"]),
    "wordpiece with clean-up": Kind(decoders.WordPiece("##", False), ["##a", *MARKS[1:]], clean_up=True),
    "metaspace": Kind(decoders.Metaspace(), ["▁", "▁a", "b▁", "c"]),
    "metaspace, never first": Kind(decoders.Metaspace(prepend_scheme="never"), ["▁", "▁a", "b▁", "c"]),
    "metaspace, blanks taken away": Kind(
        decoders.Sequence([decoders.Metaspace(), decoders.Fuse(), decoders.Strip(" ", 3, 0)]), ["▁", "▁a", "b▁", "c"]
    ),
    "word ends": Kind(decoders.BPEDecoder("</w>"), ["a", "a</w>", "b</w>c", "</w>", "</"]),
    "word ends with clean-up": Kind(decoders.BPEDecoder("</w>"), ["a", "a</w>", ".", "'</w>", "s"], clean_up=True),
    "word ends behind a join": Kind(
        decoders.Sequence([decoders.Fuse(), decoders.BPEDecoder("</w>")]), ["a", "</w>", "</", "w>", "x</"]
    ),
    "characters": Kind(None, ["a", " ", "今"]),
    "characters with clean-up": Kind(None, ["a", ".", "'", "s"], clean_up=True),
    "joined characters": Kind(decoders.Fuse(), ["a", " ", "今"]),
    "joined characters with clean-up": Kind(decoders.Fuse(), MARKS, clean_up=True),
    "strip in each token": Kind(decoders.Sequence([SPACED, decoders.Strip(" ", 1, 0)]), ["▁", "▁a", "▁▁b", "c▁"]),
    "strip joined text": Kind(decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 2, 0)]), ["a", "aab", "c"]),
    "ctc": Kind(decoders.CTC("-", "|", True), ["a", "-", "|", "b-", "."]),
    "no decoder in a sequence": Kind(decoders.Sequence([]), ["a", " ", "今"]),
}
few = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def ids_and_cut(draw: st.DataObject, vocab_size: int, most: int = 9) -> tuple[list[int], list[int]]:
    ids = draw.draw(st.lists(st.integers(0, vocab_size - 1), max_size=most))
    cut = draw.draw(st.integers(0, len(ids)))
    return ids[:cut], ids[cut:]


def common_beginning(texts: list[str]) -> str:
    first, last = min(texts), max(texts)  # all other texts lie between them
    return first[: next((i for i, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), len(first))]  # noqa: B905


@pytest.mark.parametrize("name", KINDS)
@few
@given(data=st.data())
def test_text_after_a_prompt_is_handed_out_when_it_is_certain(name: str, data: st.DataObject) -> None:
    kind = KINDS[name]
    tokenizer, backend = kind.tokenizer(), kind.backend()
    prompt, new = ids_and_cut(data, tokenizer.vocab_size)
    prompt = [*kind.begin, *prompt]

    def text_after(ids: list[int]) -> str:
        return kind.decode(prompt + ids, backend)[len(kind.decode(prompt, backend)) :]

    stream = tokenizer.stream(prompt, skip_special_tokens=True)
    for _ in range(2):  # a flushed stream begins again, after the prompt
        pieces = [stream.push(token_id) for token_id in new]
        untouched = stream.copy()
        assert "".join(pieces) + stream.flush() == text_after(new)
    every = range(len(kind.words))
    later = [list(ids) for count in range(4) for ids in product(every, repeat=count)]
    assert "".join(pieces) == common_beginning([text_after(new + ids) for ids in later])
    assert "".join(pieces) + untouched.flush() == text_after(new)


@pytest.mark.parametrize("name", KINDS)
@few
@given(data=st.data())
def test_stop_strings_are_found_in_new_text_only(name: str, data: st.DataObject) -> None:
    kind = KINDS[name]
    tokenizer, backend = kind.tokenizer(), kind.backend()
    prompt, new = ids_and_cut(data, tokenizer.vocab_size)
    prompt = [*kind.begin, *prompt]
    before, whole = kind.decode(prompt, backend), kind.decode(prompt + new, backend)
    stop = data.draw(st.sampled_from([text[i : i + 2] for text in (before, whole) for i in range(len(text))] or ["x"]))
    stream = TextStream(tokenizer.stream(prompt, skip_special_tokens=True), [stop])
    text, tokens = "", list[int]()
    for token_id in [*new, None]:
        piece = stream.finish() if token_id is None else stream.push(token_id)
        text, tokens = text + piece.text, [*tokens, *piece.token_ids]
        if stream.stopped:
            break
    expected, found, _ = whole[len(before) :].partition(stop)
    assert (text, stream.stopped) == (expected, bool(found))
    assert stream.stopped or tokens == new


@pytest.mark.parametrize("name", DIFFERENT)
@few
@given(data=st.data(), skip=st.booleans())
def test_whole_tokenizers(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = finished(name)
    prompt, new = ids_and_cut(data, tokenizer.vocab_size, most=40)
    before, whole = (tokenizer.decode(ids, skip_special_tokens=skip) for ids in (prompt, prompt + new))
    stream = tokenizer.stream(prompt, skip_special_tokens=skip)
    assert "".join(map(stream.push, new)) + stream.flush() == whole[len(before) :]


PIECES = [
    "a",
    "▁",
    "##",
    "</w>",
    "<0xE4>",
    "<0xBD>",
    "<0xA0>",
    "<0x41>",
    "<0x+A>",
    "<0xZZ>",
    "<0",
    " ",
    ".",
    "'",
    "n't",
]
PIECES += ["Ġ", "ä", "½", "ł", "|", "<pad>", "今", " do not", "aa", "b"]
short = st.text("a▁ .'", max_size=2)
one_decoder = st.one_of(
    st.sampled_from([decoders.ByteLevel(), decoders.Fuse(), decoders.ByteFallback(), decoders.Metaspace()]),
    st.builds(decoders.Replace, short, short),
    st.builds(
        lambda pattern, new: decoders.Replace(Regex(pattern), new), st.sampled_from(["^a", "a+", "[ .]$"]), short
    ),
    st.builds(decoders.Strip, st.sampled_from(["a", " ", "▁"]), st.integers(0, 3), st.integers(0, 3)),
    st.builds(decoders.WordPiece, st.sampled_from(["##", "a", ""]), st.booleans()),
    st.builds(decoders.BPEDecoder, st.sampled_from(["</w>", "a", "aa", ""])),
    st.builds(decoders.CTC, st.sampled_from(["<pad>", "a", ""]), st.sampled_from(["|", " ", ""]), st.booleans()),
)


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(one_decoder, min_size=1, max_size=4), st.booleans(), st.data())
def test_any_row_of_decoders(row: list[Any], clean_up: bool, data: st.DataObject) -> None:
    """Also where Rust panics: then decode and the stream raise an error of ours."""
    words = data.draw(st.lists(st.lists(st.sampled_from(PIECES), max_size=3).map("".join), min_size=1, unique=True))
    kind = Kind(decoders.Sequence(row), words, clean_up)
    tokenizer, backend = kind.tokenizer(), kind.backend()
    try:
        tokenizer.to_json()
    except TokenizerError as error:
        assert "more than 64 times as long" in str(error)
        return
    prompt, new = ids_and_cut(data, tokenizer.vocab_size)
    try:
        before, whole = kind.decode(prompt, backend) if prompt else "", kind.decode(prompt + new, backend)
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":
            raise
        with pytest.raises(PromptError, match="its decoder strips"):
            tokenizer.decode(prompt, skip_special_tokens=True)
            tokenizer.decode(prompt + new, skip_special_tokens=True)
        with pytest.raises(PromptError, match="its decoder strips"):
            stream = tokenizer.stream(prompt, skip_special_tokens=True)
            for token_id in new:
                stream.push(token_id)
            stream.flush()
        return
    assert tokenizer.decode(prompt + new, skip_special_tokens=True) == whole
    stream = tokenizer.stream(prompt, skip_special_tokens=True)
    pieces = [stream.push(token_id) for token_id in new]
    assert "".join(pieces) + stream.flush() == whole[len(before) :]
    again = Tokenizer.from_json(tokenizer.to_json()).stream(prompt, skip_special_tokens=True)
    assert [again.push(token_id) for token_id in new] == pieces


def test_a_prompt_that_ends_inside_a_character() -> None:
    """The character that takes the place of the prompt's U+FFFD is not new text, as the docstring says."""
    tokenizer = KINDS["byte-level"].tokenizer()
    half, rest, after = [0], [1, 2], [4]
    assert tokenizer.decode(half) == "\ufffd" and tokenizer.decode(half + rest) == "你"
    stream = tokenizer.stream(half)
    assert [stream.push(token_id) for token_id in rest + after] == ["", "", "a"]


def test_bad_ids_before_a_stream_are_named() -> None:
    tokenizer = finished("bpe-json")
    with pytest.raises(PromptError, match="token id 512 is outside the vocabulary"):
        tokenizer.stream([5, 512])
    with pytest.raises(PromptError, match="must come as a list"):
        tokenizer.stream(5)  # type: ignore[arg-type]


def test_an_unknown_decoder_is_named() -> None:
    with pytest.raises(TokenizerError, match="unknown type 'Sing': update edgelm"):
        decoder_steps({"type": "Sequence", "decoders": [{"type": "Sing"}]}, clean_up=False)
