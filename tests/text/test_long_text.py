"""Texts that are encoded in pieces have the ids of the whole text, wherever the pieces end."""

import json
import random
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from edgelm.text import long_text
from edgelm.text.regexes import GPT2, GPT4, QWEN
from edgelm.text.tokenizer import Tokenizer
from tests.text.goldens import CASES, finished
from tests.text.text_bombs import BOMBS
from tests.text.tokenizer_kinds import GPT4 as KIND_GPT4
from tests.text.tokenizer_kinds import KINDS, text_of

PIECE = 96
hostile = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

RUNS = [
    *"aAbe1!'.,/ſK",
    *" \t\n\r\x0b\x1c\x85\u00a0\u2003\u3000\u180e\u200b",
    *"\0\u0301\u0327\u1100\u1161今é🎉\u200d٣½ǅʰ\ue000",
    *["'s", "'S", "'re", "'ll", "''s", "!\n", "!\n ", " !", " a", "  a", "\r\n", " \n", "a1", "e\u0301", "ab", "aab"],
    *["<|endoftext|>", "<|endoftext", "<tool>", "<mask>", " <mask> ", "def", "    ", "\t\t", "éé", "Å"],
]
"""What meets in a hostile text, each piece up to some hundred times."""
texts = st.lists(
    st.tuples(st.sampled_from(RUNS), st.sampled_from([1, 1, 1, 2, 3, 7, 40, 120])), min_size=1, max_size=8
).map(lambda runs: "".join(unit * count for unit, count in runs))


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), byte_level])


def _digits() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


CUT: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "byte-level": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": _digits,
    "gpt2": lambda: _split(GPT2),
    "gpt4": lambda: _split(GPT4),
    "qwen": lambda: _split(QWEN),
}
"""Every way to cut words whose long texts are encoded in pieces."""


@cache
def random_bpe(cut: str, seed: int, nfc: bool = False) -> Tokenizer:
    """A tokenizer with random merges, which are in no order that a training would give, and with added tokens."""
    draw = random.Random(f"{cut} {seed}")
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    common = [letter for byte in ("ab1!' \n", "é今🎉\u0301") for letter in _letters(byte)]
    merges: list[tuple[str, str]] = []
    while len(merges) < 120:
        tokens = [*common, *vocab] if draw.random() < 0.4 else [*common, *list(vocab)[256:]]
        pair = draw.choice(tokens), draw.choice(tokens)
        if pair not in merges and len("".join(pair)) < 12:
            merges.append(pair)
            vocab.setdefault("".join(pair), len(vocab))
    draw.shuffle(merges)
    backend = Backend(models.BPE(vocab, merges, ignore_merges=draw.random() < 0.5))
    backend.pre_tokenizer = CUT[cut]()
    backend.normalizer = normalizers.NFC() if nfc else None
    backend.add_special_tokens(["<|endoftext|>"])
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("    ", normalized=True)])
    backend.add_tokens([AddedToken("éé"), AddedToken("<mask>", lstrip=True)])
    if draw.random() < 0.5:
        end = backend.token_to_id("<|endoftext|>")
        special = [("<|endoftext|>", end)]
        single = "<|endoftext|> $A <|endoftext|>"
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=special),
            ]
        )
    return Tokenizer.from_json(backend.to_str())


def _letters(text: str) -> list[str]:
    """The letters that stand for the bytes of a text."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [letter for word, _ in words for letter in word]


def check(tokenizer: Tokenizer, text: str) -> None:
    """Compare with the ids of the whole text."""
    for special in (False, True):
        whole = tokenizer._backend.encode(text, add_special_tokens=special).ids
        assert tokenizer.encode(text, add_special_tokens=special) == whole


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces so short that texts of hundreds of characters have many."""
    monkeypatch.setattr(long_text, "PIECE_CHARACTERS", PIECE)
    monkeypatch.setattr("edgelm.text.tokenizer.PIECE_CHARACTERS", PIECE)


@pytest.mark.parametrize("nfc", [False, True], ids=["", "nfc"])
@pytest.mark.parametrize("cut", CUT)
@hostile
@given(text=texts, seed=st.integers(0, 5), patience=st.sampled_from([0, 5, 256]))
def test_random_merges(cut: str, nfc: bool, text: str, seed: int, patience: int) -> None:
    tokenizer = random_bpe(cut, seed, nfc)
    assert tokenizer._long_texts is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "_WORD_START_TOKENS", patience)
        check(tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
@hostile
@given(text=texts)
def test_every_kind(kind: str, text: str) -> None:
    check(_of_kind(kind), text)


@cache
def _of_kind(kind: str) -> Tokenizer:
    return Tokenizer.from_json(text_of(kind))


@pytest.mark.parametrize("name", sorted({case["finished"] for case in CASES.values() if case["finished"]}))
@hostile
@given(text=texts)
def test_finished_tokenizers(name: str, text: str) -> None:
    check(finished(next(case for case in CASES if CASES[case]["finished"] == name)), text)


@pytest.mark.parametrize("kind", ["gpt2", "gpt4", "qwen"])
def test_no_piece_is_long(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    whole = long_text.LongTexts._whole

    def watched(self: long_text.LongTexts, text: str) -> object:
        nonlocal longest
        longest = max(longest, len(text))
        return whole(self, text)

    monkeypatch.setattr(long_text.LongTexts, "_whole", watched)
    for name, unit in BOMBS.items():
        longest = 0
        check(_of_kind(kind), unit * (2000 // len(unit)))
        assert longest == PIECE, name


def test_tokens_that_begin_within_characters_keep_a_text_whole() -> None:
    first, second, third = _letters("今")
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {second + third: 256, second + third + first: 257}
    backend = Backend(models.BPE(vocab, [(second, third), (second + third, first)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer.from_json(backend.to_str())
    text = "今" * 1000
    check(tokenizer, text)
    assert tokenizer.encode(text) == [vocab[first], *[257] * 999, 256]


def test_which_tokenizers_are_cut() -> None:
    cut = {kind for kind in KINDS if _of_kind(kind)._long_texts is not None}
    assert cut == {"gpt2", "gpt4", "qwen", "roberta", "codegen"}
    assert GPT4 == KIND_GPT4


@pytest.mark.parametrize(
    "text",
    [
        "!" * 90 + "\n" * 200 + "  \n\n a",  # line ends that belong to marks, and line ends that do not
        "a" * 80 + "'" * 300 + "s" * 300,
        "a" + " " * 500 + "b",
        " " * 95 + "\n" + " " * 95 + "\n" + "x",
        "a" * 95 + " " + "a" * 95 + "  " + "b",
        "1" * 1000 + "'re",
        ("<|endoftext|>" * 20 + "a") * 20,
        "<|endoftext" * 100,
        "🎉" * 400 + "é" * 400,
    ],
)
def test_where_expressions_look_ahead(text: str) -> None:
    for cut in CUT:
        for start in range(0, 60, 4):
            check(random_bpe(cut, start % 6), "xy"[: start % 2] + "a" * (start // 2) + text)


def test_a_token_that_looks_around_keeps_a_text_whole() -> None:
    tokenizer = _of_kind("codegen")
    check(tokenizer, "undefined def " * 100)
    check(tokenizer, "a \t\t b" * 100)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("unknown", [None, "<|endoftext|>"])
def test_bytes_without_a_token_keep_a_text_whole(fuse: bool, unknown: str | None) -> None:
    letters = [letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter != _letters("\x06")[0]]
    vocab = {letter: i for i, letter in enumerate(["<|endoftext|>", *letters, "aa"])}
    backend = Backend(models.BPE(vocab, [("a", "a")], unk_token=unknown, fuse_unk=fuse))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|endoftext|>"])
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert tokenizer._long_texts is not None
    for text in ("a" * 500, "a" * 200 + "\x06" * 12 + "é今" * 50 + "\x06" * 14 + "a" * 300, "\x06" * 13 + "今a" * 300):
        check(tokenizer, text)


def test_files_without_the_models_type() -> None:
    content = json.loads(text_of("gpt2"))
    del content["model"]["type"]
    tokenizer = Tokenizer.from_json(json.dumps(content))
    assert tokenizer._long_texts is not None
    check(tokenizer, "aaa the " * 100)


def test_a_split_special_token_keeps_a_text_whole() -> None:
    tokenizer = Tokenizer.from_json(text_of("gpt2"))
    tokenizer._backend.encode_special_tokens = True
    check(tokenizer, "<|endoftext|>" * 100)
