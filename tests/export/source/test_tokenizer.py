"""A checkpoint's tokenizer files, finished by transformers: goldens, live comparison, damaged and hostile folders."""

import importlib.util
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from edgelm.errors import PromptError, TokenizerError
from edgelm.text.tokenizer import Tokenizer
from edgelm_export.source.tokenizer import conversion_notes, load_tokenizer
from tests.text.goldens import CASES, DATA, GOLDENS, check_golden, few, finished, streamed, texts

pytestmark = pytest.mark.export


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
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers_goldens(home: Path, name: str) -> None:
    check_golden(load(home / name), CASES[name])


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["finished"]])
def test_the_committed_tokenizers_are_what_the_build_side_makes(home: Path, name: str) -> None:
    assert load(home / name).to_json() == finished(name).to_json()


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


def refuse(folder: Path, match: str) -> None:
    with pytest.raises(TokenizerError, match=match) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_missing_folder_and_files(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "nowhere is not a folder")
    refuse(tmp_path, "looked for tokenizer.json, or vocab.json with merges.txt, or vocab.txt")
    (tmp_path / "vocab.json").write_text("{}")
    refuse(tmp_path, "looked for")
    (tmp_path / "spiece.model").write_bytes(b"\0\1")
    refuse(tmp_path, "names no tokenizer class for spiece.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    refuse(tmp_path, "spiece.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NoTokenizer"}')
    refuse(tmp_path, "spiece.model")
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
    refuse(tmp_path, file)


BAD_SETTINGS: list[dict[str, Any]] = [
    {"add_prefix_space": "yes"},
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
]


@pytest.mark.parametrize("config", BAD_SETTINGS, ids=json.dumps)
def test_wrong_settings_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    shutil.copytree(DATA / "byte_bpe", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    refuse(tmp_path, "tokenizer_config.json")


def test_huge_and_binary_files(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(64 * 2**20 + 1)  # sparse: takes no room on disk
    refuse(tmp_path, "tokenizer.json is larger than 67108864 bytes")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    refuse(tmp_path, "tokenizer.json.*utf-8")


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_no_code_of_the_folder_runs(tmp_path: Path, file: str) -> None:
    shutil.copytree(DATA / "byte_bpe_json", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config = {"tokenizer_class": "GPT2Tokenizer", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    config["vocab_file"] = config["tokenizer_file"] = "/etc/passwd"
    (tmp_path / file).write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).encode("x") == load(DATA / "byte_bpe_json").encode("x")
    (tmp_path / file).write_text(json.dumps(config | {"tokenizer_class": "EvilTokenizer"}))
    refuse(tmp_path, "Tokenizer class EvilTokenizer does not exist")
    assert "evil" not in sys.modules


NAMES = ("Roberta", "Albert", "Llama", "T5", "XLMRoberta", "Bart", "CodeGen", "Deberta", "MBart", "XGLM", "Qwen2")


@pytest.mark.parametrize("name", [*(f"{name}Tokenizer" for name in NAMES), "LlamaTokenizerFast", "BloomTokenizerFast"])
def test_a_class_of_another_model_beside_a_complete_tokenizer_json(tmp_path: Path, name: str) -> None:
    shutil.copytree(DATA / "byte_bpe_json", tmp_path, dirs_exist_ok=True)
    config = {"tokenizer_class": name} | (
        {"add_prefix_space": None} if name in ("T5Tokenizer", "LlamaTokenizer") else {}
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    hf, tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(tmp_path)
    for text in (*GOLDENS["texts"], "</s><s> [CLS]<pad>", " x "):
        ids = hf(text).input_ids
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == hf.decode(ids)


def test_add_prefix_space_of_null_is_the_default(tmp_path: Path) -> None:
    shutil.copytree(DATA / "byte_bpe", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": null}')
    assert load_tokenizer(tmp_path).to_json() == load(DATA / "byte_bpe").to_json()


def test_a_tokenizer_without_a_token_for_unknown_characters(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate("ACDEFG")}))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    protein = load_tokenizer(tmp_path)
    assert protein.encode("FACED") == [4, 0, 1, 3, 2]
    with pytest.raises(PromptError, match="cannot encode this text"):
        protein.encode("FAXED")


def test_what_a_tokenizer_json_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(DATA / "byte_bpe_json", tmp_path, dirs_exist_ok=True)
    original = transformers.PreTrainedTokenizerFast._batch_encode_plus
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerFast,
        "_batch_encode_plus",
        lambda self, texts, **options: original(self, [text.replace("\x1b", "") for text in texts], **options),
    )
    refuse(tmp_path, "transformers treats 'a.x00b.* in a way that a tokenizer.json cannot hold, so the tokenizer of")


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "pipeline", "AutoModel", "__doc__"])
def test_a_class_that_is_no_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    shutil.copytree(DATA / "byte_bpe_json", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    refuse(tmp_path, "tokenizer_config.json")


def test_a_class_without_a_fast_version_is_refused(tmp_path: Path) -> None:
    shutil.copytree(DATA / "byte_bpe_json", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    refuse(tmp_path, "is a ByT5Tokenizer, of which transformers has no fast version; give a tokenizer.json")


def test_settings_of_transformers_5(tmp_path: Path) -> None:
    shutil.copytree(DATA / "byte_bpe_json", tmp_path, dirs_exist_ok=True)
    config = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<tool>", "river"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<tool>river") == [512, 513]
    assert tokenizer.decode([512, 513], skip_special_tokens=True) == ""


def test_a_gpt2_with_only_a_vocab_txt_has_the_tokenizer_of_bert(tmp_path: Path) -> None:
    shutil.copy(DATA / "chinese" / "vocab.txt", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert load_tokenizer(tmp_path).to_json() == load(DATA / "chinese").to_json()


@pytest.mark.parametrize(
    ("name", "text"), [("XLNetTokenizer", "two  spaces"), ("AlbertTokenizer", "two  spaces"), ("T5Tokenizer", None)]
)
def test_a_slow_tokenizer_that_differs_is_noted(tmp_path: Path, name: str, text: str | None) -> None:
    """AutoTokenizer loads the conversion of a sentencepiece model, whatever it makes of blanks at the end."""
    save_sentencepiece(tmp_path / "spiece.model", model_type="unigram")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    tokenizer = load_tokenizer(tmp_path)
    hf = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    check_against(hf, tokenizer)
    notes = conversion_notes(tmp_path, tokenizer)
    if text is None:
        assert notes == ()
    else:
        assert f"slow tokenizer ({name}, use_fast=False) encodes '{text}" in notes[0] and len(notes) == 1
    hf.save_pretrained(tmp_path)  # a complete tokenizer.json was not converted
    assert conversion_notes(tmp_path, tokenizer) == ()


def test_a_special_token_that_is_added_twice_keeps_its_first_flags(tmp_path: Path) -> None:
    """The conversion adds </s> for the text as it is. special_tokens_map.json adds it again for normalized text."""
    save_sentencepiece(tmp_path / "sentencepiece.bpe.model", model_type="unigram")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    again = {"content": "</s>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": again}))
    tokenizer = load_tokenizer(tmp_path)
    hf = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    for read in (tokenizer, Tokenizer.from_json(tokenizer.to_json())):
        check_against(hf, read)
        for text in ("one  </s> two", " </s>", "</s></s> x"):
            assert read.encode(text) == hf(text).input_ids


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizerFast"])
def test_a_class_whose_files_are_missing_is_named(tmp_path: Path, name: str) -> None:
    shutil.copy(DATA / "chinese" / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    refuse(tmp_path, f"class {name.removesuffix('Fast')} .* reads .*, but the folder has vocab.txt; set tokenizer_cl")


def test_a_sentencepiece_model_of_gpt2_without_a_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"\0\1")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refuse(tmp_path, "GPT2Tokenizer .* reads merges.txt and vocab.json, but the folder has spiece.model; set")


def save_sentencepiece(file: Path, **options: Any) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    with file.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for text in GOLDENS["texts"] if text.isprintable()] * 20),
            model_writer=model,
            vocab_size=500,
            hard_vocab_limit=False,
            pad_id=3,
            minloglevel=2,
            **options,
        )


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_a_sentencepiece_model_becomes_a_tokenizer_json(tmp_path: Path, byte_fallback: bool) -> None:
    file, name = ("tokenizer.model", "LlamaTokenizer") if byte_fallback else ("spiece.model", "T5Tokenizer")
    save_sentencepiece(
        tmp_path / file,
        model_type="bpe" if byte_fallback else "unigram",
        byte_fallback=byte_fallback,
        normalization_rule_name="identity" if byte_fallback else "nmt_nfkc",
        remove_extra_whitespaces=not byte_fallback,
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    tokenizer = load_tokenizer(tmp_path)
    hf = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    check_against(hf, tokenizer)
    hf.save_pretrained(tmp_path / "fast")  # a tokenizer.json, with "add_prefix_space": null for T5's class
    check_against(hf, load_tokenizer(tmp_path / "fast"))
    again = Tokenizer.from_json(tokenizer.to_json())
    ids = tokenizer.encode("Hello, world! 今天 🎉")
    assert streamed(again, ids, True) == hf.decode(ids, skip_special_tokens=True)


def test_a_sentencepiece_model_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spiece.model").write_bytes(b"")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    monkeypatch.setattr("edgelm_export.source.tokenizer.find_spec", lambda name: None)
    refuse(tmp_path, "spiece.model needs the package sentencepiece")


def transformers_tokenizer(name: str, folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("make_goldens", DATA / "make_goldens.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reference(name, folder)


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


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gpt2", "gpt2-files", "stories-6m", "slm4096", "mingpt_nano_sort"])
def test_real_tokenizers(tmp_path: Path, name: str, shared_folder: Path) -> None:
    gpt2 = shared_folder / "data" / "gpt2_tokenizer"
    if name == "gpt2":
        shutil.copy(gpt2 / "tokenizer.json", tmp_path)
    elif name == "gpt2-files":
        shutil.copy(gpt2 / "encoder.json", tmp_path / "vocab.json")
        shutil.copy(gpt2 / "vocab.bpe", tmp_path / "merges.txt")
    folder = tmp_path if name.startswith("gpt2") else shared_folder / "checkpoints" / name
    kind = transformers.GPT2TokenizerFast if name.startswith("gpt2") else transformers.AutoTokenizer
    hf, tokenizer = kind.from_pretrained(str(folder), local_files_only=True), load_tokenizer(folder)
    check_against(hf, tokenizer)
    for text in GOLDENS["texts"]:
        ids = tokenizer.encode(text)
        assert ids == hf(text).input_ids
        assert tokenizer.decode(ids) == hf.decode(ids) == streamed(tokenizer, ids, False)
