"""A training run has the numbers of a plain loop, also after an interruption."""

import errno
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edgelm.errors import TrainingError
from edgelm_train.data.packing import BatchStream, Packed, Phase
from edgelm_train.run.checkpoints import last_checkpoint
from edgelm_train.run.held_out import loss_in_windows
from edgelm_train.run.loop import OptimizerName, Outcome, Schedule, train
from edgelm_train.run.muon import MuonAdamW

pytestmark = pytest.mark.export

STEPS, BATCH_TOKENS = 12, 64
SCHEDULE = Schedule(
    steps=STEPS,
    batch_tokens=BATCH_TOKENS,
    learning_rate=3e-3,
    warmup_steps=3,
    weight_decay=0.1,
    evaluate_every=5,
    accumulate=2,
)


def _model(dropout: float = 0.0) -> Any:
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")


def _packed(seed: int = 0) -> Packed:
    ids = np.random.default_rng(seed).integers(50, size=500).astype(np.int32)
    return Packed(ids, np.arange(0, 500, 25))


def _stream(schedule: Schedule) -> BatchStream:
    return BatchStream(_packed(), [Phase(8, 16), Phase(4, 32)], BATCH_TOKENS, schedule.accumulate, seed=0)


def _held_out_loss(model: Any) -> float:
    return loss_in_windows(model, _packed(seed=1).ids, 16).per_token


def _train(
    folder: Path,
    schedule: Schedule = SCHEDULE,
    dropout: float = 0.0,
    measure: Callable[[Any], float] = _held_out_loss,
) -> tuple[Outcome, Any]:
    model = _model(dropout)
    return train(model, _stream(schedule), measure, folder, schedule, device="cpu", tensorboard=False), model


def _losses(outcome: Outcome) -> list[float]:
    return [entry["loss"] for entry in outcome.log if "loss" in entry]


def _plain_losses(optimizer_name: OptimizerName) -> list[float]:
    """Losses of the same run in a plain loop with whole batches; only the stream and Muon are edgelm's."""
    model = _model().train()
    if optimizer_name == "muon":
        optimizer: Any = MuonAdamW(model, SCHEDULE.learning_rate, SCHEDULE.weight_decay, 0.95)
    else:
        decayed = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=SCHEDULE.learning_rate, betas=(0.9, 0.95))
    stream = BatchStream(_packed(), [Phase(8, 16), Phase(4, 32)], BATCH_TOKENS, 1, seed=0)
    losses = []
    for step in range(STEPS):
        ids = torch.from_numpy(stream[step]["input_ids"])
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = step / 3 if step < 3 else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3)))
        for group in optimizer.param_groups:
            group["lr"] = SCHEDULE.learning_rate * rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_losses_are_those_of_plain_pytorch(tmp_path: Path, optimizer: OptimizerName) -> None:
    schedule = Schedule(**{**vars(SCHEDULE), "optimizer": optimizer})
    _train(
        tmp_path / "before", Schedule(**{**vars(SCHEDULE), "precision": "bf16"})
    )  # must not change later runs of this process

    outcome, _ = _train(tmp_path / "run", schedule)

    # The Trainer rounds its log to four decimal places.
    np.testing.assert_allclose(_losses(outcome), _plain_losses(optimizer), atol=1e-4)
    assert _losses(outcome)[0] == pytest.approx(math.log(50), abs=0.2)
    assert outcome.ended == "complete"


@pytest.mark.skipif(sys.platform == "win32", reason="there os.kill ends the process at once")
@pytest.mark.parametrize(("optimizer", "stopped_after"), [("adamw", 2), ("muon", 5), ("adamw", 9)])
def test_a_resumed_run_has_the_curve_of_an_uninterrupted_one(
    tmp_path: Path, optimizer: OptimizerName, stopped_after: int
) -> None:
    schedule = Schedule(**{**vars(SCHEDULE), "optimizer": optimizer})
    whole, whole_model = _train(tmp_path / "whole", schedule, dropout=0.2)
    stream = _stream(schedule)

    class Interrupted(BatchStream):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 2 * stopped_after:  # the loader reads one batch ahead of the step
                os.kill(os.getpid(), signal.SIGTERM)
            return stream[index]

    interrupted = Interrupted(_packed(), [Phase(STEPS, 16)], BATCH_TOKENS, 2, 0)
    model = _model(0.2)
    part = train(model, interrupted, _held_out_loss, tmp_path / "parts", schedule, device="cpu", tensorboard=False)
    resumed, resumed_model = _train(tmp_path / "parts", schedule, dropout=0.2)

    assert (part.ended, part.signal, part.steps) == ("signal", signal.SIGTERM, stopped_after)
    assert resumed.log == whole.log
    assert resumed.best_step == whole.best_step
    assert resumed.seconds >= part.seconds
    for name, value in whole_model.state_dict().items():
        assert torch.equal(resumed_model.state_dict()[name], value), name


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run that fell at step 11, with the checkpoints 5 and 10; and the outcome of the same run without the fall."""
    whole, _ = _train(tmp_path_factory.mktemp("whole"), dropout=0.2)
    folder, stream = tmp_path_factory.mktemp("parts"), _stream(SCHEDULE)

    class Falls(BatchStream):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 2 * 11:
                raise ValueError("the machine fell")
            return stream[index]

    batches = Falls(_packed(), [Phase(STEPS, 16)], BATCH_TOKENS, 2, 0)
    with pytest.raises(ValueError, match="fell"):
        train(_model(0.2), batches, _held_out_loss, folder, SCHEDULE, device="cpu", tensorboard=False)
    return folder, whole


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "cut"),
        ("optimizer.pt", "gone"),
        ("optimizer.pt", "zeros"),
        ("scheduler.pt", "gone"),
        ("rng_state.pth", "cut"),
        ("trainer_state.json", "cut"),
        ("files.json", "gone"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_same_curve(
    name: str, damage: str, interrupted: tuple[Path, Outcome], tmp_path: Path
) -> None:
    parts, whole = interrupted
    folder = shutil.copytree(parts, tmp_path / "run")  # a run may also be moved
    path, said = folder / "checkpoint-10" / name, list[str]()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else bytes(len(content)))
    if damage == "gone":
        path.unlink()
    model = _model(0.2)
    resumed = train(
        model, _stream(SCHEDULE), _held_out_loss, folder, SCHEDULE, device="cpu", tensorboard=False, say=said.append
    )
    assert said[0].startswith("checkpoint-10 is passed over: ") and said[1] == "resuming after step 5 of 12"
    assert (resumed.log, resumed.best_step) == (whole.log, whole.best_step)


def test_without_a_whole_checkpoint_nothing_is_deleted(interrupted: tuple[Path, Outcome], tmp_path: Path) -> None:
    folder = shutil.copytree(interrupted[0], tmp_path / "run")
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").unlink()
    before = sorted(folder.rglob("*"))
    with pytest.raises(
        TrainingError, match=r"whole: checkpoint-10 \(optimizer.pt is missing\), checkpoint-5 .*nothing"
    ):
        _train(folder)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes of this kind")
def test_checkpoints_follow_the_umask(interrupted: tuple[Path, Outcome]) -> None:
    files = [path for path in interrupted[0].rglob("*") if path.is_file()]
    (interrupted[0] / "probe").touch()
    modes = {path.stat().st_mode for path in files}
    assert modes == {(interrupted[0] / "probe").stat().st_mode}
    (interrupted[0] / "probe").unlink()


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path) -> None:
    _train(tmp_path)
    last = tmp_path / "checkpoint-12"
    (last / "trainer_state.json").write_text('{"global_st', encoding="utf-8")

    newest = last_checkpoint(tmp_path)

    assert newest is not None and newest != last
    assert not last.exists()


def test_it_ends_early_with_the_best_weights(tmp_path: Path) -> None:
    measured = iter([3.0, 2.0, 2.5, 2.6, 1.0, 0.5])
    weights = []

    def measure(model: Any) -> float:
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(measured)

    schedule = Schedule(**{**vars(SCHEDULE), "evaluate_every": 2, "patience": 2})

    outcome, model = _train(tmp_path, schedule, measure=measure)

    assert (outcome.ended, outcome.steps, outcome.best_step) == ("early", 8, 4)
    assert all(torch.equal(value, weights[1][name]) for name, value in model.state_dict().items())


def test_a_run_that_ended_early_does_not_go_on(tmp_path: Path) -> None:
    """The same command is repeated after a call that was stopped before its report."""
    measured = iter([3.0, 2.0, 2.5, 2.6, 1.0, 0.5])
    schedule = Schedule(**{**vars(SCHEDULE), "evaluate_every": 2, "patience": 2})
    first, model = _train(tmp_path, schedule, measure=lambda model: next(measured))

    again, same = _train(tmp_path, schedule, measure=lambda model: next(measured))

    assert again == first and (again.ended, again.best_step) == ("early", 4)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in same.state_dict().items())
    assert next(measured) == 1.0, "nothing was measured again"


@pytest.mark.skipif(sys.platform == "win32", reason="there os.kill ends the process at once")
def test_a_signal_in_the_last_measurement_of_an_early_end_changes_nothing(tmp_path: Path) -> None:
    measured = iter([3.0, 2.0, 2.5, 2.6, 1.0, 0.5])

    def measure(model: Any) -> float:
        value = next(measured)
        if value == 2.6:
            os.kill(os.getpid(), signal.SIGTERM)
        return value

    outcome, _ = _train(tmp_path, Schedule(**{**vars(SCHEDULE), "evaluate_every": 2, "patience": 2}), measure=measure)
    assert (outcome.ended, outcome.steps, outcome.signal) == ("early", 8, signal.SIGTERM)


def test_a_signal_does_not_wait_long_for_a_step_that_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit does not wait long either. The curve then has one more point, and the weights are equal."""
    monkeypatch.setattr(Schedule, "log_every", property(lambda self: 6))
    monkeypatch.setattr("edgelm_train.run.callbacks._LONGEST_WAIT_SECONDS", 0.0)
    timed, _ = _train(tmp_path / "timed", Schedule(**{**vars(SCHEDULE), "limit_seconds": 1e-9}))
    assert (timed.ended, timed.steps) == ("time", 1)
    whole, whole_model = _train(tmp_path / "whole")
    stream, said = _stream(SCHEDULE), list[str]()

    class Interrupted(BatchStream):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 2 * 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return stream[index]

    interrupted = Interrupted(_packed(), [Phase(STEPS, 16)], BATCH_TOKENS, 2, 0)
    folder, model = tmp_path / "parts", _model()
    part = train(model, interrupted, _held_out_loss, folder, SCHEDULE, device="cpu", tensorboard=False, say=said.append)
    assert (part.ended, part.steps, said) == ("signal", 2, ["stopping, and writing a checkpoint ..."])
    resumed, resumed_model = _train(folder)
    assert [entry["step"] for entry in resumed.log if "loss" in entry] == [2, 6, 12]
    assert [entry for entry in resumed.log if "eval_loss" in entry] == [e for e in whole.log if "eval_loss" in e]
    for name, value in whole_model.state_dict().items():
        assert torch.equal(resumed_model.state_dict()[name], value), name


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:1]")]
)
def test_a_full_disk_gets_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", fails)
    with pytest.raises(TrainingError, match="the disk is full; free some of it"):
        _train(tmp_path)


def test_it_ends_when_the_time_is_up(tmp_path: Path) -> None:
    outcome, _ = _train(tmp_path, Schedule(**{**vars(SCHEDULE), "limit_seconds": 1e-9}))

    assert (outcome.ended, outcome.steps) == ("time", 1)
    assert "eval_loss" in outcome.log[-1]


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    schedule = Schedule(**{**vars(SCHEDULE), "learning_rate": 1e30, "clip_norm": 0.0})

    with pytest.raises(TrainingError, match="smaller --learning-rate"):
        _train(tmp_path, schedule)


def test_windows_are_measured_as_a_plain_loop_does() -> None:
    model, ids = _model(dropout=0.3).train(), _packed().ids
    rows = torch.from_numpy(ids[:496].astype(np.int64)).view(31, 16)
    with torch.no_grad():
        logits = model.eval()(input_ids=rows).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    state = torch.get_rng_state()

    loss = loss_in_windows(model.train(), ids, 16)

    assert loss.tokens == 31 * 15
    assert loss.per_token == pytest.approx(float(expected), rel=1e-6)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
