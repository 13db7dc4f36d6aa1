"""``edgelm pretrain`` as a user runs it: from text to a bundle that runs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgelm_train.data.packing import Ids
from edgelm_train.run.held_out import Loss
from tests.conftest import CommandResult, RunCommand

pytestmark = pytest.mark.export

SHAPE = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 300}
OPTIONS = (
    "--size",
    "shape.json",
    "--tokens",
    "8K",
    "--batch-tokens",
    "256",
    "--precision",
    "fp32",
    "--evaluations",
    "4",
)


def _write_data(folder: Path) -> None:
    (folder / "shape.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    draw = random.Random(0)
    words = ["the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "hat", "and", "then"]
    stories = [" ".join(draw.choices(words, k=30)) + "." for _ in range(60)]
    (folder / "stories.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrain-cli")
    _write_data(path)
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> CommandResult:
    command = [sys.executable, "-m", "edgelm", "pretrain", "--data", "stories.txt", "--out", "model", *OPTIONS]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=300)
    return CommandResult(done.returncode, done.stdout.decode(), done.stderr.decode())


def test_it_reports_what_it_did(trained: CommandResult, folder: Path) -> None:
    assert trained.status == 0, trained.stderr
    assert trained.stdout.startswith("model: held-out loss ")
    assert trained.stdout.count("\n") == 1
    assert "58 documents" in trained.stderr and "2 documents" in trained.stderr
    assert "step 31/31" in trained.stderr
    assert "Warning" not in trained.stderr
    report = json.loads((folder / "model" / "report.json").read_text(encoding="utf-8"))
    assert set(report["held_out"]) == {"16", "32"}
    assert report["held_out"]["16"] < 5.0  # a uniform guess has log(300) = 5.7
    assert report["gap"] == pytest.approx(report["held_out"]["16"] - report["training"])
    assert [entry["step"] for entry in report["log"] if "loss" in entry] == list(range(1, 32))
    assert len(report["samples"]) == 3
    text = (folder / "model" / "report.md").read_text(encoding="utf-8")
    assert "Overfitting gap" in text and "## Sample 2" in text
    assert (folder / "model" / "curves.svg").read_text(encoding="utf-8").count("<svg") == 1
    assert list((folder / "model" / "training" / "tensorboard").glob("events.*"))
    assert not list((folder / "model" / "training").glob("checkpoint-*"))


def test_the_folder_becomes_a_bundle_that_runs(
    trained: CommandResult, folder: Path, edgelm_command: RunCommand
) -> None:
    bundle = folder / "bundle"
    exported = edgelm_command("export", str(folder / "model"), "-o", str(bundle), "--precision", "fp32")
    assert exported.status == 0, exported.stderr

    run = edgelm_command("run", "-m", str(bundle), "-n", "8", "the cat")

    assert run.status == 0, run.stderr
    assert run.stdout.startswith("the cat")
    report = json.loads((folder / "model" / "report.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["activation_function"] == "gelu_new"
    assert config["vocab_size"] == report["facts"]["vocabulary"] <= 300


def test_it_goes_on_from_a_model(
    trained: CommandResult, folder: Path, tmp_path: Path, edgelm_command: RunCommand
) -> None:
    base, data = folder / "model", str(folder / "stories.txt")
    options = ("--tokens", "2K", "--batch-tokens", "256", "--precision", "fp32", "--learning-rate", "1e-4")

    done = edgelm_command("pretrain", "--data", data, "--out", "more", "--from", str(base), *options)

    assert done.status == 0, done.stderr
    first_report = json.loads((base / "report.json").read_text(encoding="utf-8"))
    second_report = json.loads((tmp_path / "more" / "report.json").read_text(encoding="utf-8"))
    assert second_report["log"][0]["loss"] < first_report["log"][0]["loss"] - 1
    assert second_report["held_out"]["16"] < first_report["held_out"]["16"] + 0.01


def test_a_finished_run_is_not_run_again(trained: CommandResult, folder: Path, edgelm_command: RunCommand) -> None:
    again = edgelm_command(
        "pretrain", "--data", str(folder / "stories.txt"), "--out", str(folder / "model"), *_in(folder, OPTIONS)
    )

    assert again.status == 1
    assert "is finished; see" in again.stderr.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="there no process can be sent SIGINT alone")
def test_a_stopped_run_goes_on_with_the_same_command_only(tmp_path: Path, edgelm_command: RunCommand) -> None:
    _write_data(tmp_path)
    command = ("pretrain", "--data", "stories.txt", "--out", "model", *OPTIONS[:2], "--tokens", "40K", *OPTIONS[4:])
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "edgelm", *command], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    # An event file appears with the first step.
    while not list(tmp_path.glob("model/training/tensorboard/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 130, stderr
    assert "stopped after step" in stderr and "Traceback" not in stderr

    changed = edgelm_command(*command, "--dropout", "0.5")
    assert changed.status == 1
    assert "was started with --dropout 0.05, not --dropout 0.5" in changed.stderr
    (tmp_path / "other.txt").write_text("Another text. " * 100, encoding="utf-8")
    assert "other data" in edgelm_command("pretrain", "--data", "other.txt", "--out", "model", *command[5:]).stderr

    resumed = edgelm_command(*command)
    assert resumed.status == 0, resumed.stderr
    assert "resuming after step" in resumed.stderr
    report = json.loads((tmp_path / "model" / "report.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in report["log"] if "loss" in entry] == list(range(1, 157))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (("--size", "7M"), "'7M' is no size: give 1M, 6M, 30M, 124M"),
        (("--data", "short.txt", "--held-out", "1"), "less than one window of 32"),
        (("--batch-tokens", "100"), "must be a multiple of 32"),
        (("--dropout", "1.5"), "--dropout must be at least 0 and less than 1"),
        (("--hours", "0"), "--hours must be more than 0"),
        (("--device", "cuda"), "finds no CUDA GPU"),
        (("--keep", "last"), "--keep last needs --patience 0"),
        (("--from", "nowhere"), "leave out --size"),
        (("--tokenizer", "nowhere"), "cannot read the tokenizer"),
        (("--vocab-size", "100"), "257 to 262144 tokens, got 100"),
        (("--data", "missing.txt"), "No such file"),
        (("--seed", "4294967296"), "--seed must be at most 4,294,967,295, got 4294967296"),
        (("--hours", "inf"), "--hours must be at most 1,000,000, got inf"),
        (("--tokens", "999999999999G"), "--tokens must be at most 10,000,000,000,000"),
        (("--separator", "===="), "the separator '====' is nowhere in stories.txt"),
        (("--separator", r"\n\n"), r"the separator '\n\n' is nowhere in stories.txt"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, str], reason: str
) -> None:
    from click.testing import CliRunner

    from edgelm.cli import cli

    if "cuda" in changes:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    _write_data(tmp_path)
    monkeypatch.chdir(tmp_path)

    (tmp_path / "short.txt").write_text("a<|endoftext|>b", encoding="utf-8")
    data = () if "--data" in changes else ("--data", "stories.txt")

    result = CliRunner().invoke(cli, ["pretrain", *data, "--out", "model", *OPTIONS, *changes])

    assert reason in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "model").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path, edgelm_command: RunCommand) -> None:
    _write_data(tmp_path)

    result = edgelm_command("pretrain", "--data", "stories.txt", "--out", ".", *OPTIONS)

    assert result.status == 1
    assert result.stderr.splitlines()[-1] == "edgelm: . is not empty; give a new folder as --out"


def _in(folder: Path, options: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(folder / option) if option == "shape.json" else option for option in options)


def test_a_given_tokenizer_keeps_its_end_of_text(
    trained: CommandResult, folder: Path, tmp_path: Path, edgelm_command: RunCommand
) -> None:
    """Its id may differ from 0: in GPT-2's vocabulary it is the last id."""
    content = json.loads((folder / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    last = len(vocabulary) - 1
    (other,) = (token for token, place in vocabulary.items() if place == last)
    vocabulary[other], vocabulary["<|endoftext|>"] = 0, last
    content["added_tokens"][0]["id"] = last
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    options = ("--size", str(folder / "shape.json"), "--tokens", "1K", "--batch-tokens", "256", "--precision", "fp32")
    data = ("--data", str(folder / "stories.txt"))

    done = edgelm_command("pretrain", *data, "--tokenizer", "given", "--out", "new", *options)
    assert done.status == 0, done.stderr
    more = edgelm_command("pretrain", *data, "--from", "new", "--out", "more", *options[2:])
    assert more.status == 0, more.stderr

    for name in ("new", "more"):
        for file in ("config.json", "generation_config.json"):
            config = json.loads((tmp_path / name / file).read_text(encoding="utf-8"))
            assert (config["bos_token_id"], config["eos_token_id"]) == (last, last)


def test_a_run_is_not_resumed_with_another_config(tmp_path: Path, edgelm_command: RunCommand) -> None:
    _write_data(tmp_path)
    command = ("pretrain", "--data", "stories.txt", "--out", "model", *OPTIONS)
    assert edgelm_command(*command).status == 0
    (tmp_path / "model" / "report.json").unlink()
    (tmp_path / "shape.json").write_text(json.dumps({**SHAPE, "activation_function": "relu"}), encoding="utf-8")
    assert "started with another config.json" in edgelm_command(*command).stderr


def test_escapes_of_a_separator_are_read(tmp_path: Path, edgelm_command: RunCommand) -> None:
    _write_data(tmp_path)
    text = (tmp_path / "stories.txt").read_text(encoding="utf-8").replace("<|endoftext|>", "\n\n")
    (tmp_path / "paragraphs.txt").write_text(text, encoding="utf-8")
    command = ("pretrain", "--data", "paragraphs.txt", "--out", "model", "--separator", r"\n\n")
    done = edgelm_command(*command, *OPTIONS[:2], "--tokens", "1K", *OPTIONS[4:])
    assert "58 documents, " in done.stderr and "2 documents, " in done.stderr


def test_the_training_text_that_is_measured_comes_from_all_files(
    tmp_path: Path, edgelm_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelm_train import pretrain

    _write_data(tmp_path)
    (tmp_path / "numbers.txt").write_text("<|endoftext|>".join("1 2 " * n for n in range(10, 70)), encoding="utf-8")
    measured = []

    def record(model: object, ids: Ids, window: int) -> Loss:
        measured.append({int(token) for token in ids})
        return Loss(1.0, 1)

    monkeypatch.setattr(pretrain, "loss_in_windows", record)
    files = ("--data", "stories.txt", "--data", "numbers.txt")
    assert edgelm_command("pretrain", *files, "--out", "model", *OPTIONS).status == 0
    vocabulary = json.loads((tmp_path / "model" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    for letter in ("c", "1"):  # of a cat and of a number
        assert {token for spelling, token in vocabulary.items() if letter in spelling} & measured[-1]
