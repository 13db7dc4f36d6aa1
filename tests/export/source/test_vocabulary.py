"""Vocabulary pruning keeps the logits of the tokens that stay and the domain's tokens, and spells every string."""

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgelm.engine.graph import Graph
from edgelm.errors import ExportError
from edgelm.loading import load
from edgelm.text.tokenizer import Tokenizer
from edgelm_export.pipeline import export
from edgelm_export.source.checkpoint import load_checkpoint
from edgelm_export.source.prune import FEATURE, prune_vocabulary
from edgelm_export.source.tokenizer import load_tokenizer
from edgelm_export.source.vocabulary import Vocabulary, prune_tokenizer
from tests.conftest import RunCommand
from tests.export.checkpoints import SMALL_FAMILIES, Shape, TorchModel, edit_json, greedy, save_checkpoint

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("few_tokens")]

WORDS = (
    "the cat sat on a mat and then another catalogue of matters was sitting there; théâtre, straße, 東京都 東北 🐈‍⬛"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
DOMAIN = "the cat sat on the mat\nand then another cat sat there\n\nat the end 🐈\n"
STRINGS = [
    "",
    " ",
    "zebra quux",
    "Hello, wörld!  \n\t",
    "日本語 東京",
    "👩‍👩‍👧 🏳️‍🌈 🐈‍⬛",
    "\0\x7f\x80ÿ",
    "ﷺ𝔘ª",
    "a" * 300,
]


def trained(kind: str) -> Tokenizer:
    """A small tokenizer, trained on a few words."""
    special = ["<|end|>", "[UNK]", "[CLS]", "[SEP]"]
    if kind in ("bytes", "bytes-bos"):
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "byte-fallback":  # as in Llama 2, Mistral and Gemma 3
        special += BYTES
        backend = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]", fuse_unk=True, byte_fallback=True))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=440, special_tokens=special)
    elif kind == "letters":
        backend = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.decoder = decoders.BPEDecoder()
        trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, end_of_word_suffix="</w>")
    elif kind == "wordpiece":
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)
    else:
        backend = tokenizers.Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="[UNK]")
    shuffled = random.Random(0).choices(WORDS.split(), k=2000)
    backend.train_from_iterator([" ".join(shuffled[i : i + 7]) for i in range(0, 2000, 7)], trainer)
    if kind == "bytes-bos":
        end = backend.token_to_id("<|end|>")
        backend.post_processor = processors.TemplateProcessing("<|end|> $A", None, [("<|end|>", end)])
    if kind == "wordpiece":
        cls, sep = (("[CLS]", backend.token_to_id("[CLS]")), ("[SEP]", backend.token_to_id("[SEP]")))
        backend.post_processor = processors.BertProcessing(sep, cls)
        backend.enable_padding(pad_id=cls[1], pad_token="[CLS]")
        backend.no_padding()
    backend.add_tokens([AddedToken("<user>", special=True), "another one"])
    state = json.loads(backend.to_str())
    # The trainer adds tokens of our own as special tokens only. The tokens of bytes must not be special.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_json(json.dumps(state))


KINDS = ["bytes", "bytes-bos", "byte-fallback", "letters", "wordpiece", "unigram"]


@cache
def pruned(kind: str) -> tuple[Tokenizer, Vocabulary]:
    tokenizer = trained(kind)
    return tokenizer, prune_tokenizer(tokenizer, DOMAIN)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_go_and_the_rest_are_numbered_from_0(kind: str) -> None:
    tokenizer, vocabulary = pruned(kind)
    new = vocabulary.tokenizer
    assert sorted(vocabulary.new_ids.values()) == list(range(len(vocabulary.new_ids)))
    assert new.vocab_size == len(vocabulary.new_ids) < tokenizer.vocab_size - 10
    for special in ("<|end|>", "[UNK]", "[CLS]", "[SEP]", "<user>", "another one"):
        old = tokenizer.token_id(special)
        assert old is not None
        assert new.token_id(special) == vocabulary.new_ids[old]
    assert Tokenizer.from_json(new.to_json()).to_json() == new.to_json()


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(words=st.lists(st.sampled_from(re.findall(r" (\w+)", DOMAIN)), max_size=12))
def test_the_domain_keeps_its_tokens(kind: str, words: list[str]) -> None:
    tokenizer, vocabulary = pruned(kind)
    text = " ".join(["the", *words])  # a space stands before each word, as in the domain
    before, after = tokenizer.encode(text), vocabulary.tokenizer.encode(text)
    assert after == [vocabulary.new_ids[old] for old in before]
    assert vocabulary.tokenizer.decode(after) == tokenizer.decode(before)


@pytest.mark.parametrize("text", [DOMAIN, *DOMAIN.splitlines(), "the cat sat there then"])
@pytest.mark.parametrize("kind", KINDS)
def test_lines_of_the_domain_keep_their_tokens(kind: str, text: str) -> None:
    tokenizer, vocabulary = pruned(kind)
    assert vocabulary.tokenizer.encode(text) == [vocabulary.new_ids[old] for old in tokenizer.encode(text)]


def check_spelling(kind: str, text: str) -> None:
    """Every string can still be spelt, and no string has more unknown tokens than before."""
    tokenizer, vocabulary = pruned(kind)
    before, after = tokenizer.encode(text), vocabulary.tokenizer.encode(text)
    assert vocabulary.tokenizer.decode(after) == tokenizer.decode(before)
    unknown = tokenizer.token_id("[UNK]")
    assert unknown is not None
    assert after.count(vocabulary.new_ids[unknown]) == before.count(unknown)


@pytest.mark.parametrize("text", [*STRINGS, WORDS])
@pytest.mark.parametrize("kind", KINDS)
def test_strings_are_still_spelt(kind: str, text: str) -> None:
    check_spelling(kind, text)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=200)
@given(text=st.one_of(st.text(), st.text(alphabet="".join(sorted(set(WORDS))))))
def test_every_string_is_still_spelt(kind: str, text: str) -> None:
    check_spelling(kind, text)
    if kind == "bytes" and not any(token in text for token in ("<|end|>", "[UNK]", "[CLS]", "[SEP]", "<user>")):
        _, vocabulary = pruned(kind)
        assert vocabulary.tokenizer.decode(vocabulary.tokenizer.encode(text)) == text


def test_merges_are_closed(tmp_path: Path) -> None:
    _, vocabulary = pruned("bytes")
    model = json.loads(vocabulary.tokenizer.to_json())["model"]
    made = {"".join(merge) for merge in model["merges"]}
    assert {part for merge in model["merges"] for part in merge} <= model["vocab"].keys()
    assert made <= model["vocab"].keys()
    assert {token for token in model["vocab"] if len(token) > 1} - made == {"<|end|>", "[UNK]", "[CLS]", "[SEP]"}
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys()


@pytest.mark.parametrize("name", ["tinystories_slice.txt", "tinyshakespeare.txt"])
@pytest.mark.shared
def test_the_real_tokenizer_of_gpt2(name: str, shared_folder: Path) -> None:
    tokenizer = load_tokenizer(shared_folder / "data" / "gpt2_tokenizer")
    text = (shared_folder / "data" / name).read_text(encoding="utf-8")[:400_000]
    vocabulary = prune_tokenizer(tokenizer, text, {50256})
    assert 3_000 < len(vocabulary.new_ids) < 15_000
    sample = text[1000:20_000]
    sample = sample[sample.index("\n") : sample.rindex("\n")]
    assert vocabulary.tokenizer.encode(sample) == [vocabulary.new_ids[old] for old in tokenizer.encode(sample)]
    for string in [*STRINGS, "<|endoftext|>", "pneumonoultramicroscopicsilicovolcanoconiosis"]:
        assert vocabulary.tokenizer.decode(vocabulary.tokenizer.encode(string)) == string
    assert vocabulary.tokenizer.token_id("<|endoftext|>") == vocabulary.new_ids[50256]


def test_a_word_level_tokenizer_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ExportError, match="cannot prune a WordLevel tokenizer"):
        prune_tokenizer(Tokenizer.from_json(backend.to_str()), "a")


SHAPE = Shape(width=20, heads=4, context=32, vocab=430)


def checkpoint_with_words(folder: Path, kind: str = "bytes", shape: Shape = SHAPE, **changes: Any) -> Path:
    """A checkpoint with a trained tokenizer and 4 rows too many in its table."""
    tokenizer = trained(kind)
    size = tokenizer.vocab_size + 4
    source = save_checkpoint(folder, Shape(**{**vars(shape), "vocab": size, **changes}))
    (source / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    end = tokenizer.token_id("<|end|>")
    edit_json(source / "config.json", bos_token_id=end, eos_token_id=end, pad_token_id=size - 1)
    settings = {
        "eos_token_id": [end, tokenizer.token_id("[SEP]")],
        "bos_token_id": end,
        "bad_words_ids": [[300], [end]],
    }
    (source / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return source


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    file = tmp_path / "domain.txt"
    file.write_text(DOMAIN, encoding="utf-8")
    return file


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_of_what_stays_are_those_of_the_whole_model(tied: bool, tmp_path: Path, domain: Path) -> None:
    source = checkpoint_with_words(tmp_path / "checkpoint", tied=tied)
    exported = export(str(source), tmp_path / "out", "fp32", vocabulary=domain)
    assert exported.certificate.passed
    old, new = load_tokenizer(source), load_tokenizer(tmp_path / "out")
    kept = prune_vocabulary(load_checkpoint(str(source)), domain)
    vocabulary = prune_tokenizer(old, DOMAIN, {old.vocab_size + 3})
    assert kept.model.config.vocab_size == len(vocabulary.new_ids) == new.vocab_size + 1  # the pad id has no token
    ids = old.encode("the cat sat on the mat then another cat")
    assert new.encode("the cat sat on the mat then another cat") == [vocabulary.new_ids[i] for i in ids]
    whole = TorchModel(source)
    wanted = whole.logits(ids)[:, list(vocabulary.new_ids)]
    session = Graph.open(exported.bundle, device="cpu", threads=1).session()
    assert np.abs(session.score(np.array([vocabulary.new_ids[i] for i in ids])) - wanted).max() <= 1e-4
    with torch.no_grad():
        exact = kept.model(torch.tensor([[vocabulary.new_ids[i] for i in ids]])).logits[0].numpy()
    assert np.abs(exact - wanted).max() <= 1e-5
    prompt = [vocabulary.new_ids[i] for i in ids[:4]]
    tokens = list(vocabulary.new_ids)
    chosen = list(ids[:4])
    for _ in range(20):  # the whole model, which must not choose a pruned token
        chosen.append(tokens[int(whole.logits(chosen)[-1, tokens].argmax())])
    assert [tokens[i] for i in greedy(session, prompt, 20)] == chosen[4:]


@pytest.mark.parametrize(
    ("family", "kind", "tied"),
    [
        ("llama", "byte-fallback", False),
        ("mistral", "byte-fallback", True),
        ("qwen2", "bytes", True),
        ("granite", "bytes", False),
        ("gemma3_text", "byte-fallback", True),
    ],
)
def test_logits_of_what_stays_in_other_families(
    family: str, kind: str, tied: bool, tmp_path: Path, domain: Path
) -> None:
    source = checkpoint_with_words(tmp_path / "checkpoint", kind, SMALL_FAMILIES[family], tied=tied)
    kept, old = prune_vocabulary(load_checkpoint(str(source)), domain), load_tokenizer(source)
    new_ids = prune_tokenizer(old, DOMAIN, {old.vocab_size + 3}).new_ids
    ids = old.encode("the cat sat on the mat then another cat")
    renumbered = [new_ids[i] for i in ids]
    assert kept.tokenizer.encode("the cat sat on the mat then another cat") == renumbered
    assert kept.architecture.vocab_size == len(new_ids) < old.vocab_size - 10
    wanted = TorchModel(source).logits(ids)[:, list(new_ids)]
    with torch.no_grad():
        exact = kept.model(torch.tensor([renumbered])).logits[0].numpy()
    assert np.abs(exact - wanted).max() <= 1e-5
    assert (kept.model.lm_head.weight is kept.model.model.embed_tokens.weight) == tied


def test_a_pruned_bundle_of_another_family(tmp_path: Path, domain: Path) -> None:
    source = checkpoint_with_words(tmp_path / "checkpoint", "byte-fallback", SMALL_FAMILIES["llama"])
    exported = export(str(source), tmp_path / "out", "fp32", vocabulary=domain)
    old = load_tokenizer(source)
    new_ids = prune_tokenizer(old, DOMAIN, {old.vocab_size + 3}).new_ids
    ids = old.encode("the cat sat on the mat then another cat")
    wanted = TorchModel(source).logits(ids)[:, list(new_ids)]
    session = Graph.open(exported.bundle, device="cpu", threads=1).session()
    assert np.abs(session.score(np.array([new_ids[i] for i in ids])) - wanted).max() <= 1e-3
    assert exported.bundle.manifest.required_features == (FEATURE,)
    assert load(tmp_path / "out").tokenizer.decode(load(tmp_path / "out").tokenizer.encode("zebra 🦓")) == "zebra 🦓"


def test_the_bundle_says_it(tmp_path: Path, domain: Path, edgelm_command: RunCommand) -> None:
    source = checkpoint_with_words(tmp_path / "checkpoint")
    out = tmp_path / "out"
    exported = export(str(source), out, "int8", vocabulary=domain, accept_quality_loss=True)
    manifest, old = exported.bundle.manifest, load_tokenizer(source)
    assert manifest.required_features == (FEATURE,)
    kept, size = manifest.architecture.vocab_size, old.vocab_size + 4
    assert manifest.source.vocab_size == size
    assert exported.notes[0] == f"{kept} of {size} tokens stayed"
    matrix = next(matrix for matrix in manifest.recipe.matrices if matrix.name == "transformer.wte.weight")
    assert matrix.shape == (kept, SHAPE.width)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((out / "generation_config.json").read_text(encoding="utf-8"))
    model = load(out)
    end, sep = model.tokenizer.token_id("<|end|>"), model.tokenizer.token_id("[SEP]")
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (kept, end, end)
    assert config["pad_token_id"] == kept - 1
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (end, [end, sep])
    assert f"vocabulary {kept:,} of {size:,}" in edgelm_command("info", str(out)).stdout
    assert f"{kept:,} of {size:,} tokens" in (out / "README.md").read_text(encoding="utf-8")
    assert edgelm_command("verify", str(out)).status == 0
    assert model.generate("zebra 🦓 東", max_new_tokens=5, eos_token_id=None).prompt == "zebra 🦓 東"


def test_files_that_are_refused(tmp_path: Path, domain: Path) -> None:
    source = checkpoint_with_words(tmp_path / "checkpoint")
    bad, empty = tmp_path / "bad.txt", tmp_path / "empty.txt"
    bad.write_bytes(b"abc\xff")
    empty.write_text(" \n", encoding="utf-8")
    for file, words in [
        (tmp_path / "nowhere", "cannot read"),
        (bad, "not UTF-8"),
        (empty, "empty"),
        (tmp_path, "read"),
    ]:
        with pytest.raises(ExportError, match=words) as caught:
            prune_vocabulary(load_checkpoint(str(source)), file)
        assert "\n" not in str(caught.value)
    edit_json(source / "generation_config.json", sequence_bias=[[[5], 1.0]])
    with pytest.raises(ExportError, match="cannot renumber the setting sequence_bias"):
        export(str(source), tmp_path / "out", "fp32", vocabulary=domain)
    assert not (tmp_path / "out").exists()


def test_lists_of_ids_are_renumbered(tmp_path: Path, domain: Path) -> None:
    source = checkpoint_with_words(tmp_path / "checkpoint")
    old = load_tokenizer(source)
    end, gone = old.token_id("<|end|>"), old.token_id("Ġmatters")
    assert end is not None
    edit_json(source / "generation_config.json", suppress_tokens=[gone, end], bad_words_ids=[[gone, end], [end, end]])
    settings = prune_vocabulary(load_checkpoint(str(source)), domain).generation_settings
    new = prune_tokenizer(old, DOMAIN).new_ids[end]
    assert settings["suppress_tokens"] == [new]
    assert settings["bad_words_ids"] == [[new, new]]


def test_tokens_that_the_generation_settings_name_stay(tmp_path: Path, domain: Path) -> None:
    """A token that ends texts is kept, although neither the domain nor config.json has it."""
    source = checkpoint_with_words(tmp_path / "checkpoint")
    old = load_tokenizer(source)
    end, rare = old.token_id("<|end|>"), old.token_id("Ġmatters")
    assert end is not None and rare is not None and rare not in prune_tokenizer(old, DOMAIN).new_ids
    edit_json(source / "generation_config.json", eos_token_id=[end, rare])
    pruned = prune_vocabulary(load_checkpoint(str(source)), domain)
    ends = pruned.generation_settings["eos_token_id"]
    assert ends == [pruned.tokenizer.token_id("<|end|>"), pruned.tokenizer.token_id("Ġmatters")]
    assert all(0 <= token < pruned.model.config.vocab_size for token in ends)


def test_text_that_needs_all_tokens(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "checkpoint", Shape(layers=1, context=16, vocab=256))
    (tmp_path / "text").write_text("abc", encoding="utf-8")
    exported = export(str(source), tmp_path / "out", "fp32", vocabulary=tmp_path / "text")
    assert exported.bundle.manifest.required_features == ()
    assert exported.notes[0] == "256 of 256 tokens stayed"
