"""Generation settings of a checkpoint mean in a bundle what transformers makes of them; ids and options that cannot."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import edgelm
from edgelm.errors import ExportError, PromptError
from edgelm_export.pipeline import Exported, export
from edgelm_export.source.checkpoint import load_checkpoint
from edgelm_export.source.generation_settings import FILE, bundle_settings
from tests.conftest import replace_file
from tests.export.checkpoints import Shape, edit_json, save_checkpoint

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("few_tokens")]

VOCAB = 300
SMALL = Shape(layers=1, vocab=VOCAB)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("settings") / "checkpoint", SMALL)


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint without a generation_config.json."""
    folder = Path(shutil.copytree(pristine, tmp_path / "checkpoint"))
    (folder / FILE).unlink()
    return folder


def settled(source: Path, file: Path | None = None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings in a bundle of `source`, and all notes."""
    checkpoint = load_checkpoint(str(source), generation_config=file)
    settings, notes = bundle_settings(checkpoint.generation_settings, checkpoint.architecture.vocab_size)
    return settings, checkpoint.notes + notes


def written(source: Path, **settings: object) -> tuple[dict[str, Any], tuple[str, ...]]:
    (source / FILE).write_text(json.dumps(settings), encoding="utf-8")
    return settled(source)


# Settings of a generation_config.json, those of the bundle, and a part of each note.
READ: list[tuple[dict[str, object], dict[str, object], list[str]]] = [
    ({}, {}, []),
    ({"do_sample": False, "temperature": 0.7, "top_k": 0, "top_p": None}, {}, ["left out temperature=0.7: no effect"]),
    ({"temperature": 0.7, "top_p": 0.9}, {}, ["left out temperature=0.7, top_p=0.9: no effect without do_sample"]),
    ({"top_p": 2, "do_sample": None}, {}, []),
    ({"do_sample": True, "top_p": 0.9}, {"do_sample": True, "top_p": 0.9, "top_k": 50}, []),
    ({"do_sample": True, "top_k": 0, "top_p": 1.0, "typical_p": 1.5}, {"do_sample": True}, []),
    ({"do_sample": True, "top_p": 0}, {"do_sample": True, "top_k": 1}, []),
    ({"do_sample": True, "temperature": 1e-6, "top_k": 0}, {"do_sample": True, "top_k": 1}, []),
    ({"max_new_tokens": 20.0, "min_length": 2.0}, {"max_new_tokens": 20, "min_length": 2}, []),
    ({"do_sample": True, "top_k": None, "min_p": 0.0, "epsilon_cutoff": 1.0}, {"do_sample": True}, []),
    ({"num_beams": 2, "diversity_penalty": 0.5}, {"num_beams": 2}, ["diversity_penalty"]),
    ({"length_penalty": 2.0, "early_stopping": True}, {}, ["left out length_penalty=2.0, early_stopping=True: no"]),
    ({"num_beams": 2, "length_penalty": 2.0}, {"num_beams": 2, "length_penalty": 2.0}, []),
    ({"num_beams": 2, "prompt_lookup_num_tokens": 10}, {"num_beams": 2}, []),
    ({"prompt_lookup_num_tokens": 100}, {"prompt_lookup_num_tokens": 64}, []),
    ({"penalty_alpha": 0.6, "top_k": 4}, {"penalty_alpha": 0.6, "top_k": 4}, []),
    ({"penalty_alpha": 0.6}, {"penalty_alpha": 0.6, "top_k": 50}, []),
    ({"penalty_alpha": 0.6, "top_k": 1}, {}, ["left out penalty_alpha=0.6", "left out top_k=1"]),
    ({"max_new_tokens": 10, "max_length": 50}, {"max_new_tokens": 10}, ["left out max_length=50: max_new_tokens"]),
    ({"max_length": 10**30}, {"max_length": 2**31 - 1}, []),
    (
        {"max_new_tokens": 5, "min_new_tokens": 9},
        {"max_new_tokens": 5, "min_new_tokens": 5},
        ["min_new_tokens=9 became 5"],
    ),
    ({"use_cache": False, "output_scores": True, "pad_token_id": 99999, "transformers_version": "4"}, {}, []),
    ({"low_memory": None, "attn_implementation": "x", "num_assistant_tokens": 5, "token_healing": False}, {}, []),
    ({"guidance_scale": 1.5}, {}, ["left out the generation setting guidance_scale=1.5: this version has no such"]),
    ({"guidance_scale": 1}, {}, []),
    ({"encoder_repetition_penalty": 2.0}, {}, ["left out the generation setting encoder_repetition_penalty=2.0"]),
    ({"presence_penalty": 1.0}, {}, ["left out presence_penalty=1.0: transformers has no such option; give it with"]),
    ({"eos_token_id": 300}, {}, ["left out 300 of eos_token_id: the vocabulary ends at 299"]),
    ({"eos_token_id": -1, "bos_token_id": 0}, {"bos_token_id": 0}, ["left out -1 of eos_token_id"]),
    ({"eos_token_id": [0, 300]}, {"eos_token_id": [0]}, ["left out 300 of eos_token_id"]),
    ({"suppress_tokens": [1, 50256, 5]}, {"suppress_tokens": [1, 5]}, ["left out 50256 of suppress_tokens"]),
    ({"suppress_tokens": [50256]}, {}, ["left out 50256 of suppress_tokens"]),
    ({"begin_suppress_tokens": [*range(295, 305)]}, {"begin_suppress_tokens": [*range(295, 300)]}, ["302 and 2 more"]),
    ({"bad_words_ids": [[1, 2], [1, 50256]]}, {"bad_words_ids": [[1, 2]]}, ["left out [1, 50256] of bad_words_ids"]),
    ({"sequence_bias": [[[1], 2.0], [[999], 1.0]]}, {"sequence_bias": [[[1], 2.0]]}, ["[[999], 1.0] of sequence_bias"]),
    ({"exponential_decay_length_penalty": [2, 1.5]}, {}, ["left out exponential_decay_length_penalty=[2, 1.5]: it"]),
    ({"eos_token_id": 2.0, "suppress_tokens": [3.0]}, {"eos_token_id": 2, "suppress_tokens": [3]}, []),
    ({"renormalize_logits": 1, "do_sample": 0}, {"renormalize_logits": True}, []),
    ({"suppress_tokens": 5}, {"suppress_tokens": 5}, []),
    ({"forced_bos_token_id": 999, "forced_eos_token_id": [7, 999]}, {"forced_eos_token_id": [7]}, ["999", "999"]),
]


@pytest.mark.parametrize(("file", "expected", "notes"), READ, ids=[json.dumps(case[0])[:60] for case in READ])
def test_a_file_is_read_as_transformers_reads_it(
    source: Path, file: dict[str, object], expected: dict[str, object], notes: list[str]
) -> None:
    settings, found = written(source, **file)
    assert settings == expected
    assert len(found) == len(notes), found
    for note, words in zip(found, notes, strict=True):
        assert words in note


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"do_sample": True, "temperature": 0}, "temperature must be"),
    ({"do_sample": True, "temperature": 1e-6, "num_beams": 2}, "temperature must be"),
    ({"do_sample": True, "top_p": -0.1}, "top_p must be"),
    ({"max_new_tokens": 5.5}, "max_new_tokens must be"),
    ({"do_sample": True, "temperature": "0.7"}, "temperature must be"),
    ({"repetition_penalty": -1.0}, "repetition_penalty must be"),
    ({"eos_token_id": "x"}, "eos_token_id must be"),
    ({"num_beams": "4"}, "num_beams must be"),
    ({"early_stopping": None}, "early_stopping"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": "10"}, "has max_new_tokens='10', which transformers refuses; correct or remove it"),
    ({"eos_token_id": 5, "pad_token_id": "x"}, "has pad_token_id='x', which transformers refuses; correct"),
    ({"num_return_sequences": 3}, "num_return_sequences"),
    ({"logits_processor": [1]}, "logits_processor"),
    ({"watermarking_config": 5}, "watermark|BaseWatermarkingConfig|mapping|int"),
]


@pytest.mark.parametrize(("file", "words"), REFUSED, ids=str)
def test_what_transformers_cannot_use_either_is_refused(source: Path, file: dict[str, object], words: str) -> None:
    with pytest.raises(ExportError, match=words) as caught:
        written(source, **file)
    assert FILE in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_damaged_file_is_refused(source: Path, content: bytes) -> None:
    (source / FILE).write_bytes(content)
    with pytest.raises(ExportError, match=FILE):
        settled(source)


def test_without_a_file_the_class_and_the_old_keys_of_the_config_count(source: Path) -> None:
    assert settled(source) == ({"bos_token_id": 0, "eos_token_id": 0}, ())
    params = {"text-generation": {"do_sample": True, "max_length": 50}, "conversational": {"max_length": 1000}}
    edit_json(source / "config.json", task_specific_params=params, eos_token_ids=7, max_length=20)
    assert settled(source) == ({"bos_token_id": 0, "eos_token_id": 0}, ())  # as `generate`, unlike a pipeline
    edit_json(source / "config.json", bos_token_id=None, eos_token_id=None, repetition_penalty=1.3, top_k=9)
    settings, notes = settled(source)
    assert settings == {"repetition_penalty": 1.3}
    assert notes[0] == f"left out 50256 of bos_token_id: the vocabulary ends at {VOCAB - 1}"
    assert notes[1] == f"left out 50256 of eos_token_id: the vocabulary ends at {VOCAB - 1}"
    assert notes[2].startswith("left out top_k=9: no effect without do_sample=true") and len(notes) == 3
    # Old keys count beside a file that transformers made of the config, and not beside any other.
    edit_json(source / "config.json", eos_token_id=4, no_repeat_ngram_size=2, top_k=None)
    ours = {"eos_token_id": 4, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3}
    assert written(source, _from_model_config=True, eos_token_id=4)[0] == ours
    assert written(source, eos_token_id=5)[0] == {"eos_token_id": 5}


def test_a_checkpoint_of_gpt2s_size_ends_at_the_token_of_its_class(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "checkpoint", Shape(width=8, heads=1, layers=1, vocab=50257, context=16))
    edit_json(source / "config.json", bos_token_id=None, eos_token_id=None)
    (source / FILE).unlink()
    assert settled(source)[0] == {"bos_token_id": 50256, "eos_token_id": 50256}


def test_a_file_overrides_the_source(source: Path, tmp_path: Path) -> None:
    (source / FILE).write_text('{"eos_token_id": 5, "bos_token_id": 5, "repetition_penalty": 1.5}')
    file = tmp_path / "mine.json"

    def given(**settings: object) -> dict[str, Any]:
        file.write_text(json.dumps(settings))
        return settled(source, file)[0]

    ends = {"bos_token_id": 5, "eos_token_id": 5}
    assert given(repetition_penalty=None, max_new_tokens=7) == ends | {"max_new_tokens": 7}
    assert given(eos_token_id=[6, 7], repetition_penalty=1.0) == ends | {"eos_token_id": [6, 7]}
    kept = ends | {"repetition_penalty": 1.5}
    # edgelm's own options count here, and their ids are checked too.
    assert given(presence_penalty=0.5, logit_bias={"3": 1.0, "999": 2.0}) == kept | {
        "presence_penalty": 0.5,
        "logit_bias": {"3": 1.0},
    }
    for content, words in (
        ({"topp": 0.5}, "unknown generation option 'topp'; did you mean 'top_p'"),
        ({"cancel": 1}, "unknown generation option 'cancel'"),
        ({"early_stopping": "x"}, "early_stopping"),
        ({"presence_penalty": "x"}, "presence_penalty must be"),
    ):
        with pytest.raises(ExportError, match=words):
            given(**content)
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(ExportError, match="there is no file"):
            settled(source, path)


@pytest.fixture(scope="module")
def bundle(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("settings") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        from tests.export.checkpoints import FOOTPRINT

        patch.setattr("edgelm_export.certify.certificate.measure_footprint", lambda bundle: FOOTPRINT)
        patch.setattr("edgelm_export.pipeline.EVALUATION_TOKENS", 512)
        export(str(pristine), output, "fp32")
    return output


GENERATED: list[dict[str, object]] = [
    {"temperature": 0.7, "top_p": 0.5},
    {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
    {"suppress_tokens": [*range(40, 310)]},
    {"begin_suppress_tokens": [*range(200), 999], "eos_token_id": [9, 400]},
    {"bad_words_ids": [[i] for i in range(100)] + [[3, 999]], "min_new_tokens": 4},
    {"sequence_bias": [[[7], 9.0], [[500], 50.0]], "max_length": 9},
    {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True},
    {"max_new_tokens": 6, "max_length": 4, "forced_eos_token_id": 11},
    {"exponential_decay_length_penalty": [2, 1.5], "eos_token_id": 8, "max_new_tokens": 9},
    {"do_sample": True, "top_p": 0.0, "temperature": 3.0},
    {"do_sample": True, "temperature": 1e-5, "repetition_penalty": 1.5},
    {"min_length": 8, "eos_token_id": [*range(0, 300, 3)], "renormalize_logits": True},
]


@pytest.mark.parametrize("file", GENERATED, ids=[json.dumps(case)[:50] for case in GENERATED])
def test_a_bundle_generates_as_transformers_does(
    source: Path, bundle: Path, tmp_path: Path, file: dict[str, Any]
) -> None:
    file = {"max_new_tokens": 12} | file if "max_length" not in file else file
    settings, _ = written(source, **file)
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    replace_file(copy, FILE, json.dumps(settings).encode())
    hf = transformers.GPT2LMHeadModel.from_pretrained(source, attn_implementation="eager").eval()
    for name in ("suppress_tokens", "begin_suppress_tokens"):  # ids beyond the vocabulary make transformers fail or not
        if file.get(name):
            setattr(hf.generation_config, name, [i for i in file[name] if i < VOCAB])
    if "bad_words_ids" in file:
        hf.generation_config.bad_words_ids = [words for words in file["bad_words_ids"] if max(words) < VOCAB]
    if "sequence_bias" in file:
        hf.generation_config.sequence_bias = [pair for pair in file["sequence_bias"] if max(pair[0]) < VOCAB]
    prompt = [5, 60, 200]
    with torch.no_grad():
        ids = hf.generate(torch.tensor([prompt]), pad_token_id=0)[0, len(prompt) :].tolist()
    with edgelm.load(copy, device="cpu", threads=1) as model:
        choice = model.generate(prompt).choices[0]
    assert list(choice.token_ids) == (ids[:-1] if choice.finish_reason == "eos" else ids)


def exported_with_pad(source: Path, output: Path, **options: Any) -> Exported:
    """An export of a checkpoint whose tokenizer got the token [PAD], and whose embeddings were not resized."""
    fast = transformers.AutoTokenizer.from_pretrained(source)
    fast.add_tokens([f"<extra_{i}>" for i in range(VOCAB - len(fast))])
    fast.add_special_tokens({"pad_token": "[PAD]"})
    fast.save_pretrained(source)
    return export(str(source), output, "fp32", **options)


@pytest.mark.parametrize("pruned", [False, True])
def test_more_tokens_than_the_model_has(source: Path, tmp_path: Path, pruned: bool) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc <extra_3>", encoding="utf-8")
    out = tmp_path / "out"
    exported = exported_with_pad(source, out, vocabulary=text if pruned else None)
    assert exported.notes[0] == "the tokenizer has '[PAD]', but the model has not: text with such a token is refused"
    with edgelm.load(out, device="cpu", threads=1) as model:
        assert model.generate("Hello", max_new_tokens=2).stats.new_tokens == 2
        if pruned:  # without the token, its letters are spelt
            assert model.generate("Hello [PAD]", max_new_tokens=2).stats.new_tokens == 2
        else:
            with pytest.raises(PromptError, match=r"the text needs the token '\[PAD\]' \(id 300\)"):
                model.generate("Hello [PAD]")
    file = tmp_path / "eval.txt"
    file.write_text("some text [PAD] " * 20, encoding="utf-8")
    if not pruned:
        with pytest.raises(edgelm.EdgelmError, match=r"\[PAD\]"):
            export(str(source), tmp_path / "no", "fp32", eval_texts=[file])


def test_a_checkpoint_without_a_tokenizer_takes_one_from_elsewhere(
    source: Path, pristine: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    with pytest.raises(ExportError, match=r"has no usable tokenizer: .* has no tokenizer; .*--tokenizer FOLDER_OR_ID"):
        load_checkpoint(str(source))
    taken = load_checkpoint(str(source), tokenizer=str(pristine))
    assert taken.name == "checkpoint"
    assert taken.tokenizer.to_json() == load_checkpoint(str(pristine)).tokenizer.to_json()
    with pytest.raises(ExportError, match=r"there is no folder .*nowhere"):
        load_checkpoint(str(source), tokenizer=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="'empty' has no usable tokenizer"):
        load_checkpoint(str(source), tokenizer=str(tmp_path / "empty"))
