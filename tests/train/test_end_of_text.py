"""One rule says where a text ends: in examples, in packed text, in the result, and in the export of the result."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgelm.errors import TrainingError
from edgelm_export.source.checkpoint import Checkpoint, load_checkpoint
from edgelm_export.source.generation_settings import bundle_settings
from edgelm_train.data.bpe import load_bpe
from edgelm_train.data.end_of_text import EndOfText
from edgelm_train.data.templates import Task
from edgelm_train.distill import distill
from edgelm_train.finetune import finetune
from edgelm_train.options import DistillOptions, FinetuneOptions
from edgelm_train.run.tuning_data import read_tasks, read_text
from tests.train.conftest import Playground

pytestmark = pytest.mark.export

QUICK = FinetuneOptions(epochs=0.2, evaluations=1)


def base(
    playground: Playground,
    folder: Path,
    *,
    eos_token: str | None = "<|endoftext|>",
    config: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """A copy of the playground's base with another end of text."""
    shutil.copytree(playground.base, folder)
    (folder / "special_tokens_map.json").unlink()
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8")) | (config or {})
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (folder / "generation_config.json").unlink()
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def without_end(playground: Playground, folder: Path) -> Path:
    """A base like a character model: GPT-2's 50256 in its config, and no such token in its tokenizer."""
    base(playground, folder, eos_token=None, config={"eos_token_id": 50256, "bos_token_id": 50256})
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|endoftext|>", "<|other|>"), encoding="utf-8")
    return folder


def stops(checkpoint: Checkpoint) -> object:
    """Where a bundle of the checkpoint ends a text."""
    return bundle_settings(checkpoint.generation_settings, checkpoint.architecture.vocab_size)[0].get("eos_token_id")


@pytest.mark.parametrize(
    ("eos_token", "config", "settings", "token_id", "stop_ids"),
    [
        ("<|endoftext|>", {}, None, 0, 0),
        ("#", {}, None, 3, [3, 0]),  # the tokenizer's own goes first
        ("#", {"eos_token_id": 50256}, None, 3, 3),  # the config's is not in the vocabulary
        ("#", {}, {"eos_token_id": [5, 3]}, 3, [3, 5]),
        (None, {}, {"eos_token_id": [7, 5]}, 7, [7, 5]),
        (None, {}, {"eos_token_id": [50256, 5]}, 5, 5),
        (None, {}, {}, 0, 0),  # nothing is named, but the vocabulary has <|endoftext|>
        ("[new]", {"eos_token_id": 9}, None, 9, 9),  # an added token without a row
    ],
)
def test_which_token_ends_a_text(
    eos_token: str | None,
    config: dict[str, Any],
    settings: dict[str, Any] | None,
    token_id: int,
    stop_ids: object,
    playground: Playground,
    tmp_path: Path,
) -> None:
    folder = base(playground, tmp_path / "base", eos_token=eos_token, config=config, settings=settings)
    checkpoint = load_checkpoint(str(folder))
    end = EndOfText.of(checkpoint)
    assert (end.token_id, end.stop_ids) == (token_id, stop_ids)
    data = read_tasks(playground.reversals, None, checkpoint, Task.parse(None, None), 64)
    assert {example.ids[-1] for example in data.training} == {token_id}
    text = read_text(playground.text, None, checkpoint, 32, "nothing")
    assert text.training.ids[0] == token_id
    named = stops(checkpoint)
    assert end.is_new == (token_id not in (named if isinstance(named, list) else [named])) == bool(end.notes)


def test_a_vocabulary_without_such_a_token(playground: Playground, tmp_path: Path) -> None:
    folder = without_end(playground, tmp_path / "base")
    said: list[str] = []
    for number, data in enumerate((playground.reversals, playground.text)):
        out = tmp_path / str(number)
        done = finetune(str(folder), data, out, replace(QUICK, method="full"), say=said.append)
        assert done.report is not None and "has no end-of-text token among its" in done.report.notes[0]
        result = load_checkpoint(str(out))
        assert result.model.config.eos_token_id is result.model.config.bos_token_id is stops(result) is None
    assert sum("has no end-of-text token" in line for line in said) == 2
    checkpoint = load_checkpoint(str(folder))
    examples = read_tasks(playground.reversals, None, checkpoint, Task.parse(None, None), 64)
    words = checkpoint.tokenizer.decode(list(examples.training[0].ids)).split()
    assert words[-1] in playground.reversals.read_text(encoding="utf-8")
    with pytest.raises(TrainingError, match=r"has no token <\|endoftext\|>, and no other eos_token"):
        load_bpe(folder)


def test_the_result_stops_where_it_learned_to(playground: Playground, tmp_path: Path) -> None:
    """transformers' Trainer aligns config and settings with the tokenizer alike."""
    folder = base(playground, tmp_path / "base", eos_token="#")
    finetune(str(folder), playground.reversals, tmp_path / "full", replace(QUICK, method="full"))
    student = DistillOptions(layers=1, tokens=1000, batch_tokens=256, evaluations=1, alone=False)
    (tmp_path / "text.txt").write_text(playground.text.read_text(encoding="utf-8") * 3, encoding="utf-8")
    distill(str(folder), tmp_path / "text.txt", tmp_path / "small", student)
    for name in ("full", "small"):
        result = load_checkpoint(str(tmp_path / name))
        assert stops(result) == [3, 0] and result.tokenizer_eos_token_id == 3
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.config.eos_token_id == 3 and model.generation_config.eos_token_id == [3, 0]
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / name).eos_token_id == 3


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_the_export_of_the_base_learns_it_from_a_file(method: Any, playground: Playground, tmp_path: Path) -> None:
    folder, out = base(playground, tmp_path / "base", eos_token="#"), tmp_path / "out"
    done = finetune(str(folder), playground.reversals, out, replace(QUICK, method=method, prefix_tokens=4))
    assert done.report is not None
    assert f"--generation-config {out / 'generation_config.json'}" in done.report.next_steps[0]
    checkpoint = load_checkpoint(str(folder), generation_config=out / "generation_config.json")
    assert stops(checkpoint) == [3, 0]


def test_settings_that_transformers_does_not_save_come_back(playground: Playground, tmp_path: Path) -> None:
    """It loads a model with such settings, and refuses to save it, so every checkpoint of the run would fail."""
    settings = {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.3, "eos_token_id": 0}
    folder = base(playground, tmp_path / "base", config={"no_repeat_ngram_size": 3}, settings=settings)
    finetune(str(folder), playground.reversals, tmp_path / "out", replace(QUICK, method="full"))
    before, after = load_checkpoint(str(folder)), load_checkpoint(str(tmp_path / "out"))
    size = before.architecture.vocab_size
    assert bundle_settings(after.generation_settings, size)[0] == bundle_settings(before.generation_settings, size)[0]


def test_text_with_a_token_that_the_model_lacks_is_refused(playground: Playground, tmp_path: Path) -> None:
    folder = base(playground, tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    (tmp_path / "a.txt").write_text("red [PAD] " * 300, encoding="utf-8")
    rows = [json.dumps({"prompt": "red", "completion": word}) for word in [" blue"] * 30 + [" [PAD]"]]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(TrainingError, match=r"a\.txt needs the token '\[PAD\]'"):
        finetune(str(folder), tmp_path / "a.txt", tmp_path / "out", QUICK)
    with pytest.raises(TrainingError, match=r"line 31 of .*cannot be learned.*\[PAD\]"):
        finetune(str(folder), tmp_path / "a.jsonl", tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_weights_that_were_left_out_are_told(playground: Playground, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = base(playground, tmp_path / "base")
    weights = load_file(folder / "model.safetensors") | {"v_head.summary.weight": torch.zeros(1)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said: list[str] = []
    done = finetune(str(folder), playground.reversals, tmp_path / "out", QUICK, say=said.append)
    assert done.report is not None and "v_head.summary.weight" in done.report.notes[0] == said[0]
