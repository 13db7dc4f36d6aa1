"""``edgelm finetune``: a checkpoint learns a text or a task, in all its weights, in an adapter, or in a prefix."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgelm.errors import TrainingError
from edgelm_export.source.checkpoint import Checkpoint
from edgelm_export.source.generation_settings import FILE
from edgelm_train.data.corpus import counted
from edgelm_train.data.end_of_text import EndOfText
from edgelm_train.data.similarity import SimilarityTask
from edgelm_train.data.templates import ChatTask, Task, unescaped
from edgelm_train.latent import finetune_latent
from edgelm_train.models.adapters import save_prefix, with_low_rank, with_prefix
from edgelm_train.models.base import Base, find_base
from edgelm_train.models.result import save_result, set_settings_aside
from edgelm_train.options import LORA_RANK, PAIRS_PER_STEP, ROWS_PER_STEP, WINDOW_TOKENS, FinetuneOptions, Method
from edgelm_train.run.checkpoints import follow_umask
from edgelm_train.run.folder import RUN_FOLDER, begin_run, check_out, saving
from edgelm_train.run.lock import locked
from edgelm_train.run.loop import Schedule
from edgelm_train.run.machine import device_for, fast_to_train, fastest_precision
from edgelm_train.run.pair_data import PairData, read_similarities
from edgelm_train.run.report import Finished, TuningReport
from edgelm_train.run.tuning_data import (
    HELD_OUT_EVERY,
    TextData,
    TuningData,
    fingerprints,
    read_tasks,
    read_text,
    train_on,
)

PREFIX_FILE = "prefix.safetensors"
EMBED_TASK_FILE = "task.json"

_LEARNING_RATES: dict[Method, float] = {"full": 5e-4, "lora": 2e-3, "prefix": 1e-1}
_TRIED_TOKENS = 256
"""Tokens with which the faster precision is found: enough for matrices as large as those of a run."""
_SIMILARITY_RATES: dict[Method, float] = {"full": 2e-4, "lora": 2e-3, "prefix": 1e-1}
_FULL_RATE_WIDTH = 256
"""The width of the models for which the rates of all weights were found. The rate falls with the square of the
width: to 5.6e-5 for GPT-2, and to 2.2e-5 for similarity, which are the field's usual rates (docs/decisions.md)."""
_WEIGHT_DECAY: dict[Method, float] = {"full": 0.01, "lora": 0.0, "prefix": 0.0}


def usual_rate(method: Method, width: int, for_similarity: bool) -> float:
    """The peak learning rate where the user gives none. `width` is the number of channels of the hidden states."""
    rate = (_SIMILARITY_RATES if for_similarity else _LEARNING_RATES)[method]
    return rate * min(1, _FULL_RATE_WIDTH / width) ** 2 if method == "full" else rate


def finetune(
    base: str,
    data: Path,
    out: Path,
    options: FinetuneOptions,
    *,
    revision: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Finished[TuningReport]:
    """Tune a checkpoint on a file of UTF-8 text or of records, or resume the unfinished run in `out`.

    A finished run leaves report.md, report.json and curves.svg in `out`, and the result of its method: a checkpoint
    (full), an adapter for ``edgelm export --adapter`` (lora), or ``prefix.safetensors`` for
    ``edgelm.load(..., prefix=...)`` with any bundle of `base` (prefix). `base` is of any family that ``edgelm export``
    takes: a folder in Hugging Face layout, a GGUF file, or a hub id with the branch, tag or commit `revision`. It may
    also be the folder of a LoRA adapter whose base is at hand: lora goes on with this adapter, and the other methods
    start from the base with the adapter merged into it. `say` gets lines about the progress. With ``options.latent``
    the result is a checkpoint with a latent part; see `edgelm_train.latent`.

    Raises:
        ExportError: the base cannot be loaded.
        ConfigError: a template cannot be read.
        TrainingError: data or options cannot be used, `out` contains another or a finished run or another process is at
            work there, or the loss diverged.
    """
    check_out(out)
    with locked(out, "edgelm finetune"):
        if options.latent:
            return finetune_latent(find_base(base, revision), data, out, options, say)
        return _finetune(find_base(base, revision), data, out, options, say)


def _finetune(
    base: Base, data: Path, out: Path, options: FinetuneOptions, say: Callable[[str], None]
) -> Finished[TuningReport]:
    check_out(out)
    task = options.task_for(data)
    goes_on = base.adapter is not None and options.chosen_method == "lora"
    checkpoint = base.load(merged=not goes_on)
    end = EndOfText.of(checkpoint)
    prepared = _read(data, task, options, checkpoint)
    recorded = {**fingerprints(checkpoint, data, options.held_out, base.adapter), **options.recorded()}
    if not goes_on:
        recorded["rank"] = options.rank or LORA_RANK
    notes = (*checkpoint.notes, *prepared.notes)
    if base.adapter is not None:
        done = "goes on with the adapter" if goes_on else "starts from the base with the adapter merged:"
        notes += (f"training {done} {base.adapter} of {checkpoint.name!r}",)
    asked = options.batch_size or (PAIRS_PER_STEP if isinstance(prepared, PairData) else ROWS_PER_STEP)
    batch_size = min(asked, prepared.rows)
    if batch_size < (options.batch_size or 0):
        rows = counted(prepared.rows, "example" if task else "window")
        notes += (f"--batch-size is {options.batch_size:,}, and there is no more than {rows}: a step takes each once",)
    for note in notes:
        say(note)
    device = device_for(options.device)
    model = fast_to_train(checkpoint.model, prepared.tokens_per_row).to(device)
    set_settings_aside(model)
    tuned = base.trainable(checkpoint) if goes_on else None
    before = prepared.held_out_measure(model if tuned is None else tuned)
    torch.manual_seed(options.seed)
    if tuned is None:
        tuned = _with_method(model, options, prepared)
    else:
        _check_rank(tuned.peft_config["default"].r, options.rank)
    learned = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    row, batch = prepared.tokens_per_row, batch_size * prepared.tokens_per_row
    tried = min(row, _TRIED_TOKENS), min(batch, _TRIED_TOKENS)
    precision = begin_run(out, recorded, lambda: fastest_precision(tuned, tried[1], tried[0])[0])
    steps = max(1, round(options.epochs * prepared.rows / batch_size))
    width = checkpoint.architecture.hidden_size
    schedule = Schedule(
        steps=steps,
        batch_tokens=batch,
        learning_rate=options.learning_rate or usual_rate(options.chosen_method, width, isinstance(prepared, PairData)),
        warmup_steps=round(0.05 * steps),
        weight_decay=_WEIGHT_DECAY[options.chosen_method],
        beta2=0.999,
        precision=precision,
        seed=options.seed,
        evaluate_every=max(1, steps // options.evaluations),
        patience=options.patience or None,
    )
    say(
        f"{counted(learned, 'parameter')} to learn by {options.chosen_method}, {counted(schedule.steps, 'step')}; "
        f"held-out {_in_words(prepared, before)} before training"
    )
    outcome = train_on(prepared, tuned, out / RUN_FOLDER, schedule, options.device, say, objective=prepared.losses)
    if outcome.ended == "signal":
        return Finished(None, outcome)
    after = prepared.held_out_measure(tuned)
    ranks = isinstance(prepared, PairData)
    report = TuningReport(
        losses={"before": 1 - before, "after": 1 - after} if ranks else {"before": before, "after": after},
        metric="Spearman" if ranks else "loss",
        facts={
            "base": checkpoint.name,
            **({} if base.adapter is None else {"adapter that it started from": str(base.adapter)}),
            "method": options.chosen_method,
            "parameters learned": learned,
            "rows to train on": prepared.rows,
            **prepared.held_out_size,
            "ended": outcome.ended,
            "steps": outcome.steps,
            "tokens": outcome.steps * schedule.batch_tokens,
            "best step, whose weights these are": outcome.best_step,
            "seconds": outcome.seconds,
            "peak learning rate": schedule.learning_rate,
            "precision": precision,
        },
        notes=notes,
        log=outcome.log,
        next_steps=_next_steps(
            base,
            out,
            options.chosen_method,
            task if isinstance(prepared, TextData) else prepared.task,
            settings=end.is_new,
        ),
    )
    with saving(out):
        if options.chosen_method == "full":
            save_result(tuned.cpu(), checkpoint, end, out)
        elif options.chosen_method == "lora":
            tuned.cpu().save_pretrained(out, save_embedding_layers=False)  # else it looks for the base, and warns
        else:
            save_prefix(tuned.cpu(), checkpoint, out / PREFIX_FILE)
        if isinstance(prepared, PairData):
            write_embed_task(options, out)
        if end.is_new and options.chosen_method != "full":
            end.write_settings(out)
        follow_umask(out)
    return Finished.with_report(report, outcome, {"": outcome.log}, schedule.batch_tokens, out)


def _check_rank(rank: int, asked: int | None) -> None:
    if asked not in (None, rank):
        raise TrainingError(f"the adapter has the rank {rank}, and training goes on with it; leave out --rank {asked}")


def _in_words(data: TuningData, measure: float) -> str:
    """What `held_out_measure` of `data` found, for people."""
    if isinstance(data, PairData):
        return f"Spearman {1 - measure:.4f}"
    return f"loss {measure:.4f} nats per token"


def _read(
    data: Path, task: Task | ChatTask | SimilarityTask | None, options: FinetuneOptions, checkpoint: Checkpoint
) -> TuningData:
    context = checkpoint.architecture.context_length
    room = options.room_in(context)
    if isinstance(task, SimilarityTask):
        return read_similarities(data, options.held_out, checkpoint, task, room, HELD_OUT_EVERY)
    if task is not None:
        return read_tasks(data, options.held_out, checkpoint, task, room)
    window = min(room, context // 2, WINDOW_TOKENS) if options.window is None else options.window
    return read_text(data, options.held_out, checkpoint, window, "a smaller --window")


def _with_method(model: Any, options: FinetuneOptions, data: TuningData) -> Any:
    if options.chosen_method == "lora":
        return with_low_rank(model, options.rank or LORA_RANK)
    if options.chosen_method == "prefix":
        return with_prefix(model, data.first_ids(options.prefix_tokens))
    return model.requires_grad_(True)


def _next_steps(
    base: Base,
    out: Path,
    method: Method,
    task: Task | ChatTask | SimilarityTask | None,
    *,
    settings: bool = False,
) -> list[str]:
    """Shell commands that make a bundle of the result and run it with a prompt like those in the data.

    Args:
        base: what was tuned. An adapter was merged before a prefix was learned.
        settings: whether `out` has a file of generation settings for the export.
    """
    bundle = f"{base.short_name if method == 'prefix' else out}-int8"
    export = ["edgelm", "export", str(out) if method == "full" else base.source]
    if method != "full" and base.revision is not None:
        export += ["--revision", base.revision]
    if method == "lora":
        export += ["--adapter", str(out)]
    if method == "prefix" and base.adapter is not None:
        export += ["--adapter", str(base.adapter)]
    if method != "full" and settings:
        export += ["--generation-config", str(out / FILE)]
    run = ["edgelm", "run", "-m", bundle]
    if method == "prefix":
        run += ["--prefix", str(out / PREFIX_FILE)]
    if isinstance(task, SimilarityTask):
        export += ["--task", str(out / EMBED_TASK_FILE)]
        fields = dict.fromkeys((*task.prompt.columns, *task.second.columns), "Your text")
        return [shlex.join([*export, "-o", bundle]), shlex.join([*run, json.dumps(fields)])]
    prompt = "Your text" if task is None else task.prompt.shown()
    names = [] if task is None else [f"{{{name}}}" for name in task.prompt.columns]
    comment = [f"# in place of {', '.join(names)}: your text; all else of the prompt must stay as it is"]
    return [shlex.join([*export, "-o", bundle]), *(comment if names else []), f"{shlex.join(run)} {_quoted(prompt)}"]


def write_embed_task(options: FinetuneOptions, folder: Path) -> None:
    """Write the task of a bundle that compares two texts as training did, for ``edgelm export --task``."""
    content = {
        "kind": "embed",
        "template": unescaped(options.prompt or ""),
        "second_template": unescaped(options.second or ""),
        "pooling": options.pooling or "mean",
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / EMBED_TASK_FILE).write_text(text + "\n", encoding="utf-8")


def _quoted(text: str) -> str:
    """`text` quoted for bash and zsh, by $'...' where it has new lines or tabs: ``edgelm run`` reads no escapes."""
    if not {"\n", "\t"} & set(text):
        return shlex.quote(text)
    escapes = str.maketrans({"\\": r"\\", "'": r"\'", "\n": r"\n", "\t": r"\t"})
    return f"$'{text.translate(escapes)}'"
