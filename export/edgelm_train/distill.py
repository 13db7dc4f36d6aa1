"""``edgelm distill``: a small GPT-2 learns from a larger one, and is compared with one that had no teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edgelm.errors import TrainingError
from edgelm_export.source.checkpoint import load_checkpoint
from edgelm_train.data.tuning import TextData, read_text
from edgelm_train.finetune import fast_to_train
from edgelm_train.models.distillation_loss import DistillationWeights
from edgelm_train.models.sizes import defaults_for
from edgelm_train.models.student import Apprentice, new_student, student_from_layers
from edgelm_train.run.curves import draw_curves
from edgelm_train.run.folder import begin_run, check_out, device_for, end_run, fingerprints
from edgelm_train.run.loop import Outcome, Precision, Schedule, train
from edgelm_train.run.precision import fastest_precision
from edgelm_train.run.report import CURVES_FILE
from edgelm_train.run.tuning_report import Tuned, TuningReport
from edgelm_train.run_options import check_limits, check_positive, recorded


@dataclass(frozen=True)
class DistillOptions:
    """How a student learns; None takes what suits its size or the data."""

    size: str = "1M"
    """A name in `edgelm_train.models.sizes.SIZES`, or the path of a GPT-2 config.json: a student from nothing."""
    layers: int | None = None
    """Instead: a student of so many of the teacher's layers, as wide as the teacher."""
    held_out: Path | None = None
    """Text to measure on; None: a part of the data."""
    tokens: int | None = None
    """Budget of the student, and again of the one that learns alone; None: two passes over the data."""
    batch_tokens: int | None = None
    learning_rate: float | None = None
    soft: float = 1.0
    """Weight of the teacher's distribution."""
    hidden: float = 1.0
    """Weight of the teacher's hidden states."""
    hard: float = 0.5
    """Weight of the text itself."""
    temperature: float = 2.0
    alone: bool = True
    """Also train the same student without a teacher, to compare."""
    evaluations: int = 10
    """Measurements on held-out data over a run."""
    patience: int = 0
    """Measurements in a row without a better held-out loss that end a run; 0: never."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"layers": 1, "tokens": 1, "batch_tokens": 2, "soft": 0, "hidden": 0, "hard": 0}
        check_limits(self, least | {"evaluations": 1, "patience": 0, "seed": 0})
        check_positive(self, "temperature", "learning_rate")
        if self.soft == self.hidden == 0:
            raise TrainingError("--soft and --hidden are both 0: the teacher would teach nothing; use edgelm pretrain")


def distill(
    teacher: str,
    data: Path,
    out: Path,
    options: DistillOptions,
    *,
    revision: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Train a student on a text file and what a checkpoint makes of it, or go on with the run in `out`.

    `out` then holds what ``edgelm export`` takes, with report.md, report.json and curves.svg.

    Args:
        teacher: a folder in Hugging Face layout, or a hub id.
        revision: branch, tag or commit of a hub id.
        say: told in one line each what is going on.

    Raises:
        ExportError: the teacher cannot be loaded.
        TrainingError: data or options cannot be used, `out` holds another run or a finished one, or the loss diverged.
    """
    started = check_out(out)
    checkpoint = load_checkpoint(teacher, revision)
    master = fast_to_train(checkpoint.model)
    student = _student(master, options)
    window = min(student.config.n_positions, master.config.n_positions)
    texts = read_text(data, options.held_out, checkpoint, window, "a size with a shorter context")
    marks = fingerprints(checkpoint, data, options.held_out)
    device = torch.device(device_for(options.device))
    master.to(device)
    taught = texts.held_out_loss(master)
    weights = DistillationWeights(options.soft, options.hidden, options.hard, options.temperature)
    torch.manual_seed(options.seed)
    apprentice = Apprentice.of(student, master, weights).to(device)
    recording = {**marks, **recorded(options)}
    batch = _batch_tokens(options, student.config, window)
    folder, precision = begin_run(out, started, recording, lambda: fastest_precision(apprentice, batch, window)[0])
    schedule = _schedule(options, texts, student.config, precision)
    parameters = sum(p.numel() for p in student.parameters())
    say(
        f"{parameters:,} parameters learn from {checkpoint.parameters:,}, {schedule.steps:,} steps of "
        f"{schedule.batch_tokens:,} tokens; the teacher's held-out loss: {taught.per_token:.4f} nats a token"
    )
    outcome = _learn(apprentice, texts, folder / "student", schedule, options, say)
    # A signal in the student's last measurement ends this call too, unless only the report is left.
    if outcome.ended == "signal" or (options.alone and outcome.signal is not None):
        return Tuned(None, outcome)
    losses = {"teacher": taught.per_token, "student": texts.held_out_loss(apprentice).per_token}
    logs = {"student": outcome.log}
    if options.alone:
        say("the same student without a teacher, to compare")
        student.to(device)
        other = _learn(student, texts, folder / "alone", schedule, options, say)
        if other.ended == "signal":
            return Tuned(None, other)
        losses["the same student alone"] = texts.held_out_loss(student).per_token
        logs["alone"] = other.log
    report = TuningReport(
        losses=losses,
        facts={
            "teacher": checkpoint.name,
            "teacher's parameters": checkpoint.parameters,
            "student's parameters": parameters,
            "held-out tokens": taught.tokens,
            "ended": outcome.ended,
            "steps": outcome.steps,
            "tokens a step": schedule.batch_tokens,
            "seconds": outcome.seconds,
            "peak learning rate": schedule.learning_rate,
            "precision": precision,
            "weights: soft, hidden, hard": f"{options.soft:g}, {options.hidden:g}, {options.hard:g}",
            "temperature": options.temperature,
        },
        notes=texts.notes,
        log=outcome.log,
    )
    apprentice.cpu().student().save_pretrained(out)
    checkpoint.tokenizer.save(out)
    draw_curves(logs, schedule.batch_tokens, out / CURVES_FILE)
    report.write(out)
    end_run(folder)
    return Tuned(report, outcome)


def _student(teacher: Any, options: DistillOptions) -> Any:
    if options.layers is None:
        return fast_to_train(new_student(teacher, options.size, options.seed))
    if options.layers > teacher.config.n_layer:
        raise TrainingError(f"--layers must be at most the teacher's {teacher.config.n_layer}, got {options.layers}")
    return fast_to_train(student_from_layers(teacher, options.layers))


def _batch_tokens(options: DistillOptions, config: Any, window: int) -> int:
    return max(1, (options.batch_tokens or defaults_for(config).batch_tokens) // window) * window


def _schedule(options: DistillOptions, texts: TextData, config: Any, precision: Precision) -> Schedule:
    batch_tokens = _batch_tokens(options, config, texts.window)
    steps = max(1, round((options.tokens or 2 * len(texts.training)) / batch_tokens))
    return Schedule(
        steps=steps,
        batch_tokens=batch_tokens,
        learning_rate=options.learning_rate or defaults_for(config).learning_rate,
        warmup_steps=round(0.05 * steps),
        weight_decay=0.1,
        precision=precision,
        seed=options.seed,
        evaluate_every=max(1, steps // options.evaluations),
        patience=options.patience or None,
    )


def _learn(
    model: Any, texts: TextData, folder: Path, schedule: Schedule, options: DistillOptions, say: Callable[[str], None]
) -> Outcome:
    return train(
        model,
        texts.batches(schedule.steps, schedule.batch_tokens // texts.window, options.seed),
        lambda model: texts.held_out_loss(model).per_token,
        folder,
        schedule,
        device=options.device,
        say=say,
    )
