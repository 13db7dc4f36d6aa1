"""Which tokenizer.json files are read: all that popular models have, and nothing that could harm the process."""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, processors

from edgelm.errors import PromptError, TokenizerError
from edgelm.text.regexes import RegexError, read_regex
from edgelm.text.rust import rust_errors
from edgelm.text.tokenizer import MAX_TEXT_CHARACTERS, Tokenizer
from edgelm.text.tokenizer_file import parse_tokenizer_json
from tests.text.goldens import DATA
from tests.text.tokenizer_kinds import BLOOM, DEEPSEEK, GPT2, GPT4, GPT4O, KINDS, QWEN, charsmap, text_of, with_charsmap

A_THOUSAND_DIGITS = 10**1000


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_and_written_alike(kind: str) -> None:
    backend, tokenizer = KINDS[kind](), Tokenizer.from_json(text_of(kind))
    again = Tokenizer.from_json(tokenizer.to_json())
    for text in ("the aa a, 今天é 12!  \n<s>x</s>", "", "  a  "):
        assert tokenizer.encode(text) == again.encode(text) == backend.encode(text).ids


@pytest.mark.parametrize("name", sorted(path.name for path in (DATA / "finished").iterdir()))
def test_finished_tokenizers_are_read(name: str) -> None:
    text = (DATA / "finished" / name).read_text(encoding="utf-8")
    backend = Backend.from_str(text)
    assert parse_tokenizer_json(text)[1].vocab_size == max(backend.get_vocab().values()) + 1


def test_models_without_a_type_are_read() -> None:
    for kind in ("gpt2", "bert", "words", "t5"):
        content = json.loads(text_of(kind))
        del content["model"]["type"]
        assert Tokenizer.from_json(json.dumps(content)).encode("a") == Tokenizer.from_json(text_of(kind)).encode("a")


def changed(kind: str, **parts: Any) -> str:
    """The tokenizer.json of a kind with other parts; a part's name may be a path, such as ``model__vocab``."""
    content = json.loads(text_of(kind))
    for name, value in parts.items():
        *path, last = name.split("__")
        at = content
        for step in path:
            at = at[step]
        at[last] = value
    return json.dumps(content)


def replace(old: dict[str, str], new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": old, "content": new}


def sequence(name: str, *parts: Any) -> dict[str, Any]:
    return {"type": "Sequence", name: list(parts)}


def nested(depth: int) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        part = sequence("normalizers", part)
    return part


BYTE_LEVEL = {"type": "ByteLevel"}
DOUBLE = replace({"String": "a"}, "aa")
TEMPLATE = json.loads(text_of("t5"))["post_processor"]
PIECE = {"Sequence": {"id": "A", "type_id": 0}}
REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "doubling": (
        lambda: changed("words", normalizer=sequence("normalizers", *[DOUBLE] * 7)),
        "more than 64 times as long by its normalizer",
    ),
    "growing expression": (
        lambda: changed("words", normalizer=replace({"Regex": "a?"}, "b" * 64)),
        "more than 64 times as long",
    ),
    "prepending": (lambda: changed("words", normalizer={"type": "Prepend", "prepend": "▁" * 64}), "more than 64 times"),
    "bytes of bytes": (
        lambda: changed("words", normalizer=sequence("normalizers", *[BYTE_LEVEL] * 7)),
        "more than 64 times",
    ),
    "doubling decoder": (
        lambda: changed("words", decoder=sequence("decoders", *[DOUBLE] * 7)),
        "more than 64 times as long by its decoder",
    ),
    "doubling template": (
        lambda: changed("t5", post_processor={**TEMPLATE, "single": [PIECE, PIECE]}),
        "has a sequence twice in post_processor.single",
    ),
    "templates in a row": (
        lambda: changed("t5", post_processor=sequence("processors", TEMPLATE, TEMPLATE)),
        "two post-processors that add tokens",
    ),
    "token without an id": (
        lambda: changed("t5", post_processor={**TEMPLATE, "special_tokens": {}}),
        "puts the token '</s>' into texts without an id",
    ),
    "unknown id in a text": (
        lambda: changed("bert", post_processor={"type": "BertProcessing", "sep": ["x", 900], "cls": ["y", 1]}),
        "puts the id 900 into texts, but its highest id is",
    ),
    "deep": (lambda: changed("words", normalizer=nested(5)), "sequences of sequences deeper than 4"),
    "many": (
        lambda: changed("words", normalizer=sequence("normalizers", *[{"type": "NFC"}] * 65)),
        "at most 64 parts for normalizer",
    ),
    "unknown part": (
        lambda: changed("words", normalizer={"type": "Python"}),
        "normalizer of the unknown type 'Python'",
    ),
    "unknown model": (lambda: changed("words", model__type="Neural"), "model of the unknown type 'Neural'"),
    "unknown field": (lambda: changed("words", extra=1), "the unknown field 'extra'"),
    "missing field": (lambda: changed("words", normalizer={"type": "Replace"}), "has a Replace without content"),
    "wrong type": (
        lambda: changed("words", decoder={"type": "WordPiece", "prefix": 1, "cleanup": True}),
        "needs a text of 0 to 1,024 characters for decoder.prefix",
    ),
    "sparse id": (
        lambda: changed("words", model__vocab={"<unk>": 0, "a": 4_000_000_000}),
        "an id in model.vocab that is not from 0 to 4,194,303",
    ),
    "negative id": (lambda: changed("words", model__vocab={"<unk>": 0, "a": -1}), "that is not from 0"),
    "fraction as id": (lambda: changed("words", model__vocab={"<unk>": 0, "a": 1.0}), "that is no whole number"),
    "the same id twice": (lambda: changed("words", model__vocab={"<unk>": 0, "a": 0}), "two tokens of model.vocab"),
    "a key twice": (
        lambda: text_of("words").replace('"the":2', '"the":2,"the":1'),
        "has the field 'the' twice",
    ),
    "long token": (
        lambda: changed("words", model__vocab={"<unk>": 0, "a" * 1025: 1}),
        "a token in model.vocab of more than 1,024 characters",
    ),
    "absent parts of a merge": (lambda: changed("gpt2", model__merges=[["a", "qq"]]), "Token `qq` out of vocabulary"),
    "merge against the prefix": (
        lambda: changed("gpt2", model__continuing_subword_prefix="####"),
        "a merge whose second token does not begin with '####'",
    ),
    "random": (lambda: changed("gpt2", model__dropout=0.1), r"draws tokens at random \(model.dropout is 0.1\)"),
    "long words": (
        lambda: changed("bert", model__max_input_chars_per_word=10**6),
        "from 0 to 1,000 for model.max_input_chars_per_word",
    ),
    "infinite score": (
        lambda: text_of("t5").replace("-4.0", "-1e999"),
        "score in model.vocab that is not from -1,000,000",
    ),
    "unknown piece": (lambda: changed("t5", model__unk_id=99), "for model.unk_id"),
    "empty pieces": (
        lambda: changed("words", pre_tokenizer={"type": "FixedLength", "length": 0}),
        "from 1 to 4,194,303 for pre_tokenizer.length",
    ),
    "huge number": (
        lambda: changed("words", decoder={"type": "Strip", "content": "a", "start": 0, "stop": A_THOUSAND_DIGITS}),
        "for decoder.stop",
    ),
    "slow expression": (
        lambda: changed(
            "words",
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False},
        ),
        r"the regular expression '\(a\+\)\+b' for pre_tokenizer.pattern, which repeats a group that itself repeats",
    ),
    "padding": (
        lambda: changed("words", padding={"strategy": "Wide"}),
        "needs BatchLongest or Fixed for padding.strategy",
    ),
    "version": (lambda: changed("words", version="2.0"), "has the version '2.0', and only '1.0' is known"),
    "table": (lambda: with_charsmap(b"\0\4\0\0" + b"\xff" * 1024), "damaged table for normalizer.precompiled_charsmap"),
    "text": (
        lambda: with_charsmap(charsmap({"a": "ü"}).replace(b"\0\0\0\x80", b"\1\0\0\x80")),
        "damaged table",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_harm_is_refused(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    build, words = REFUSED[name]
    with pytest.raises(TokenizerError, match=rf"tokenizer.json cannot be read.*{words}") as caught:
        Tokenizer.from_json(build())
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # where Rust writes its panics


def test_large_files_are_refused_before_they_are_parsed() -> None:
    for text, words in ((" " * (2**26 + 1), "has 67,108,865 bytes"), ("[" * (2**22 + 1), "more than 4,194,304 values")):
        began = time.process_time()
        with pytest.raises(TokenizerError, match=words):
            parse_tokenizer_json(text)
        assert time.process_time() - began < 2


def test_added_tokens_keep_the_ids_of_the_file() -> None:
    """Rust numbers them anew where the vocabulary has a hole."""
    content = json.loads(text_of("words"))
    content["model"]["vocab"] = {"<unk>": 0, "a": 5}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"] = [{"id": 6, "content": "<new>", **flags}]
    with pytest.raises(
        TokenizerError, match="gives the added token '<new>' the id 6, but the tokenizers library reads"
    ):
        Tokenizer.from_json(json.dumps(content))


def test_added_tokens_of_which_nothing_is_left_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """Rust would find them between any two bytes, and panic."""
    blanks = changed("codegen", normalizer={"type": "Strip", "strip_left": True, "strip_right": True})
    with pytest.raises(TokenizerError, match=r"has the added token '  +', of which its normalizer leaves nothing"):
        Tokenizer.from_json(blanks)
    assert capfd.readouterr().err == ""


def test_truncation_and_padding_of_the_file_change_no_ids() -> None:
    backend = KINDS["words"]()
    backend.enable_truncation(1)
    backend.enable_padding(length=9)
    assert Tokenizer.from_json(backend.to_str()).encode("the a the") == [2, 1, 2]


def test_what_is_written_can_be_read() -> None:
    words = Backend(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    words.decoder = decoders.Sequence([decoders.Replace("a", "a" * 65)])
    with pytest.raises(TokenizerError, match="more than 64 times"):
        Tokenizer(words).to_json()
    words.decoder = None
    words.post_processor = processors.BertProcessing(("</s>", 7), ("</s>", 7))
    with pytest.raises(TokenizerError, match="puts the id 7 into texts"):
        Tokenizer(words).to_json()


@pytest.mark.parametrize("pattern", [GPT2, GPT4, QWEN, GPT4O, BLOOM, *DEEPSEEK])
def test_expressions_of_popular_tokenizers_are_allowed(pattern: str) -> None:
    regex = read_regex(pattern)
    assert (regex.run_characters is None) == (pattern in (GPT2, GPT4, QWEN, GPT4O, r"\p{N}+", "[\r\n]"))


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("(a+)+b", "repeats a group that itself repeats"),
        ("(a|a)*b", "repeats a group that itself repeats or branches"),
        ("(a?){30}", "repeats a group"),
        ("a?" * 20 + "a" * 20, "can go on in more than 10,000 ways"),
        ("(a|b|c)" * 9, "more than 10,000 ways"),
        ("a{0,100}" * 3, "more than 10,000 ways"),
        ("a*a*a*b", "has 3 repetitions in a row, more than 2"),
        (r"(a)\1", r"uses \\1"),
        (r"(?<n>a)\k<n>", "uses"),
        ("(?~a)", "uses"),
        ("a{5000}", "repeats more than 1000 times"),
        ("a**", "repeats a repetition"),
        ("*a", "nothing to repeat"),
        ("(a", r"a \( without a \)"),
        ("a)", r"a \) without a \("),
        ("[a", r"a \[ without a \]"),
        ("[]a]", "an empty class"),
        ("a\\", "ends with a backslash"),
        ("(" * 9 + ")" * 9, "nested deeper than 8"),
        ("a" * 4097, "4,097 characters"),
    ],
)
def test_slow_and_unknown_expressions_are_refused(pattern: str, words: str) -> None:
    with pytest.raises(RegexError, match=words):
        read_regex(pattern)


@pytest.mark.parametrize(
    "pattern, least, run, crosses",
    [
        ("abc", 3, None, False),
        (r"\p{N}{2,3}x?", 2, None, False),
        (r"a|bb|(?:ccc)", 1, None, False),
        (r"(?:\r\n)+", 2, 16_384, True),
        (r"\s+$", 1, 16_384, False),
        (r"[^\s\p{L}]+[\r\n]*", 1, 2_048, False),
        (r".+?x", 2, 16_384, True),
        (r"[^a]+", 1, 16_384, True),
        (r"(?=\d+)", 0, 16_384, False),
    ],
)
def test_what_is_known_of_an_expression(pattern: str, least: int, run: int | None, crosses: bool) -> None:
    regex = read_regex(pattern)
    assert (regex.least_characters, regex.run_characters, regex.crosses_blanks) == (least, run, crosses)


def test_runs_that_an_expression_cannot_take_are_refused() -> None:
    tokenizer = Tokenizer.from_json(text_of("deepseek"))
    assert tokenizer.encode("aa " * 10_000)
    with pytest.raises(PromptError, match=r"a run of 16,385 characters without a blank.* takes 16,384 at most"):
        tokenizer.encode("a" * 16_385)
    with pytest.raises(PromptError, match="a run of 20,000 characters, and"):
        Tokenizer.from_json(text_of("bloom")).encode("aa " * 6666 + "aa")


def test_very_long_texts_are_refused() -> None:
    with pytest.raises(PromptError, match="has 16,777,217 characters, more than 16,777,216"):
        Tokenizer.from_json(text_of("gpt2")).encode("a" * (MAX_TEXT_CHARACTERS + 1))


class Timeout(Exception):
    """Raised by a signal handler, as Celery does."""


def test_exceptions_of_signal_handlers_pass_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_json(text_of("words"))
    for raised in (Timeout("soon"), Exception("plain"), ValueError("mine"), KeyboardInterrupt()):

        def handler(*_: object, raised: BaseException = raised) -> None:
            raise raised

        class Interrupted:
            """A backend during whose work a signal arrives."""

            def encode(self, text: str, add_special_tokens: bool, handler: Callable[..., None] = handler) -> None:
                handler(signal.SIGALRM, sys._getframe())  # as Python calls a handler

        monkeypatch.setattr(tokenizer, "_backend", Interrupted())
        with pytest.raises(type(raised)) as caught:
            tokenizer.encode("a")
        assert caught.value is raised


def test_errors_of_rust_are_told_from_others() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(PromptError, match=r"it failed \(a\); !"), rust_errors(PromptError, "it failed", "!"):
        raise panic("a\nb")
    with pytest.raises(SystemExit), rust_errors(PromptError, "it failed", "try again"):
        raise SystemExit


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers of POSIX")
def test_a_timer_that_goes_off_while_rust_works() -> None:
    tokenizer = Tokenizer.from_json(text_of("gpt2"))

    def ring(*_: object) -> None:
        raise Timeout

    previous = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(Timeout):
            while True:
                tokenizer.encode("the quick " * 1000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_the_corpus_of_the_fuzzer_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    for path in sorted((Path(__file__).parents[1] / "fuzz" / "corpus" / "tokenizer").glob("*.json")):
        if path.stem != "strip-end":  # refused where an id is decoded
            with pytest.raises(TokenizerError):
                Tokenizer.from_json(path.read_text(encoding="utf-8"))
    assert capfd.readouterr().err == ""
