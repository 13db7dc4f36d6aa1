"""``edgelm run`` with a bundle that has a task: its inputs, and its answers on standard output."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from edgelm.batch.facts import task_facts, text_facts
from edgelm.cli.constraint_flags import EXIT_CUT
from edgelm.cli.shared import answer_each, json_line, model_facts, print_json
from edgelm.cli.streams import escaped, note, print_line
from edgelm.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from edgelm.decoding.generation_config import GenerationOptions
    from edgelm.generation.task_format import TaskResult
    from edgelm.model import Model


def read_fields(given: Sequence[str]) -> dict[str, str]:
    """The fields of an input, each given as NAME=TEXT. Raises UsageError."""
    fields: dict[str, str] = {}
    for one in given:
        name, equals, text = one.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--field takes NAME=TEXT, got {one[:60]!r}", click.get_current_context())
        if name in fields:
            raise click.UsageError(f"--field {name} is given twice; give it once", click.get_current_context())
        fields[name] = text
    return fields


def print_judged(model: "Model", values: dict[str, str], *, as_json: bool) -> None:
    """Print what a task that generates nothing makes of one input."""
    result = model.task(values)
    if as_json:
        print_json({**model_facts(model), **task_facts(result, whole=True)})
    else:
        print_line(_plain(result))


def answer_lines(model: "Model", options: "GenerationOptions", *, raw: bool, as_json: bool) -> None:
    """Answer every line of standard input with one JSON object, before the next line is read.

    A line is the text of the only field, or a JSON object with all fields. Without a task, or with `raw`, it is a
    prompt. A line that cannot be answered gets an object with "line" and "error", and the status is 1 in the end.
    """
    task = None if raw else model.task_format
    base = model.generation_config
    config = base.updated(dict(options)) if task is None else task.config(base, options)
    if config.num_return_sequences > 1:
        raise ConfigError("--lines writes one text for each line: leave num_return_sequences at 1")
    cut = False

    def answer(line: str) -> str:
        nonlocal cut
        try:
            if task is None:
                facts = text_facts(model.generate(line, **options).choices[0])
            else:
                facts = task_facts(model.task(task.read_input(line), options or None), whole=as_json)
        except ConfigError as error:  # the options are right, so it is about this line: a limit that it breaks
            raise PromptError(str(error)) from None
        cut = cut or facts.get("finish_reason") not in (None, "eos", "stop")
        return json_line(facts)

    answer_each(None, answer, as_json=True)
    if config.constraint is not None and cut:
        note("edgelm: a text was cut off before it was what it must be: allow more tokens with -n")
        click.get_current_context().exit(EXIT_CUT)


def _plain(result: "TaskResult") -> str:
    from edgelm.generation.task_format import TaskLabel, TaskVector

    if isinstance(result, TaskLabel):
        return f"{escaped(result.label)} {result.probability:.2f}"
    assert isinstance(result, TaskVector)
    if result.similarity is not None:
        return f"{result.similarity:.4f}"
    return " ".join(f"{value:.9g}" for value in result.vector.tolist())
