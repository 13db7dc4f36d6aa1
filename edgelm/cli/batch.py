"""``edgelm batch``: a file of prompts becomes a file of texts, and a killed run goes on where it stopped."""

import hashlib
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import click

from edgelm import __version__
from edgelm.batch.rows import Job, Kind, check_options
from edgelm.cli.constraint_flags import EXIT_CUT, constraint_options
from edgelm.cli.generation_flags import GroupedCommand, generation_options_without, given_options
from edgelm.cli.interrupt import EXIT_INTERRUPTED, EXIT_TERMINATED, unwinds
from edgelm.cli.progress import progress
from edgelm.cli.shared import OpenModel, check_output_file, model_options
from edgelm.cli.streams import note
from edgelm.cli.task_flags import task_option
from edgelm.errors import ConfigError

if TYPE_CHECKING:
    from edgelm.batch.output import Output, RunRecord
    from edgelm.batch.pool import Pool
    from edgelm.batch.source import Source
    from edgelm.decoding.generation_config import GenerationConfig, GenerationOptions
    from edgelm.model import Model
    from edgelm.text.constraints import Constraint

ONE_AT_A_TIME = (
    *("num_return_sequences", "max_time", "prompt_lookup_num_tokens", "penalty_alpha", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "length_penalty", "early_stopping", "renormalize_logits"),
)
"""Generation options that a batch refuses, and those that do nothing without them."""
_MOST_OPTION_CHARACTERS = 200


@click.command(name="batch", cls=GroupedCommand)
@click.argument("source", metavar="IN.jsonl", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT.jsonl", type=click.Path(path_type=Path))
@model_options
@click.option(
    "--as",
    "kind",
    type=click.Choice(get_args(Kind)),
    help="What to do with each row; by default the bundle's task, or generate.",
)
@task_option
@generation_options_without(*ONE_AT_A_TIME)
@constraint_options
@click.option("--rows", type=int, default=8, show_default=True, metavar="N", help="Decode N texts side by side.")
@click.option("--unordered", is_flag=True, help="Write answers as they come, not in the order of the input.")
@click.option("--ray", "address", metavar="ADDRESS", help='Compute on this Ray cluster; "local" starts one here.')
@click.option("--workers", type=click.IntRange(1, 100_000), metavar="N", help="Ray: start N workers of --threads each.")
def command(
    source: Path,
    target: Path,
    open_model: OpenModel,
    kind: Kind | None,
    task: str | None,
    rows: int,
    unordered: bool,
    address: str | None,
    workers: int | None,
    constraint: "Constraint | None",
    **options: object,  # the values of `generation_options_without`
) -> None:
    """Answer every line of the file IN.jsonl with a line of the file OUT.jsonl.

    A line is a JSON object: "prompt" or "messages", or the fields of the bundle's task; an "id" if you like; and
    generation options, which come before those of the command. The answer has "line", its number, "id", "text" and
    "finish_reason", or "error". The same command goes on where a killed one stopped.

    \b
    edgelm batch prompts.jsonl texts.jsonl --seed 1
    edgelm batch reviews.jsonl moods.jsonl --task mood.json
    edgelm batch pairs.jsonl scores.jsonl --as score
    edgelm batch prompts.jsonl texts.jsonl --ray local --workers 4 --threads 1
    """
    from edgelm.batch.output import opened_output
    from edgelm.batch.source import Source

    context = click.get_current_context()
    if workers is not None and address is None:
        context.fail("--workers is about Ray: give --ray too, or leave it out")
    check_output_file(str(target))
    if target.exists() and source.exists() and target.samefile(source):
        context.fail("IN.jsonl and OUT.jsonl are the same file: give another output")
    given = cast("GenerationOptions", given_options(options))
    if constraint is not None:
        given["constraint"] = constraint
    lines = Source.read(source)
    model = open_model(task=task)
    kind, config = _agreed(model, kind, task, given)
    model.generation_config = config  # this command's own model
    with opened_output(target, _record(model, kind, config, lines, ordered=not unordered)) as output:
        begun = output.record
        assert begun.seed is not None  # the record of a run that has begun has one
        job = Job(kind, begun.seed, datetime.fromisoformat(begun.started), rows)
        if output.found:
            note(f"edgelm: {str(target)!r} has {output.found:,} of {lines.lines:,} answers already")
        if output.found < lines.lines:
            _run(lines, output, lambda: _pool(model, job, address, workers), ordered=not unordered)
    written = output.written
    if written.cut and config.constraint is not None:
        note(
            f"edgelm: {written.cut:,} texts were cut off before they were what they must be: allow more tokens with -n"
        )
        context.exit(EXIT_CUT)
    if written.failed:
        note(f'edgelm: {written.failed:,} of {lines.lines:,} lines could not be answered: see "error" in their answers')
        context.exit(1)


def _agreed(
    model: "Model", kind: Kind | None, task: str | None, given: "GenerationOptions"
) -> "tuple[Kind | None, GenerationConfig]":
    """What to do, None for the model's task, and the options of the whole run. Raises ConfigError."""
    if kind is not None and task is not None:
        raise ConfigError(f"--as {kind} leaves the task out: drop --task or --as")
    if kind is None and model.task_format is None:
        kind = "generate"
    if kind is None:
        assert model.task_format is not None
        config = model.task_format.config(model.generation_config, given)
    elif kind == "generate":
        config = model.generation_config.updated(dict(given))
    else:
        if given:
            raise ConfigError(f"{next(iter(given))!r} has no effect with --as {kind}, which generates no text")
        return kind, model.generation_config
    check_options(config)
    return kind, config


def _record(
    model: "Model", kind: Kind | None, config: "GenerationConfig", lines: "Source", *, ordered: bool
) -> "RunRecord":
    """How this command begins a run."""
    from edgelm.batch.output import RunRecord
    from edgelm.decoding.generation_config import DEFAULTS

    manifest = model.bundle.manifest
    options = {name: repr(getattr(config, name)) for name in DEFAULTS if name != "seed"}
    changed = {name: value for name, value in options.items() if value != repr(DEFAULTS[name])}
    return RunRecord(
        input_sha256=lines.sha256,
        bundle=manifest.digest,
        prefix="" if model.prefix is None else model.prefix.sha256,
        task="" if kind is not None or model.task_format is None else _sha256(repr(model.task_format.task)),
        kind=kind or "task",
        context=manifest.architecture.context_length,
        device=str(model.graph.device),
        order="input" if ordered else "finished",
        options={
            name: value if len(value) <= _MOST_OPTION_CHARACTERS else _sha256(value) for name, value in changed.items()
        },
        seed=config.seed,
        started=datetime.now().isoformat(timespec="seconds"),
        edgelm=__version__,
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _pool(model: "Model", job: Job, address: str | None, workers: int | None) -> "Pool":
    """What computes the rows. With a Ray cluster the model here only says what the workers load, and is closed."""
    from edgelm.batch.pool import ThreadPool

    if address is None:
        return ThreadPool(model, job)
    from edgelm.batch.ray_pool import RayPool

    model.close()
    return RayPool(address, model, job, workers=workers, threads=model.graph.threads)


def _run(lines: "Source", output: "Output", make_pool: "Callable[[], Pool]", *, ordered: bool) -> None:
    """Compute the missing rows, and write them. After Ctrl-C or SIGTERM the command exits."""
    from edgelm.batch.pool import answers

    left = lines.rows(output.written.lines)
    try:
        with unwinds() as raise_again, progress("answers") as show, closing(make_pool()) as pool:
            pace = _Pace(output.found, lines.lines)

            def tell() -> None:
                raise_again()
                show(pace.line())

            for answer in answers(pool, left, ordered=ordered, tell=tell):
                output.write(answer)
                pace.count(answer.new_tokens)
    except (KeyboardInterrupt, SystemExit) as signal:
        done = len(output.written.lines)
        note(f"edgelm: stopped after {done:,} of {lines.lines:,} answers; give the same command again to go on")
        interrupted = isinstance(signal, KeyboardInterrupt)
        click.get_current_context().exit(EXIT_INTERRUPTED if interrupted else EXIT_TERMINATED)
    note(f"edgelm: {pace.line()}")


class _Pace:
    """How many answers there are, and how fast they come."""

    def __init__(self, found: int, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock; `found` of `total` answers are there already."""
        self._found, self._total, self._clock = found, total, clock
        self._started = clock()
        self._rows = self._tokens = 0

    def count(self, new_tokens: int) -> None:
        """Count an answer."""
        self._rows += 1
        self._tokens += new_tokens

    def line(self) -> str:
        """How far the run is, such as "120 of 1,000, 3.2 rows/s, 410 tokens/s, 5 min left"."""
        seconds = max(1e-9, self._clock() - self._started)
        done, rate = self._found + self._rows, self._rows / seconds
        parts = [f"{done:,} of {self._total:,}"]
        if self._rows:
            parts.append(f"{rate:,.1f} rows/s")
        if self._tokens:
            parts.append(f"{self._tokens / seconds:,.0f} tokens/s")
        if done < self._total and self._rows:
            parts.append(f"{_in_words((self._total - done) / rate)} left")
        elif done == self._total:
            parts.append(f"in {_in_words(seconds)}")
        return ", ".join(parts)


def _in_words(seconds: float) -> str:
    """A length of time in the largest unit that fits twice."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} s"
