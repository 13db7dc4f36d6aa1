"""``edgelm run``: a prompt and its continuation on stdout, everything else on stderr."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from edgelm.cli.constraint_flags import EXIT_CUT, constraint_options
from edgelm.cli.generation_flags import GroupedCommand, generation_flag, generation_options, given_options
from edgelm.cli.probability_colours import ProbabilityPainter, begin_colours, reason_without_colours
from edgelm.cli.progress import prompt_progress
from edgelm.cli.shared import (
    OpenModel,
    TextCommand,
    check_output_file,
    draft_option,
    json_option,
    model_facts,
    model_options,
    print_json,
    read_prompt,
    read_prompt_file,
    stats_line,
)
from edgelm.cli.streams import note
from edgelm.cli.task_answers import answer_lines, print_judged, read_fields
from edgelm.cli.task_flags import input_options, task_option

if TYPE_CHECKING:
    from edgelm.decoding.generation_config import GenerationOptions
    from edgelm.generation.results import Chunk, Stats, TextEnd
    from edgelm.model import Model
    from edgelm.reuse.state import PromptState
    from edgelm.text.constraints import Constraint


STATE_HELP = "Keep the computed prompt in this file; a prompt that begins with it then starts faster."


class RunCommand(TextCommand, GroupedCommand):
    """Takes a text, and groups its many options in ``--help``."""


@click.command(name="run", cls=RunCommand)
@click.argument("prompt", required=False)
@model_options
@task_option
@draft_option
@input_options
@generation_options
@constraint_options
@click.option("--file", type=click.Path(path_type=Path), metavar="PATH", help="Read the prompt from this UTF-8 file.")
@click.option("--no-echo", is_flag=True, help="Print the continuation without the prompt.")
@json_option("Print one JSON object instead of text.")
@generation_flag("logprobs")
@click.option("--show-probs", is_flag=True, help="Colour new text by its tokens' probabilities, on a terminal.")
@click.option("--state", metavar="FILE", help=STATE_HELP)
@click.option("--stats", is_flag=True, help="Print times and memory on stderr.")
def command(
    prompt: str | None,
    open_model: OpenModel,
    task: str | None,
    draft: str | None,
    fields: tuple[str, ...],
    lines: bool,
    raw: bool,
    file: Path | None,
    no_echo: bool,
    as_json: bool,
    show_probs: bool,
    state: str | None,
    stats: bool,
    constraint: "Constraint | None",
    **options: object,  # the values of `generation_options`
) -> None:
    """Continue PROMPT, or do the bundle's task with it. Without PROMPT, or with -, read it from standard input.

    \b
    edgelm run "Once upon a time"
    edgelm run --greedy -n 20 "Lily went to"
    echo "One day" | edgelm run --no-echo --seed 7
    edgelm run -m a-bundle-with-a-task "I loved it"
    cat reviews.txt | edgelm run -m a-bundle-with-a-task --lines
    edgelm run --prefix a-prefix-with-a-task "I loved it"
    """
    if options["logprobs"] is not None and not as_json:
        click.get_current_context().fail("--logprobs needs --json, because plain text has no place for them")
    if show_probs and as_json:
        click.get_current_context().fail("--show-probs colours text, and --json has none: give --logprobs 0 with it")
    given = cast("GenerationOptions", given_options(options))
    if constraint is not None:
        given["constraint"] = constraint
    if raw:
        _check_alone("--raw", task=task, field=fields or None)
    if lines:
        argument = None if prompt == "-" else prompt
        others = {"field": fields or None, "state": state, "stats": stats or None, "logprobs": options["logprobs"]}
        others["show-probs"] = show_probs or None
        _check_alone("--lines", prompt=argument, file=file, **others)
        answer_lines(open_model(task=task, draft=draft), given, raw=raw, as_json=as_json)
        return
    if fields:
        _check_alone("--field", prompt=prompt, file=file)
    named, text = read_fields(fields), "" if fields else _prompt_text(prompt, file)
    if state is not None:
        check_output_file(state)
    model = open_model(task=task, draft=draft)
    if model.task_format is not None and not raw:
        if show_probs:
            click.get_current_context().fail("--show-probs is for texts that are continued: drop it, or add --raw")
        _do_task(model, named or model.task_format.read_input(text), given, as_json=as_json, state=state, stats=stats)
        return
    if named:
        click.get_current_context().fail(
            "--field is given, but the bundle has no task, nor a prefix with one: give a prompt"
        )
    if text.endswith(" ") and not model.generation_config.updated(dict(given)).token_healing:
        note(
            "edgelm: the prompt ends with a blank, which usually belongs to the next word: leave it out, or give "
            "--token-healing"
        )
    colours = show_probs and _may_colour(model, given)
    kept = None if state is None or not os.path.lexists(state) else model.load_state(state)
    with prompt_progress(text) as given["prompt_progress"]:
        if as_json:
            completion = model.generate(text, **given)
            final, reasons = completion.stats, [choice.finish_reason for choice in completion.choices]
            print_json({**model_facts(model), **asdict(completion)})
        else:
            final, reasons = _print_stream(model.stream(text, **given), None if no_echo else text, colours=colours)
    if state is not None and final.dropped_tokens:
        note("edgelm: the prompt is longer than the context, so its state is not kept")
    elif state is not None:
        _keep_state(model, state, text, kept)
    if stats:
        note(stats_line(final, model))
    if constraint is not None:
        _exit_if_cut(reasons)


def _do_task(
    model: "Model", values: dict[str, str], given: "GenerationOptions", *, as_json: bool, state: str | None, stats: bool
) -> None:
    """Print what the model's task makes of one input."""
    task, context = model.task_format, click.get_current_context()
    assert task is not None
    config = task.config(model.generation_config, given)
    if state is not None:
        context.fail("--state keeps a prompt, and a task makes another one each time: drop it, or add --raw")
    if not task.writes_text:
        if stats:
            context.fail("--stats is about generated text, and this task generates none: drop it, or add --raw")
        print_judged(model, values, as_json=as_json)
        return
    from edgelm.generation.task_format import stripped

    (prompt,) = task.prompts(task.values(values))
    model.generation_config = config  # this command's own model
    with prompt_progress(prompt if isinstance(prompt, str) else "") as told:
        if as_json:
            result = task.written(model.generate(prompt, prompt_progress=told))
            final, reasons = result.completion.stats, [choice.finish_reason for choice in result.completion.choices]
            print_json({**model_facts(model), "text": result.text, **asdict(result.completion)})
        else:
            chunks = stripped(model.stream(prompt, prompt_progress=told))
            final, reasons = _print_stream(chunks, None, colours=False)
    if stats:
        note(stats_line(final, model))
    if config.constraint is not None:
        _exit_if_cut(reasons)


def _exit_if_cut(reasons: "Sequence[TextEnd]") -> None:
    """End with `EXIT_CUT` if a text under a constraint did not end by itself."""
    cut = [reason for reason in reasons if reason not in ("eos", "stop")]
    if cut:
        note(f"edgelm: the text was cut off ({cut[0]}) before it was what it must be: allow more tokens with -n")
        click.get_current_context().exit(EXIT_CUT)


def _check_alone(flag: str, **others: object) -> None:
    """Raise UsageError if one of `others`, by the names of their flags, is given beside `flag`."""
    given = [name for name, value in others.items() if value is not None]
    if given:
        other = "a prompt" if given[0] == "prompt" else f"--{given[0]}"
        click.get_current_context().fail(f"{flag} and {other} are given; give one of them")


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    """The prompt, out of the argument `prompt`, of `file` or of standard input."""
    if file is None:
        return read_prompt() if prompt is None or prompt == "-" else prompt
    if prompt is not None:
        click.get_current_context().fail("a prompt and --file are given; give one of them")
    return read_prompt_file(file)


def _keep_state(model: "Model", path: str, prompt: str, kept: "PromptState | None") -> None:
    """Save the state of `prompt` (after the text of a prefix) unless the file's state `kept` is longer or unrelated."""
    if kept is None:
        model.save_state(path, prompt)
        return
    kept_text = model.tokenizer.decode(kept.ids, skip_special_tokens=True)
    text = prompt if model.prefix is None or model.prefix.text is None else f"{model.prefix.text}{prompt}"
    if text == kept_text:
        return
    if text.startswith(kept_text):
        model.save_state(path, prompt)
    elif not kept_text.startswith(text):
        note(f"edgelm: the prompt does not continue the text in {path!r}; the file stays unchanged")


def _may_colour(model: "Model", given: "GenerationOptions") -> bool:
    """Whether new text can be coloured; `given` then gets the option `logprobs`. Says what colours mean, or why not.

    Raises UsageError with decoding methods that have no probabilities of tokens.
    """
    config = model.generation_config.updated(dict(given))
    if config.num_beams > 1 or config.penalty_alpha is not None:
        click.get_current_context().fail(
            "--show-probs works with greedy decoding and sampling only: drop it, or num_beams and penalty_alpha"
        )
    reason = reason_without_colours()
    if reason is not None:
        note(f"edgelm: no colours, because {reason}: --json --logprobs 0 has the probabilities as numbers")
        return False
    given["logprobs"] = 0
    begin_colours()
    return True


def _print_stream(chunks: "Iterator[Chunk]", echo: str | None, *, colours: bool) -> "tuple[Stats, list[TextEnd]]":
    """Print each row as it comes, with a blank line between rows; nothing is printed before the first token.

    With `colours` new text has those of its probabilities. Returns the statistics, and why each row ended.
    """
    final: Stats | None = None
    reasons: list[TextEnd] = []
    row = -1
    painter = ProbabilityPainter()
    for chunk in chunks:
        if chunk.index != row:
            row = chunk.index
            painter = ProbabilityPainter()
            sys.stdout.write("\n" if row else "")
            sys.stdout.write(echo or "")
        sys.stdout.write(painter.painted(chunk) if colours else chunk.text)
        if chunk.finish_reason is not None:
            reasons.append(chunk.finish_reason)
            sys.stdout.write("\n")
        sys.stdout.flush()
        final = chunk.stats or final
    assert final is not None  # the last chunk always carries the stats
    return final, reasons
