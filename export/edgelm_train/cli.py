"""The commands ``edgelm pretrain``, ``finetune``, ``distill`` and ``evaluate``.

This file loads without torch: a command refuses what it can before it loads the module that does the work.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from edgelm.cli.progress import percent, progress
from edgelm.cli.shared import OpenModel, json_option, model_options, print_json
from edgelm.cli.streams import escaped, note, print_line
from edgelm.cli.task_answers import read_fields
from edgelm.errors import TrainingError, install_hint
from edgelm_train.data.bpe import load_bpe
from edgelm_train.data.corpus import read_corpus, read_parts
from edgelm_train.data.examples import read_pairs
from edgelm_train.data.records import read_records
from edgelm_train.data.similarity import SimilarityTask, read_scored_texts
from edgelm_train.data.templates import ChatTask, Task, unescaped
from edgelm_train.data.text_file import check_file
from edgelm_train.models.base import find_base
from edgelm_train.models.sizes import read_shape
from edgelm_train.options import Declaration, DistillOptions, FinetuneOptions, PretrainOptions, declarations
from edgelm_train.run.folder import check_name, check_out
from edgelm_train.run.lock import locked

if TYPE_CHECKING:
    from edgelm_train.run.report import Finished, ReportKind

Function = TypeVar("Function", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path)
_OUT = click.option(
    "-o", "--out", required=True, type=_FILE, metavar="FOLDER", help="Output folder: new, or with a run to resume."
)
_REVISION = click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
_NEEDED = ("torch", "transformers", "tokenizers", "accelerate", "tensorboard", "matplotlib")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


class _Count(click.ParamType):  # type: ignore[type-arg]  # generic in new versions of click only
    """A number like 12.4M; K is a thousand, M a million, G and B are a billion."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([KMGB]?)", str(value).strip().upper())
        if not match or float(match[1]) * _UNITS[match[2]] < 1:
            self.fail(f"{value!r} is not a number like 500K or 12.4M", param, ctx)
        return round(float(match[1]) * _UNITS[match[2]])


def _flags(declared: Iterable[Declaration], *more: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """A decorator that gives a command one flag for each declared option, and `more` flags before ``--device``."""

    def decorate(function: Function) -> Function:
        for declaration in reversed(list(declared)):
            function = _flag(declaration)(function)
            for decorator in more if declaration.name == "device" else ():
                function = decorator(function)
        return function

    return decorate


def _flag(declared: Declaration) -> Callable[[Any], Any]:
    option, kind = declared.option, declared.kind
    choices = get_args(kind)
    return click.option(
        f"--{declared.flag}/--no-{declared.flag}" if kind is bool else f"--{declared.flag}",
        declared.name,
        type=click.Choice(choices) if choices else _FILE if kind is Path else _Count() if option.counted else kind,
        default=declared.default,
        show_default=declared.default is not None,
        metavar=option.metavar,
        help=option.help if option.unset is None else f"{option.help}  [default: {option.unset}]",
    )


@click.command(name="pretrain")
@click.option("--data", multiple=True, required=True, type=_FILE, metavar="FILE", help="UTF-8 text; repeatable.")
@click.argument("more", nargs=-1, type=_FILE, metavar="[FILE]...")
@_OUT
@_flags(declarations(PretrainOptions))
def pretrain_command(data: tuple[Path, ...], more: tuple[Path, ...], out: Path, **options: Any) -> int:
    """Train a tokenizer and a GPT-2 on text files.

    \b
    edgelm pretrain --data stories.txt --out stories --size 6M --tokens 12M
    edgelm export stories -o stories-int8
    edgelm run -m stories-int8 "Once upon a time"

    Documents are separated by <|endoftext|>; a file without it is one document. The output folder also gets report.md
    and curves.svg. Ctrl-C writes a checkpoint, and the same command goes on from there.
    """
    chosen = PretrainOptions(**{**options, "separator": unescaped(options["separator"])})
    files = [*data, *more]
    with _prepared("pretrain", out, *files, chosen.tokenizer, chosen.start_from):
        read_corpus(files, separator=chosen.separator, held_out=chosen.held_out)
        size = chosen.size or "6M" if chosen.start_from is None else str(chosen.start_from / "config.json")
        chosen.least_batch_tokens(read_shape(size)["n_positions"])
        folder = chosen.tokenizer or chosen.start_from
        if folder is not None:
            load_bpe(folder)
        _say_loading()
        from edgelm_train.pretrain import pretrain

        done = pretrain(files, out, chosen, say=_say)
    if done.report is not None:
        losses = ", ".join(f"{loss:.4f} in windows of {window}" for window, loss in done.report.held_out.items())
        _say_results(out, done, f"held-out loss {losses}; overfitting gap {done.report.gap:.4f}")
    return _exit_status(done)


@click.command(name="finetune")
@click.argument("base")
@click.option("--data", required=True, type=_FILE, metavar="FILE", help="UTF-8 text, or .jsonl, .json, .tsv, .csv.")
@_OUT
@_flags(declarations(FinetuneOptions), _REVISION)
def finetune_command(base: str, data: Path, out: Path, revision: str | None, **options: Any) -> int:
    """Tune the checkpoint BASE, a folder, a hub id or a GGUF file, on a text or on examples.

    \b
    edgelm finetune gpt2 --data novel.txt --out novel
    edgelm export gpt2 --adapter novel -o novel-int8
    edgelm finetune gpt2 --data reviews.tsv --prompt "{text} It was" --completion " {label}" \\
        --method prefix --out reviews
    edgelm run -m gpt2-int8 --prefix reviews/prefix.safetensors "So dull. It was"

    With --latent, each line of a plain text is a text of its own, and the result is a checkpoint with a latent part.
    Otherwise every token of a plain text is learned. Of an example, only the completion and an end-of-text token
    after it are learned; without templates, the columns "prompt" and "completion" are taken. With --similarity, the
    vectors of two texts learn to be as alike as the scores say. Ctrl-C writes a checkpoint, and the same command goes
    on from there.
    """
    chosen = FinetuneOptions(**options)
    task = chosen.task_for(data)
    with _prepared("finetune", out, data, chosen.held_out, Path(base), packages=("peft",)):
        found = find_base(base, revision)
        if chosen.latent:
            found.refuse_other_families("--latent")
        context = found.context_length
        if context is not None:
            chosen.room_in(context)
        if not chosen.latent:
            _check_data(data, chosen.held_out, task)
        _say_loading()
        from edgelm_train.finetune import finetune

        done = finetune(base, data, out, chosen, revision=revision, say=_say)
    if done.report is not None:
        losses = done.report.losses
        if chosen.latent:
            _say_results(
                out, done, "held-out loss: " + "; ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            )
        else:
            metric = f"held-out {done.report.metric}"
            _say_results(out, done, f"{metric} {losses['before']:.4f} before, {losses['after']:.4f} after")
        click.echo("\n    ".join(["use it like this:", *done.report.next_steps]), err=True)
    return _exit_status(done)


@click.command(name="distill")
@click.argument("teacher")
@click.option("--data", required=True, type=_FILE, metavar="FILE", help="UTF-8 text.")
@_OUT
@_flags(declarations(DistillOptions), _REVISION)
def distill_command(teacher: str, data: Path, out: Path, revision: str | None, **options: Any) -> int:
    """Train a small GPT-2 on a text and on what the checkpoint TEACHER, a folder or a hub id, predicts for it.

    \b
    edgelm distill stories-6m --data stories.txt --out stories-1m --size 1M --tokens 2M
    edgelm export stories-1m -o stories-1m-int8

    The student has the teacher's tokenizer. The report compares the student with its teacher, and with an equal
    student that was trained as long without a teacher. Ctrl-C writes a checkpoint, and the same command goes on from
    there.
    """
    chosen = DistillOptions(**options)
    with _prepared("distill", out, data, chosen.held_out, Path(teacher)):
        find_base(teacher, revision).refuse_other_families("edgelm distill")
        if chosen.layers is None:
            read_shape(chosen.size)
        _check_data(data, chosen.held_out, None)
        _say_loading()
        from edgelm_train.distill import distill

        done = distill(teacher, data, out, chosen, revision=revision, say=_say)
    if done.report is not None:
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in done.report.losses.items())
        _say_results(out, done, f"held-out loss: {losses}")
    return _exit_status(done)


@click.command(name="evaluate")
@model_options
@click.option(
    "--task", metavar="FILE", help="Task file (docs/tasks.md); by default the prefix's own task, or else the bundle's."
)
@click.option("--data", required=True, type=_FILE, metavar="FILE", help="Examples: JSON Lines, JSON, TSV or CSV.")
@click.option("--target", required=True, metavar="COLUMN", help="The column of the right label, text or number.")
@click.option(
    "--field",
    "fields",
    multiple=True,
    metavar="NAME=COLUMN",
    help="The column of a field of the task, where it has another name. Repeatable.",
)
@click.option("--name", metavar="TEXT", help="What to call the data in the result.  [default: the file's name]")
@json_option("Print one JSON object for each metric, as a task file lists them under `measured`.")
def evaluate_command(
    open_model: OpenModel,
    task: str | None,
    data: Path,
    target: str,
    fields: tuple[str, ...],
    name: str | None,
    as_json: bool,
) -> None:
    """Measure the task of a bundle or a prefix on labelled data: accuracy, BLEU and ROUGE-L, or Spearman's correlation.

    \b
    edgelm evaluate -m sentiment-int8 --data dev.tsv --target label
    edgelm evaluate -m en-de-int8 --data test.csv --target de --field text=en
    edgelm evaluate -m gpt2-int8 --prefix mood.safetensors --data dev.tsv --target mood
    """
    columns = read_fields(fields)
    records = read_records(data)
    model = open_model(task=task)
    from edgelm_train.evaluate import evaluate

    with progress("evaluated") as show:
        done = evaluate(model, records, target, columns, name or data.name, percent(show))
    for line in done.unanswered[:3]:
        note(f"edgelm: no answer to {line}")
    if done.unanswered:
        note(f"edgelm: {len(done.unanswered):,} of {len(records.rows):,} inputs have no answer; they count as wrong")
    for measured in done.measured:
        if as_json:
            print_json({key: value for key, value in asdict(measured).items() if value is not None})
        else:
            print_line(
                escaped(f"{measured.metric} {measured.value:.4g} on {measured.count:,} examples, {measured.data}")
            )


@contextmanager
def _prepared(command: str, out: Path, *paths: Path | None, packages: tuple[str, ...] = ()) -> Iterator[None]:
    """Hold the folder `out` after missing packages, names that are not UTF-8 and an `out` in use were refused."""
    missing = [name for name in (*_NEEDED, *packages) if find_spec(name) is None]
    if missing:
        raise TrainingError(f"{command} needs {', '.join(missing)}; {install_hint('cpu,train')}")
    check_out(out)
    for path in paths:
        if path is not None:
            check_name(path)
    with locked(out, f"edgelm {command}"):
        yield


def _check_data(data: Path, held_out: Path | None, task: Task | ChatTask | SimilarityTask | None) -> None:
    """Read the data once before torch is loaded, because broken data are told at once."""
    check_file(data)
    if held_out is not None:
        check_file(held_out)
    if task is None:
        read_parts(data, held_out)
        return
    for path in (data, held_out):
        if path is None:
            continue
        if isinstance(task, SimilarityTask):
            read_scored_texts(path, task)
        else:
            read_pairs(path, task)


def _say_loading() -> None:
    click.echo("loading torch and transformers ...", err=True)


def _say(line: str) -> None:
    click.echo(f"edgelm: {line}", err=True)


def _say_results(out: Path, done: "Finished[ReportKind]", losses: str) -> None:
    click.echo(f"{out}: {losses}; {done.outcome.seconds:,.0f} s; see {out / 'report.md'}")


def _exit_status(done: "Finished[ReportKind]") -> int:
    """0, or where a signal stopped the run the status with which a shell reports that signal."""
    if done.report is not None:
        return 0
    _say(f"stopped after step {done.outcome.steps:,}; a checkpoint is written, and the same command goes on from there")
    return 128 + (done.outcome.signal or 0)
