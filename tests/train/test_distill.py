"""Distillation: the student learns from its teacher, and is saved as a plain GPT-2."""

import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgelm.errors import TrainingError
from edgelm_export.source.checkpoint import load_checkpoint
from edgelm_train.distill import distill
from edgelm_train.models.distillation_loss import DistillationWeights, soft_target_loss
from edgelm_train.models.student import Apprentice, new_student
from edgelm_train.options import DistillOptions
from edgelm_train.run import loop as run
from edgelm_train.run.guesses import guesses_in_windows
from edgelm_train.run.tuning_data import read_text
from tests.conftest import RunCommand
from tests.train.conftest import Playground

pytestmark = pytest.mark.export


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A shape half as wide as the playground's."""
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0)
    config.to_json_file(tmp_path / "small.json")
    return str(tmp_path / "small.json")


QUICK = DistillOptions(tokens=4000, batch_tokens=256, evaluations=2, learning_rate=1e-2)


@pytest.mark.parametrize("layers", [None, 1])
def test_the_student_is_what_was_measured(
    layers: int | None, small: str, playground: Playground, tmp_path: Path
) -> None:
    options = replace(QUICK, size=small, layers=layers)
    done = distill(str(playground.base), playground.text, tmp_path / "out", options)
    assert done.report is not None
    losses = done.report.losses
    assert list(losses) == ["teacher", "student", "the same student alone"]
    saved = load_checkpoint(str(tmp_path / "out"))
    window = 32 if layers is None else 64
    again = read_text(playground.text, None, saved, window, "nothing").held_out_loss(saved.model).per_token
    assert again == pytest.approx(losses["student"], abs=1e-4)
    teacher = load_checkpoint(str(playground.base))
    ids = read_text(playground.text, None, teacher, window, "nothing").held_out.ids
    right = guesses_in_windows(saved.model, teacher.model, ids, window)
    assert done.report.facts["guesses right, greedy"] == f"{right.greedy:.2%}"
    assert done.report.facts["guesses right, sampled at temperature 1"] == f"{right.sampled:.2%}"
    assert saved.model.config.n_embd == (16 if layers is None else 32)
    assert not [name for name in saved.model.state_dict() if "projection" in name]
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["losses"] == losses
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


def test_the_student_comes_nearer_to_its_teacher(small: str, playground: Playground, tmp_path: Path) -> None:
    options = replace(QUICK, size=small, tokens=6_000, hard=0.0, temperature=1.0)
    distill(str(playground.base), playground.text, tmp_path / "out", options)
    teacher, student = load_checkpoint(str(playground.base)).model, load_checkpoint(str(tmp_path / "out")).model
    text = read_text(playground.text, None, load_checkpoint(str(playground.base)), 32, "nothing")
    ids = torch.from_numpy(text.held_out.ids)
    ids = ids[: len(ids) // 32 * 32].long().view(-1, 32)
    with torch.no_grad():
        taught = teacher(ids).logits
        far = soft_target_loss(new_student(teacher, small, 0)(ids).logits, taught, ids, 1.0)
        near = soft_target_loss(student(ids).logits, taught, ids, 1.0)
    assert near < 0.8 * far


def test_an_apprentice_without_labels_is_a_gpt2(small: str, playground: Playground) -> None:
    teacher = load_checkpoint(str(playground.base)).model
    student = new_student(teacher, small, 0).eval()
    weights = DistillationWeights(soft=0.0, hidden=0.0, hard=1.0, temperature=1.0)
    apprentice = Apprentice.of(student, teacher, weights).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.allclose(apprentice(ids).logits, student(ids).logits, atol=1e-6)
        assert torch.allclose(apprentice(ids, labels=ids).loss, student(ids, labels=ids).loss, atol=1e-6)
    assert sum(p.numel() for p in apprentice.parameters()) == sum(p.numel() for p in student.parameters()) + 16 * 32
    assert torch.equal(apprentice.student().state_dict()["transformer.wpe.weight"], student.transformer.wpe.weight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": "2M"}, "'2M' is no size"),
        ({"layers": 3}, "at most the teacher's 2"),
        ({"size": "1M"}, "a student has at most its teacher's 2 layers, 1M has 4: give a smaller size"),
        ({"temperature": 0}, "--temperature must be more than 0"),
        ({"soft": 0, "hidden": 0}, "teach nothing"),
        ({"hard": -1}, "--hard must be at least 0"),
    ],
    ids=str,
)
def test_options_that_are_refused(changes: dict[str, Any], words: str, playground: Playground, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=re.escape(words)):
        distill(str(playground.base), playground.text, tmp_path / "out", replace(QUICK, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there os.kill ends the process at once")
def test_a_signal_in_the_students_last_measurement_ends_the_call(
    small: str, playground: Playground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = run._Trainer.evaluate, [0]

    def last(trainer: Any, *arguments: Any, **options: Any) -> Any:
        if trainer.state.global_step == trainer.state.max_steps:
            calls[0] += 1
            if calls[0] == 1:
                os.kill(os.getpid(), signal.SIGINT)
        return own(trainer, *arguments, **options)

    monkeypatch.setattr(run._Trainer, "evaluate", last)
    options = replace(QUICK, size=small)
    stopped = distill(str(playground.base), playground.text, tmp_path / "out", options)
    assert stopped.report is None and stopped.outcome.signal == signal.SIGINT
    done = distill(str(playground.base), playground.text, tmp_path / "out", options)
    assert done.report is not None and list(done.report.losses)[-1] == "the same student alone"


def test_the_command(small: str, playground: Playground, tmp_path: Path, edgelm_command: RunCommand) -> None:
    arguments = ["distill", str(playground.base), "--data", str(playground.text), "--size", small]
    done = edgelm_command(
        *arguments, "--tokens", "1K", "--batch-tokens", "256", "--no-alone", "-o", str(tmp_path / "o")
    )
    assert done.status == 0, done.stderr
    assert re.fullmatch(r".*o: held-out loss: teacher \d\.\d{4}, student \d\.\d{4}; .*report\.md\n", done.stdout)
    assert load_checkpoint(str(tmp_path / "o")).model.config.n_embd == 16
