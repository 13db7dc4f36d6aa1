"""The tokenizer: goldens from transformers, live comparison, streams, bad files and hostile text."""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from edgelm.errors import PromptError, TokenizerError
from edgelm.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data" / "tokenizers"
SHARED = Path(__file__).parents[3] / "shared"
GOLDENS = json.loads((DATA / "goldens.json").read_text(encoding="utf-8"))
CASES: dict[str, dict[str, Any]] = GOLDENS["cases"]
BOTH = [False, True]

few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# Plain text is too tame: spaces, marks, cleanup patterns, special tokens and CJK must meet.
SEEDS = [
    "<|endoftext|>",
    "[SEP]",
    "<tool>",
    " n't",
    " ' ",
    " .",
    "'s",
    "é",
    "e\u0301",
    "🎉",
    "\u200d",
    "今天",
    "\n",
    "  ",
]
texts = st.lists(st.one_of(st.sampled_from(SEEDS), st.text(max_size=8)), max_size=12).map("".join)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out every golden case in a folder of its own."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, case in CASES.items():
        shutil.copytree(DATA / case["base"], root / name)
        for file, content in case["files"].items():
            (root / name / file).unlink(missing_ok=True)
            if content:
                (root / name / file).write_text(json.dumps(content), encoding="utf-8")
    return root


@cache
def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return "".join(map(stream.push, ids)) + stream.flush()


def check_golden(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    assert [tokenizer.encode(text) for text in GOLDENS["texts"]] == case["ids"]
    assert [tokenizer.encode(text, add_special_tokens=False) for text in GOLDENS["texts"]] == case["plain"]
    decoded = zip(case["ids"] + case["streams"], case["decoded"], case["skipped"], strict=True)
    for ids, text, skipped in decoded:
        assert tokenizer.decode(ids) == streamed(tokenizer, ids, False) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == streamed(tokenizer, ids, True) == skipped


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers_goldens(home: Path, name: str) -> None:
    check_golden(load(home / name), CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_saved_folder_is_equal(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # as an exported bundle has it
    load(home / name).save(tmp_path)
    check_golden(load(tmp_path), CASES[name])


@pytest.mark.parametrize("name", [name for name in CASES if "split" not in name])
def test_tokenizer_json_alone_is_equal(home: Path, tmp_path: Path, name: str) -> None:
    content = load(home / name).to_json()
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    for tokenizer in (Tokenizer.from_json(content), load(tmp_path)):
        check_golden(tokenizer, CASES[name])
        assert tokenizer.to_json() == content


@pytest.mark.parametrize("name", CASES)
@few
@given(data=st.data(), skip=st.booleans())
def test_streams_join_to_decode(home: Path, name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = load(home / name)
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


def test_stream_never_splits_a_character(home: Path) -> None:
    tokenizer = load(home / "bpe-json")
    text = "é 今天 🎉👨‍👩‍👧 a\u0301!"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # the small vocabulary cuts inside characters
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) == text and stream.flush() == ""
    assert not any("\ufffd" in piece for piece in pieces)
    assert [stream.push(token_id) for token_id in tokenizer.encode("🎉")[:-1]][-1] == ""
    assert stream.flush() == "\ufffd"


def test_stream_holds_back_what_the_clean_up_may_change(home: Path) -> None:
    tokenizer = load(home / "bpe-json-clean-up")
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
    "strip": decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0), decoders.Fuse()]),
    "two": decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 1, 0)]),
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
        "<0x41>",
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
    tokenizer = Tokenizer.from_folder(DATA / "byte_bpe_json")
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


def test_encode_prompt_drops_only_what_closes_the_text(home: Path) -> None:
    chinese = load(home / "chinese")
    cls, sep = chinese.token_id("[CLS]"), chinese.token_id("[SEP]")
    ids = chinese.encode("今天")
    assert ids[0] == cls and ids[-1] == sep
    assert chinese.encode_prompt("今天") == ids[:-1]
    assert chinese.encode_prompt("") == [cls]
    assert chinese.encode_prompt("今天[SEP]")[-1] == sep  # typed by the user, so it stays
    bos = load(home / "bpe-files-bos")
    assert bos.encode_prompt("x") == bos.encode("x") and bos.encode_prompt("")


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
def test_bad_ids_are_named(home: Path, bad: Any) -> None:
    tokenizer = load(home / "bpe-json")
    uses: list[Callable[[], str]] = [lambda: tokenizer.decode([5, bad]), lambda: tokenizer.stream().push(bad)]
    for use in uses:
        with pytest.raises(PromptError, match=r"token id .* outside the vocabulary; ids go from 0 to 511") as caught:
            use()
        assert len(str(caught.value)) < 200
        assert (isinstance(bad, int) and abs(bad) > 2**63) or repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", ["12", 5, None])
def test_ids_must_be_a_list(home: Path, bad: Any) -> None:
    with pytest.raises(PromptError, match="token id"):
        load(home / "bpe-json").decode(bad)


@pytest.mark.parametrize("bad", ["a\ud800b", "\udfff", b"bytes", 5, None, ["a"]])
def test_bad_texts(home: Path, bad: Any) -> None:
    tokenizer = load(home / "bpe-json")
    for use in (tokenizer.encode, tokenizer.encode_prompt, tokenizer.token_id):
        with pytest.raises(PromptError, match=r"surrogate|must be a str") as caught:
            use(bad)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bpe-json", "chinese", "chars"])
@pytest.mark.parametrize("bomb", ["a", "^", " ", "今", "\0", "א", "a" + "\u0301" * 999, "<|endoftext|>", "[SEP]"])
def test_text_bombs_take_linear_time(home: Path, name: str, bomb: str) -> None:
    tokenizer = load(home / name)
    text = bomb * (100_000 // len(bomb))
    begun = time.perf_counter()
    ids = tokenizer.encode(text)
    tokenizer.decode(ids)
    assert time.perf_counter() - begun < 5  # about 0.1 s; a quadratic way would need minutes


def test_long_streams_take_linear_time(home: Path) -> None:
    tokenizer = load(home / "chinese")  # with clean-up
    stream = tokenizer.stream()
    ids = [7, 30, 100] * 20_000
    begun = time.perf_counter()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
    assert time.perf_counter() - begun < 10


def refuse(folder: Path, match: str) -> None:
    with pytest.raises(TokenizerError, match=match) as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_missing_folder_and_files(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "nowhere is not a folder")
    refuse(tmp_path, "looked for tokenizer.json, or vocab.json with merges.txt, or vocab.txt")
    (tmp_path / "vocab.json").write_text("{}")
    refuse(tmp_path, "looked for")
    (tmp_path / "spiece.model").write_bytes(b"\0\1")
    refuse(tmp_path, "only spiece.model, no tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    refuse(tmp_path, "'T5Tokenizer' .*spiece.model")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    refuse(tmp_path, "tokenizer.json is not a file")


BAD_FILES = {
    "tokenizer.json": [
        "",
        "{",
        "[]",
        "{}",
        "null",
        '{"version": "1.0"}',
        '{"model": 5}',
        "[" * 100_000,
        '{"a": "\ud800"}',
    ],
    "tokenizer_config.json": ["{", "[]", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"],
    "special_tokens_map.json": ["{", "5", '{"bos_token": 5}', '{"bos_token": {"content": 5}}', '{"pad_token": ["x"]}'],
    "added_tokens.json": ["{", "[]", '{"x": "1"}', '{"x": true}', '{"x": -1.5}'],
    "config.json": ["{", "[]"],
    "vocab.json": ["{", "[]", '{"a": "b"}', '{"a": 1.5}', '{"a": -1}', '{"a": 99999999999}', '{"a": true}'],
    "merges.txt": ["#v\na\n", "#v\na b c\n", "#v\nnot-there either\n"],
}


@pytest.mark.parametrize(("file", "content"), [(file, bad) for file, bads in BAD_FILES.items() for bad in bads])
def test_broken_files_are_named(tmp_path: Path, file: str, content: str) -> None:
    shutil.copytree(DATA / "byte_bpe", tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes(content.encode("utf-8", "surrogatepass"))
    refuse(tmp_path, "merges.txt|vocab.json" if file in ("vocab.json", "merges.txt") else f"{file}|settings beside")


BAD_SETTINGS: list[dict[str, Any]] = [
    {"add_prefix_space": "yes"},
    {"add_prefix_space": None},
    {"clean_up_tokenization_spaces": 1},
    {"split_special_tokens": "true"},
    {"bos_token": 5},
    {"pad_token": {"content": "x", "lstrip": 1}},
    {"pad_token": {"lstrip": True}},
    {"additional_special_tokens": "abc"},
    {"additional_special_tokens": [1]},
    {"extra_special_tokens": "x"},
    {"extra_special_tokens": {"x": 1}},
    {"added_tokens_decoder": 5},
    {"added_tokens_decoder": {"x": {"content": "y"}}},
    {"added_tokens_decoder": {"1": "y"}},
    {"added_tokens_decoder": {"1": {"content": 1}}},
    {"tokenizer_class": 5},
    {"tokenizer_class": "LlamaTokenizer"},
    {"add_bos_token": True, "bos_token": None},
    {"add_bos_token": 1},
]


@pytest.mark.parametrize("config", BAD_SETTINGS, ids=json.dumps)
def test_wrong_settings_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    shutil.copytree(DATA / "byte_bpe", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    refuse(tmp_path, "tokenizer_config.json|unknown class|settings beside")


def test_huge_and_binary_files(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(64 * 2**20 + 1)  # sparse: takes no room on disk
    refuse(tmp_path, "tokenizer.json is larger than 67108864 bytes")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    refuse(tmp_path, "tokenizer.json is not UTF-8")


def test_no_code_of_the_folder_runs(tmp_path: Path) -> None:
    shutil.copytree(DATA / "byte_bpe_json", tmp_path, dirs_exist_ok=True)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config = {"tokenizer_class": "GPT2Tokenizer", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    config["vocab_file"] = config["tokenizer_file"] = "/etc/passwd"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(tmp_path).encode("x") == load(DATA / "byte_bpe_json").encode("x")
    assert "evil" not in sys.modules


def test_panics_become_errors(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """Like pyo3's: not an Exception."""

    class Backend:
        def encode(self, text: str, add_special_tokens: bool) -> None:
            raise PanicException("called `Option::unwrap()`\nsecond line")

    tokenizer = Tokenizer.from_folder(home / "chars")
    monkeypatch.setattr(tokenizer, "_backend", Backend())
    with pytest.raises(PromptError, match=r"unwrap.*; shorten") as caught:
        tokenizer.encode("x")
    assert "second" not in str(caught.value)


def test_save_to_a_missing_folder_and_split_special_tokens(home: Path, tmp_path: Path) -> None:
    tokenizer = load(home / "bpe-json-split-special")
    with pytest.raises(TokenizerError, match="cannot write"):
        tokenizer.save(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match="use save"):
        tokenizer.to_json()
    with pytest.raises(TokenizerError, match=r"tokenizer.json cannot be read"):
        Tokenizer.from_json("{")


def test_import_is_light() -> None:
    heavy = {"numpy", "huggingface_hub", "onnxruntime"}
    code = f"import sys, edgelm.text.tokenizer; print([m for m in sys.modules if m in {heavy}])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=DATA.parents[2])
    assert run.stdout.strip() == "[]"


def transformers_tokenizer(name: str, folder: Path) -> Any:
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("make_goldens", DATA / "make_goldens.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reference(name, folder)


@pytest.mark.export
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers_live(home: Path, name: str) -> None:
    hf, tokenizer = transformers_tokenizer(name, home / name), load(home / name)
    check_against(hf, tokenizer)


def check_against(hf: Any, tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == max(hf.get_vocab().values()) + 1

    @few
    @given(texts, st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30), st.booleans())
    def check(text: str, ids: list[int], flag: bool) -> None:
        assert tokenizer.encode(text, add_special_tokens=flag) == hf(text, add_special_tokens=flag).input_ids
        for some in (ids, tokenizer.encode(text)):
            assert tokenizer.decode(some, skip_special_tokens=flag) == hf.decode(some, skip_special_tokens=flag)

    check()


@pytest.mark.export
@pytest.mark.shared
@pytest.mark.parametrize("name", ["gpt2", "gpt2-files", "stories-6m", "slm4096", "mingpt_nano_sort"])
def test_real_tokenizers(tmp_path: Path, name: str) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here: real checkpoints are not part of the repository")
    transformers = pytest.importorskip("transformers")
    gpt2 = SHARED / "data" / "gpt2_tokenizer"
    if name == "gpt2":
        shutil.copy(gpt2 / "tokenizer.json", tmp_path)
    elif name == "gpt2-files":
        shutil.copy(gpt2 / "encoder.json", tmp_path / "vocab.json")
        shutil.copy(gpt2 / "vocab.bpe", tmp_path / "merges.txt")
    folder = tmp_path if name.startswith("gpt2") else SHARED / "checkpoints" / name
    kind = transformers.GPT2TokenizerFast if name.startswith("gpt2") else transformers.AutoTokenizer
    hf, tokenizer = kind.from_pretrained(str(folder), local_files_only=True), Tokenizer.from_folder(folder)
    check_against(hf, tokenizer)
    for text in GOLDENS["texts"]:
        ids = tokenizer.encode(text)
        assert ids == hf(text).input_ids
        assert tokenizer.decode(ids) == hf.decode(ids) == streamed(tokenizer, ids, False)
