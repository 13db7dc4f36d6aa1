"""Every method of fine-tuning saves the weights that it measured, and refuses mistakes in one sentence."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgelm.errors import EdgelmError, TrainingError
from edgelm_export.source.adapter import merge_adapter
from edgelm_export.source.checkpoint import Checkpoint, load_checkpoint, quiet_torch
from edgelm_train.data.examples import Example
from edgelm_train.data.templates import ChatTask, Task
from edgelm_train.finetune import _next_steps, finetune, usual_rate
from edgelm_train.models.adapters import keys_values, with_prefix
from edgelm_train.models.base import Base
from edgelm_train.options import FinetuneOptions, Method
from edgelm_train.run.held_out import loss_on_completions
from edgelm_train.run.tuning_data import ExampleData, TextData, read_tasks, read_text
from tests.conftest import RunCommand
from tests.train.conftest import Playground

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'edgelm[train]'")

pytestmark = pytest.mark.export

METHODS: list[Method] = ["full", "lora", "prefix"]
QUICK = FinetuneOptions(epochs=1, prefix_tokens=4, evaluations=3, learning_rate=1e-2)


def loaded(method: Method, playground: Playground, out: Path) -> Any:
    """The model in `out`, loaded without the help of edgelm_train."""
    if method == "full":
        return load_checkpoint(str(out)).model
    base = load_checkpoint(str(playground.base)).model
    return peft.PeftModel.from_pretrained(base, out).eval()


def test_a_wide_model_takes_smaller_steps() -> None:
    assert [usual_rate("full", width, False) for width in (64, 256, 512, 1024)] == [5e-4, 5e-4, 1.25e-4, 3.125e-5]
    assert usual_rate("full", 512, True) == 5e-5
    assert [usual_rate("lora", width, False) for width in (64, 1024)] == [2e-3, 2e-3]


@pytest.mark.parametrize("kind", ["text", "reversals"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_saved_is_what_was_measured(method: Method, kind: str, playground: Playground, tmp_path: Path) -> None:
    done = finetune(str(playground.base), getattr(playground, kind), tmp_path / "out", replace(QUICK, method=method))
    assert done.report is not None
    losses = done.report.losses
    assert losses["after"] < losses["before"] - 0.05
    assert losses["after"] == pytest.approx(
        min(point["eval_loss"] for point in done.outcome.log if "eval_loss" in point)
    )
    data = read(kind, playground)
    with quiet_torch():
        again = data.held_out_loss(loaded(method, playground, tmp_path / "out")).per_token
    assert again == pytest.approx(losses["after"], abs=1e-4)
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["losses"] == losses
    assert f"| after | {losses['after']:.4f} |" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "curves.svg").is_file()
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


def read(kind: str, playground: Playground, prefix_tokens: int = 0) -> TextData | ExampleData:
    checkpoint = load_checkpoint(str(playground.base))
    if kind == "text":
        return read_text(playground.text, None, checkpoint, 32, "nothing")
    return read_tasks(playground.reversals, None, checkpoint, Task.parse(None, None), 64 - prefix_tokens)


def test_merged_adapter_equals_the_adapter(playground: Playground, tmp_path: Path) -> None:
    finetune(str(playground.base), playground.text, tmp_path / "out", replace(QUICK, method="lora"))
    ids = torch.arange(40)[None] * 3
    with quiet_torch(), torch.no_grad():
        expected = loaded("lora", playground, tmp_path / "out")(input_ids=ids).logits
        merged = merge_adapter(load_checkpoint(str(playground.base)), str(tmp_path / "out"))
        merged_logits = merged.model(ids).logits
        plain = load_checkpoint(str(playground.base)).model(ids).logits
    assert (merged_logits - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_as_if_it_were_not(
    method: Method, playground: Playground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(QUICK, method=method)
    # The faster precision is measured, and two runs may measure different ones.
    monkeypatch.setattr("edgelm_train.finetune.fastest_precision", lambda *_: ("fp32", {}))
    whole = finetune(str(playground.base), playground.text, tmp_path / "whole", options)
    measure, calls = TextData.held_out_loss, []

    def breaks(self: TextData, model: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # after the one before training and two that wrote a checkpoint
            raise ValueError("the machine fell")
        return measure(self, model)

    monkeypatch.setattr(TextData, "held_out_loss", breaks)
    with pytest.raises(ValueError, match="fell"):
        finetune(str(playground.base), playground.text, tmp_path / "out", options)
    said: list[str] = []
    resumed = finetune(str(playground.base), playground.text, tmp_path / "out", options, say=said.append)
    assert any("resuming after step" in line for line in said)
    assert whole.report is not None and resumed.report is not None
    assert resumed.report.losses == pytest.approx(whole.report.losses, abs=1e-6)


def test_a_prefix_begins_as_real_tokens(playground: Playground) -> None:
    model = load_checkpoint(str(playground.base)).model
    start, text = [5, 9, 2, 30, 7], torch.tensor([[11, 3, 250, 8]])
    with torch.no_grad():
        expected = model(torch.cat([torch.tensor([start]), text], dim=1)).logits[:, len(start) :]
        adapted = with_prefix(model, start).eval()
        for use_cache in (True, False):
            assert (adapted(input_ids=text, use_cache=use_cache).logits - expected).abs().max() < 1e-4
    trained = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert trained == ["prompt_encoder.default.embedding.weight"]


def test_keys_and_values_are_those_of_peft(playground: Playground) -> None:
    model = load_checkpoint(str(playground.base)).model
    adapted = with_prefix(model, [5, 9, 2])
    with quiet_torch(), torch.no_grad():
        adapted.prompt_encoder["default"].embedding.weight.normal_()
        cache = adapted.get_prompt(batch_size=1)
    arrays = keys_values(adapted)
    assert arrays.shape == (4, 4, 3, 8) and arrays.dtype == np.float32
    for layer in range(2):
        for kind in (0, 1):
            assert np.array_equal(arrays[2 * layer + kind], cache[layer][kind][0].numpy())


def test_only_completions_are_counted(playground: Playground) -> None:
    model = load_checkpoint(str(playground.base)).model
    examples = [Example((3, 4, 5, 6, 7), 3), Example((9, 8, 0), 2), Example((1, 2), 0)]
    expected, tokens = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logprobs = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        for place in range(max(1, example.prompt_length), len(example.ids)):
            expected -= float(logprobs[place - 1, example.ids[place]])
            tokens += 1
    loss = loss_on_completions(model, examples, pad_token_id=0)
    assert loss.tokens == tokens == 4
    assert loss.nats == pytest.approx(expected, abs=1e-4)


def test_every_example_once_a_pass_and_by_index_alone() -> None:
    examples = tuple(Example((i, i), 1) for i in range(10))
    data = ExampleData(examples, (), 0)
    batches = [data.batches(5, 4, seed=3)[i]["input_ids"][:, 0].tolist() for i in range(5)]
    seen = [i for batch in batches for i in batch]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert data.batches(5, 4, seed=3)[3]["input_ids"][:, 0].tolist() == batches[3]


def test_held_out_examples_are_not_learned(playground: Playground, tmp_path: Path) -> None:
    checkpoint: Checkpoint = load_checkpoint(str(playground.base))
    rows = playground.reversals.read_text(encoding="utf-8").splitlines()
    (tmp_path / "dev.jsonl").write_text("\n".join(rows[:3]), encoding="utf-8")
    data = read_tasks(playground.reversals, tmp_path / "dev.jsonl", checkpoint, Task.parse(None, None), 64)
    assert len(data.held_out) == 3 and len(data.training) == 61
    assert data.notes == ("left out 3 examples because an equal one is held out",)
    alone = read_tasks(playground.reversals, None, checkpoint, Task.parse(None, None), 64)
    assert len(alone.held_out) == 4 and not set(alone.held_out) & set(alone.training)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "--epochs must be more than 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"prefix_tokens": 60, "method": "prefix"}, "at most 56"),
        ({"window": 65}, "--window must be 2 to 64"),
        ({"window": 61, "method": "prefix"}, "--window must be 2 to 60"),
        ({"prompt": "{a}"}, "taken as plain text"),
        ({"device": "cuda"}, "no CUDA GPU"),
        ({"held_out": Path("nowhere.txt")}, "cannot read nowhere.txt"),
        ({"epochs": float("inf")}, "--epochs must be at most 1,000,000, got inf"),
        ({"seed": 2**32}, "--seed must be at most 4,294,967,295"),
    ],
    ids=str,
)
def test_options_that_are_refused(changes: dict[str, Any], words: str, playground: Playground, tmp_path: Path) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EdgelmError, match=re.escape(words)) as caught:
        finetune(str(playground.base), playground.text, tmp_path / "out", replace(QUICK, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", " \n", "\x00", "short"], ids=["empty", "blank", "binary", "short"])
def test_texts_that_are_refused(content: str, playground: Playground, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    with pytest.raises(TrainingError, match=r"a\.txt|too short"):
        finetune(str(playground.base), tmp_path / "a.txt", tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("held_out", [False, True])
def test_less_than_a_window_is_refused(held_out: bool, playground: Playground, tmp_path: Path) -> None:
    """The held-out part needs a whole window too."""
    (tmp_path / "a.txt").write_text("red green blue " * 30, encoding="utf-8")
    data, spared = (playground.text, tmp_path / "a.txt") if held_out else (tmp_path / "a.txt", None)
    (tmp_path / "a.txt").write_text("red green" if held_out else "red green blue " * 30, encoding="utf-8")
    with pytest.raises(
        TrainingError, match=r"only \d+ tokens of .*a\.txt held out, less than one window of 32; give more text, or"
    ):
        finetune(str(playground.base), data, tmp_path / "out", replace(QUICK, held_out=spared))


def test_a_file_to_measure_on_is_taken_whole(playground: Playground, tmp_path: Path) -> None:
    """With a held-out file, no part of the data is held out, and no document is cut."""
    documents = [f"{first} cat dog " * 20 for first in ("red", "green", "blue")]
    (tmp_path / "data.txt").write_text("<|endoftext|>".join(documents), encoding="utf-8")
    (tmp_path / "held.txt").write_text("<|endoftext|>".join([documents[1]] * 25), encoding="utf-8")
    checkpoint = load_checkpoint(str(playground.base))
    data = read_text(tmp_path / "data.txt", tmp_path / "held.txt", checkpoint, 32, "nothing")
    assert (len(data.training.starts), len(data.held_out.starts)) == (2, 25)
    ids = data.training.ids[1 : data.training.starts[1]].tolist()
    assert checkpoint.tokenizer.decode(ids) == documents[0].strip()
    with pytest.raises(TrainingError, match="there is nothing left to train on"):
        read_text(tmp_path / "data.txt", tmp_path / "data.txt", checkpoint, 32, "nothing")


def test_records_are_not_measured_on_text(playground: Playground, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"is not a file of records: its name must end in \.jsonl"):
        finetune(str(playground.base), playground.reversals, tmp_path / "a", replace(QUICK, held_out=playground.text))


def test_a_run_is_resumed_with_its_own_base_and_held_out_file_only(playground: Playground, tmp_path: Path) -> None:
    base, held = tmp_path / "base", tmp_path / "held.txt"
    shutil.copytree(playground.base, base)
    shutil.copyfile(playground.text, held)
    options = replace(QUICK, held_out=held)
    (tmp_path / "data.txt").write_text("moon sun bird " * 60, encoding="utf-8")
    finetune(str(base), tmp_path / "data.txt", tmp_path / "out", options)
    (tmp_path / "out" / "report.json").unlink()
    held.write_text("sun moon red " * 100, encoding="utf-8")
    with pytest.raises(TrainingError, match="other held-out data"):
        finetune(str(base), tmp_path / "data.txt", tmp_path / "out", options)
    shutil.copyfile(playground.text, held)
    model = load_checkpoint(str(base)).model
    with torch.no_grad():
        model.transformer.wte.weight += 1
    model.save_pretrained(base)
    with pytest.raises(TrainingError, match="other weights"):
        finetune(str(base), tmp_path / "data.txt", tmp_path / "out", options)


def test_a_run_is_not_mixed_with_another(playground: Playground, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(TrainingError, match="not empty"):
        finetune(str(playground.base), playground.text, tmp_path / "full", QUICK)
    out = tmp_path / "out"
    finetune(str(playground.base), playground.reversals, out, QUICK)
    with pytest.raises(TrainingError, match="is finished"):
        finetune(str(playground.base), playground.reversals, out, QUICK)
    (out / "report.json").unlink()
    with pytest.raises(TrainingError, match="--rank 8, not --rank 4"):
        finetune(str(playground.base), playground.reversals, out, replace(QUICK, rank=4))
    with pytest.raises(TrainingError, match="other data"):
        finetune(str(playground.base), playground.text, out, QUICK)


def test_the_command(playground: Playground, tmp_path: Path, edgelm_command: RunCommand) -> None:
    rows = ["question\tanswer", *(f"{i}?\tno" for i in range(30)), "?\t"]
    (tmp_path / "task.tsv").write_text("\n".join(rows), encoding="utf-8")
    arguments = ["finetune", str(playground.base), "--data", str(tmp_path / "task.tsv"), "--out", str(tmp_path / "out")]
    task = ["--prompt", r"{question}\nAnswer:", "--completion", " {answer}"]
    done = edgelm_command(*arguments, *task, "--epochs", "2", "--learning-rate", "0.01")
    assert done.status == 0, done.stderr
    assert re.fullmatch(r".*out: held-out loss \d+\.\d{4} before, \d+\.\d{4} after; .* see .*report\.md\n", done.stdout)
    assert "left out 1 of 31 examples: their completion is empty" in done.stderr
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert done.stderr.endswith(rf"run -m {tmp_path / 'out'}-int8 $'{{question}}\nAnswer:'" + "\n")
    refused = edgelm_command(*arguments[:-1], str(tmp_path / "other"))
    assert refused.status == 1
    assert "has no column 'prompt', only 'question', 'answer'" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr


def test_losses_are_of_float32_whatever_a_run_left(playground: Playground) -> None:
    model = load_checkpoint(str(playground.base)).model
    data = read("text", playground)
    expected = data.held_out_loss(model)
    model._original_forward = model.forward  # as accelerate does

    def rounded(*arguments: Any, **named: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model._original_forward(*arguments, **named)

    model.forward = rounded
    assert data.held_out_loss(model) == expected
    assert model.forward is rounded


@pytest.mark.parametrize(
    ("method", "commands"),
    [
        ("full", ["edgelm export out -o out-int8", "edgelm run -m out-int8 'Your text'"]),
        (
            "lora",
            ["edgelm export me/base --revision v1 --adapter out -o out-int8", "edgelm run -m out-int8 'Your text'"],
        ),
        (
            "prefix",
            [
                "edgelm export me/base --revision v1 -o base-int8",
                "edgelm run -m base-int8 --prefix out/prefix.safetensors 'Your text'",
            ],
        ),
    ],
)
def test_the_result_is_used_like_this(method: Method, commands: list[str]) -> None:
    assert _next_steps(Base("me/base", "v1"), Path("out"), method, None) == commands


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_a_shell_gets_the_prompt_of_the_template() -> None:
    """`edgelm run` does not read escapes, so the shell must make the new line."""
    task = Task.parse(r"It's {text}\n\tC:\\dir {{x}}\n", "{label}")
    _, comment, run = _next_steps(Base("base", None), Path("out"), "lora", task)
    assert "{text}" in comment and comment.startswith("#")
    prompt = run.removeprefix("edgelm run -m out-int8 ")
    shown = subprocess.run(["bash", "-c", f"printf %s {prompt}"], capture_output=True, text=True, check=True).stdout
    assert shown == "It's {text}\n\tC:\\dir {x}\n" == task.prompt.fill({"text": "{text}"})


def test_a_batch_is_never_larger_than_the_data(playground: Playground, tmp_path: Path) -> None:
    """Otherwise a step would learn every example many times."""
    said: list[str] = []
    windows = read("text", playground).rows
    kinds = ((playground.reversals, "60 examples"), (playground.text, f"{windows} windows"))
    for number, (data, rows) in enumerate(kinds):
        options = replace(QUICK, batch_size=5000)
        done = finetune(str(playground.base), data, tmp_path / str(number), options, say=said.append)
        assert done.outcome.steps == 1
        assert f"--batch-size is 5,000, and there is no more than {rows}: a step takes each once" in said


@pytest.mark.skipif(os.name != "posix", reason="Windows has no modes of this kind")
@pytest.mark.parametrize("method", METHODS)
def test_all_files_follow_the_umask(method: Method, playground: Playground, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        finetune(str(playground.base), playground.reversals, tmp_path / "out", replace(QUICK, method=method))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


def test_chats_are_learned(playground: Playground, tmp_path: Path) -> None:
    chats = [
        [{"from": "human", "value": f"{one} {two}"}, {"from": "gpt", "value": two}, {"from": "gpt", "value": one}]
        for one in ("red", "green", "blue", "cat", "dog")
        for two in ("bird", "sun", "moon", "red")
    ]
    (tmp_path / "chats.json").write_text(json.dumps([{"conversations": chat} for chat in chats]), encoding="utf-8")
    options = replace(QUICK, turn=r"{role}: {content}\n")
    task = options.task_for(tmp_path / "chats.json")
    assert isinstance(task, ChatTask)
    data = read_tasks(tmp_path / "chats.json", None, load_checkpoint(str(playground.base)), task, 64)
    assert (len(data.held_out), len(data.training)) == (2, 38), "a chat is held out with all its answers"
    done = finetune(str(playground.base), tmp_path / "chats.json", tmp_path / "out", options)
    assert done.report is not None and done.report.losses["after"] < done.report.losses["before"]
    assert done.report.next_steps[-1].endswith(r"$'human: {content}\ngpt:'")


def test_a_name_that_is_not_utf8_is_refused_before_anything_is_loaded(playground: Playground) -> None:
    with pytest.raises(TrainingError, match=r"the name new/\\xff is not UTF-8"):
        finetune(str(playground.base), playground.text, Path("new/\udcff"), QUICK)
