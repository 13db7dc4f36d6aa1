"""``edgelm distill``: a small GPT-2 learns from a larger one, and is compared with an equal one without a teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgelm.errors import TrainingError
from edgelm_train.data.corpus import counted
from edgelm_train.data.end_of_text import EndOfText
from edgelm_train.models.base import Base, find_base
from edgelm_train.models.distillation_loss import DistillationWeights
from edgelm_train.models.result import save_result, set_settings_aside
from edgelm_train.models.sizes import defaults_for
from edgelm_train.models.student import Apprentice, new_student, student_from_layers
from edgelm_train.options import DistillOptions
from edgelm_train.run.checkpoints import follow_umask
from edgelm_train.run.folder import RUN_FOLDER, begin_run, check_out, saving
from edgelm_train.run.guesses import guesses_in_windows
from edgelm_train.run.lock import locked
from edgelm_train.run.loop import Schedule
from edgelm_train.run.machine import device_for, fast_to_train, fastest_precision
from edgelm_train.run.report import Finished, TuningReport
from edgelm_train.run.tuning_data import fingerprints, read_text, train_on


def distill(
    teacher: str,
    data: Path,
    out: Path,
    options: DistillOptions,
    *,
    revision: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Finished[TuningReport]:
    """Train a student on a text file and on what a checkpoint predicts for it, or resume the unfinished run in `out`.

    A finished run leaves a checkpoint for ``edgelm export`` in `out`, with report.md, report.json and curves.svg.
    `teacher` is a folder in Hugging Face layout, or a hub id with the branch, tag or commit `revision`; or the folder
    of a LoRA adapter whose base is at hand. `data` is UTF-8 text. `say` gets lines about the progress.

    Raises:
        ExportError: the teacher cannot be loaded.
        TrainingError: data or options cannot be used, `out` contains another or a finished run or another process is at
            work there, or the loss diverged.
    """
    check_out(out)
    with locked(out, "edgelm distill"):
        return _distill(find_base(teacher, revision), data, out, options, say)


def _distill(
    teacher: Base, data: Path, out: Path, options: DistillOptions, say: Callable[[str], None]
) -> Finished[TuningReport]:
    check_out(out)
    checkpoint = teacher.load_gpt2("edgelm distill")
    teacher_model = fast_to_train(checkpoint.model)
    set_settings_aside(teacher_model)
    end = EndOfText.of(checkpoint)
    student = _student(teacher_model, options)
    window = min(student.config.n_positions, teacher_model.config.n_positions)
    texts = read_text(data, options.held_out, checkpoint, window, "a size with a shorter context")
    recorded = {**fingerprints(checkpoint, data, options.held_out, teacher.adapter), **options.recorded()}
    device = torch.device(device_for(options.device))
    teacher_loss = texts.held_out_loss(teacher_model.to(device))
    weights = DistillationWeights(options.soft, options.hidden, options.hard, options.temperature)
    torch.manual_seed(options.seed)
    apprentice = Apprentice.of(student, teacher_model, weights).to(device)
    usual = defaults_for(student.config)
    asked = max(1, (options.batch_tokens or usual.batch_tokens) // window) * window
    batch_tokens = min(asked, texts.rows * window)
    notes = (*checkpoint.notes, *texts.notes)
    if batch_tokens < asked:
        notes += (f"a step of {asked:,} tokens is more than the text has: a step takes each of its windows once",)
    for note in notes:
        say(note)
    precision = begin_run(out, recorded, lambda: fastest_precision(apprentice, batch_tokens, window)[0])
    steps = max(1, round((options.tokens or 2 * len(texts.training)) / batch_tokens))
    schedule = Schedule(
        steps=steps,
        batch_tokens=batch_tokens,
        learning_rate=options.learning_rate or usual.learning_rate,
        warmup_steps=round(0.05 * steps),
        weight_decay=0.1,
        precision=precision,
        seed=options.seed,
        evaluate_every=max(1, steps // options.evaluations),
        patience=options.patience or None,
    )
    parameters = sum(p.numel() for p in student.parameters())
    say(
        f"{parameters:,} parameters learn from {checkpoint.source.parameters:,}, {counted(schedule.steps, 'step')} of "
        f"{schedule.batch_tokens:,} tokens; held-out loss of the teacher: {teacher_loss.per_token:.4f} nats per token"
    )
    folder = out / RUN_FOLDER
    outcome = train_on(texts, apprentice, folder / "student", schedule, options.device, say, objective=None)
    # A signal during the last measurement of the student ends this call too, unless only the report is left to do.
    if outcome.ended == "signal" or (options.alone and outcome.signal is not None):
        return Finished(None, outcome)
    losses = {"teacher": teacher_loss.per_token, "student": texts.held_out_loss(apprentice).per_token}
    right = guesses_in_windows(apprentice, teacher_model, texts.held_out.ids, window)
    logs = {"student": outcome.log}
    if options.alone:
        say("training the same student without a teacher, to compare")
        student.to(device)
        alone = train_on(texts, student, folder / "alone", schedule, options.device, say, objective=texts.losses)
        if alone.ended == "signal":
            return Finished(None, alone)
        losses["the same student alone"] = texts.held_out_loss(student).per_token
        logs["alone"] = alone.log
    report = TuningReport(
        losses=losses,
        facts={
            "teacher": checkpoint.name,
            "teacher's parameters": checkpoint.source.parameters,
            "student's parameters": parameters,
            "held-out tokens": teacher_loss.tokens,
            "guesses right, greedy": f"{right.greedy:.2%}",
            "guesses right, sampled at temperature 1": f"{right.sampled:.2%}",
            "ended": outcome.ended,
            "steps": outcome.steps,
            "tokens per step": schedule.batch_tokens,
            "seconds": outcome.seconds,
            "peak learning rate": schedule.learning_rate,
            "precision": precision,
            "weights: soft, hidden, hard": f"{options.soft:g}, {options.hidden:g}, {options.hard:g}",
            "temperature": options.temperature,
        },
        notes=notes,
        log=outcome.log,
    )
    with saving(out):
        save_result(apprentice.cpu().student(), checkpoint, end, out, settings=False)
        follow_umask(out)
    return Finished.with_report(report, outcome, logs, schedule.batch_tokens, out)


def _student(teacher: Any, options: DistillOptions) -> Any:
    if options.layers is None:
        return fast_to_train(new_student(teacher, options.size, options.seed))
    if options.layers > teacher.config.n_layer:
        raise TrainingError(f"--layers must be at most the teacher's {teacher.config.n_layer}, got {options.layers}")
    return fast_to_train(student_from_layers(teacher, options.layers))
