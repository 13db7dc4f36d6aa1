"""``edgelm finetune``: a checkpoint learns a text or a task, in all of its weights, in a few, or in none of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edgelm.errors import TrainingError
from edgelm.reuse.prefix import LEAST_ROOM_TOKENS
from edgelm_export.source.checkpoint import Checkpoint, load_checkpoint
from edgelm_train.data.examples import Task
from edgelm_train.data.records import is_records_file
from edgelm_train.data.tuning import TuningData, read_tasks, read_text
from edgelm_train.models.low_rank import with_low_rank
from edgelm_train.models.prefix_tuning import save_prefix, with_prefix
from edgelm_train.run.curves import draw_curves
from edgelm_train.run.folder import begin_run, check_out, device_for, end_run, fingerprints
from edgelm_train.run.loop import Precision, Schedule, train
from edgelm_train.run.precision import fastest_precision
from edgelm_train.run.report import CURVES_FILE
from edgelm_train.run.tuning_report import Tuned, TuningReport
from edgelm_train.run_options import check_limits, check_positive, recorded

Method = Literal["full", "lora", "prefix"]
PREFIX_FILE = "prefix.kv"

_LEARNING_RATES: dict[Method, float] = {"full": 5e-4, "lora": 2e-3, "prefix": 1e-1}
_WEIGHT_DECAY: dict[Method, float] = {"full": 0.01, "lora": 0.0, "prefix": 0.0}


@dataclass(frozen=True)
class FinetuneOptions:
    """How a checkpoint is tuned; None takes what suits the method."""

    method: Method = "lora"
    prompt: str | None = None
    """Template of a prompt; with `completion`, what rows of named columns become."""
    completion: str | None = None
    """Template of what the model is to answer; None: the columns "prompt" and "completion" as they are."""
    held_out: Path | None = None
    """A file to measure on, like the data; None: a part of the data."""
    epochs: float = 3.0
    """Passes over the data."""
    batch_size: int = 8
    """Examples, or windows of text, a step."""
    learning_rate: float | None = None
    window: int | None = None
    """Tokens of text learned at once; None: half the context."""
    rank: int = 8
    """Of LoRA's matrices."""
    prefix_tokens: int = 16
    """How much of the context a prefix takes."""
    patience: int = 3
    """Measurements in a row without a better held-out loss that end the run; 0: never."""
    evaluations: int = 10
    """Measurements on held-out data over the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "rank": 1, "prefix_tokens": 2, "patience": 0, "evaluations": 1, "seed": 0}
        check_limits(self, least)
        check_positive(self, "epochs", "learning_rate")


def finetune(
    base: str,
    data: Path,
    out: Path,
    options: FinetuneOptions,
    *,
    revision: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Tune a checkpoint on a file of text or of records, or go on with the run in `out` that was not finished.

    `out` then holds report.md, report.json, curves.svg, and: a checkpoint (full), an adapter for ``edgelm export
    --adapter`` (lora), or ``prefix.kv``, for ``edgelm.load(..., prefix=...)`` with any bundle of `base` (prefix).

    Args:
        base: a folder in Hugging Face layout, or a hub id.
        revision: branch, tag or commit of a hub id.
        say: told in one line each what is going on.

    Raises:
        ExportError: the base cannot be loaded.
        TrainingError: data or options cannot be used, `out` holds another run or a finished one, or the loss diverged.
    """
    started = check_out(out)
    checkpoint = load_checkpoint(base, revision)
    prepared = _read(data, options, checkpoint)
    marks = fingerprints(checkpoint, data, options.held_out)
    for note in prepared.notes:
        say(note)
    model = fast_to_train(checkpoint.model).to(device_for(options.device))
    before = prepared.held_out_loss(model)
    torch.manual_seed(options.seed)
    tuned = _with_method(model, options, prepared)
    learned = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    row, batch = prepared.tokens_a_row, options.batch_size * prepared.tokens_a_row
    recording = {**marks, **recorded(options)}
    folder, precision = begin_run(out, started, recording, lambda: fastest_precision(tuned, batch, row)[0])
    schedule = _schedule(options, prepared, precision)
    say(
        f"{learned:,} numbers to learn by {options.method}, {schedule.steps:,} steps; "
        f"held-out loss before: {before.per_token:.4f} nats a token"
    )
    outcome = train(
        tuned,
        prepared.batches(schedule.steps, options.batch_size, options.seed),
        lambda model: prepared.held_out_loss(model).per_token,
        folder,
        schedule,
        device=options.device,
        say=say,
    )
    if outcome.ended == "signal":
        return Tuned(None, outcome)
    after = prepared.held_out_loss(tuned)
    report = TuningReport(
        losses={"before": before.per_token, "after": after.per_token},
        facts={
            "base": checkpoint.name,
            "method": options.method,
            "numbers learned": learned,
            "rows to learn from": prepared.rows,
            "held-out tokens": before.tokens,
            "ended": outcome.ended,
            "steps": outcome.steps,
            "best step, whose weights these are": outcome.best_step,
            "seconds": outcome.seconds,
            "peak learning rate": schedule.learning_rate,
            "precision": precision,
        },
        notes=prepared.notes,
        log=outcome.log,
    )
    _save(tuned.cpu(), checkpoint, options.method, out)
    draw_curves({"": outcome.log}, schedule.batch_tokens, out / CURVES_FILE)
    report.write(out)
    end_run(folder)
    return Tuned(report, outcome)


def fast_to_train(model: Any) -> Any:
    """The same function from quicker kernels: fused attention where the checkpoint's is the usual one, fused GELU."""
    config = model.config
    if config.scale_attn_weights and not (config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn):
        config._attn_implementation = "sdpa"
    if config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = torch.nn.GELU(approximate="tanh")
    return model


def _read(data: Path, options: FinetuneOptions, checkpoint: Checkpoint) -> TuningData:
    context = checkpoint.model.config.n_positions
    room = context - options.prefix_tokens if options.method == "prefix" else context
    if room < LEAST_ROOM_TOKENS:
        raise TrainingError(
            f"--prefix-tokens {options.prefix_tokens} leaves no room in the context of {context}: give at most "
            f"{context - LEAST_ROOM_TOKENS}"
        )
    if is_records_file(data):
        if options.window is not None:
            raise TrainingError("--window belongs to plain text; examples are as long as they are")
        return read_tasks(data, options.held_out, checkpoint, Task.parse(options.prompt, options.completion), room)
    if options.prompt is not None or options.completion is not None:
        raise TrainingError(
            f"--prompt and --completion need named columns, but {str(data)!r} is taken as plain text; "
            "give a .jsonl, .json, .tsv or .csv file"
        )
    window = min(room, context // 2) if options.window is None else options.window
    if not 2 <= window <= room:
        raise TrainingError(f"--window must be 2 to {room} tokens, got {window}")
    return read_text(data, options.held_out, checkpoint, window, "a smaller --window")


def _with_method(model: Any, options: FinetuneOptions, data: TuningData) -> Any:
    if options.method == "lora":
        return with_low_rank(model, options.rank)
    if options.method == "prefix":
        return with_prefix(model, data.first_ids(options.prefix_tokens))
    return model.requires_grad_(True)


def _schedule(options: FinetuneOptions, data: TuningData, precision: Precision) -> Schedule:
    steps = max(1, round(options.epochs * data.rows / options.batch_size))
    return Schedule(
        steps=steps,
        batch_tokens=options.batch_size * data.tokens_a_row,
        learning_rate=options.learning_rate or _LEARNING_RATES[options.method],
        warmup_steps=round(0.05 * steps),
        weight_decay=_WEIGHT_DECAY[options.method],
        beta2=0.999,
        precision=precision,
        seed=options.seed,
        evaluate_every=max(1, steps // options.evaluations),
        patience=options.patience or None,
    )


def _save(tuned: Any, checkpoint: Checkpoint, method: Method, out: Path) -> None:
    if method == "prefix":
        save_prefix(tuned, checkpoint, out / PREFIX_FILE)
        return
    tuned.save_pretrained(out)
    if method == "full":
        checkpoint.tokenizer.save(out)
