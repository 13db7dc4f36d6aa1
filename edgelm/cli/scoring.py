"""The commands that score texts: ``edgelm score``, ``choose``, ``perplexity`` and ``embed``."""

from dataclasses import asdict
from pathlib import Path
from typing import get_args

import click

from edgelm.batch.facts import choice_facts, embedding_facts, perplexity_facts
from edgelm.cli.progress import percent, progress
from edgelm.cli.shared import OpenModel, TextCommand, answer_each, json_line, json_option, model_options, read_text_file
from edgelm.errors import PromptError
from edgelm.scoring.results import LengthNormalization, Pooling


@click.command(name="score", cls=TextCommand)
@click.argument("prompt", required=False)
@click.argument("continuation", required=False)
@model_options
@json_option("Print one JSON object per line, with every token.")
def score(prompt: str | None, continuation: str | None, open_model: OpenModel, as_json: bool) -> None:
    """Print the log-probability of CONTINUATION after PROMPT, in nats.

    Without CONTINUATION, or with -, every line of standard input is a continuation. Without PROMPT too, every line
    is a prompt, a tab and a continuation. A space between the two may end the prompt or begin the continuation: both
    give the same score.

    \b
    edgelm score "Once upon a time" ", there was"
    cat endings.txt | edgelm score "Once upon a"
    """
    model = open_model()

    def answer(line: str) -> str:
        given, scored = _two_parts(line) if prompt is None else (prompt, line)
        result = model.score(given, scored)
        if not as_json:
            return f"{result.logprob:.6f}"
        return json_line({"prompt": given, "continuation": scored, **asdict(result)})

    answer_each(continuation, answer, as_json=as_json)


@click.command(name="choose", cls=TextCommand)
@click.argument("prompt", required=False)
@click.option("-o", "--option", "texts", multiple=True, metavar="TEXT", help="A text to choose from; at least two.")
@model_options
@click.option(
    "--length-normalization",
    type=click.Choice(get_args(LengthNormalization)),
    default="none",
    show_default=True,
    help="Divide each log-probability by nothing, or by the option's number of tokens or characters.",
)
@click.option(
    "--calibrate",
    metavar="TEXT",
    help="A prompt without content: each option's log-probability after it is subtracted.",
)
@json_option("Print one JSON object per line, with every option's probability.")
def choose(
    prompt: str | None,
    texts: tuple[str, ...],
    open_model: OpenModel,
    length_normalization: LengthNormalization,
    calibrate: str | None,
    as_json: bool,
) -> None:
    """Print the option that the model finds likeliest after PROMPT.

    Without PROMPT, or with -, every line of standard input is a prompt. A space between the prompt and the options
    may end the prompt or begin the options: both give the same answer.

    \b
    edgelm choose "Lily was sad. She began to" -o " cry" -o " laugh"
    cat questions.txt | edgelm choose -o " yes" -o " no" --json
    """
    if len(texts) < 2:
        raise click.UsageError(
            f"there is nothing to choose: give -o at least twice, got {len(texts)}", click.get_current_context()
        )
    model = open_model()

    def answer(text: str) -> str:
        selection = model.choose(text, texts, length_normalization=length_normalization, calibrate=calibrate)
        if not as_json:
            return selection.best.text
        return json_line({"prompt": text, **choice_facts(selection)})

    answer_each(prompt, answer, as_json=as_json)


@click.command(name="perplexity", cls=TextCommand)
@click.argument("text", required=False)
@model_options
@click.option("--file", type=click.Path(path_type=Path), metavar="PATH", help="Measure this whole file as one text.")
@click.option("--stride", type=int, metavar="N", help="Begin a window every N tokens.  [default: half the context]")
@json_option("Print one JSON object per line.")
def perplexity(text: str | None, open_model: OpenModel, file: Path | None, stride: int | None, as_json: bool) -> None:
    """Print the perplexity of TEXT.

    A text of any length will do: a window as long as the model's context slides over it. Without TEXT, or with -,
    every line of standard input is a text.

    \b
    edgelm perplexity "The cat sat on the mat."
    edgelm perplexity --file story.txt --json
    """
    if file is not None and text is not None:
        raise click.UsageError("a text and --file are given; give one", click.get_current_context())
    content = None if file is None else read_text_file(file, PromptError)
    model = open_model()

    def answer(one: str) -> str:
        with progress("perplexity") as show:
            result = model.perplexity(one, stride=stride, progress=percent(show))
        return json_line(perplexity_facts(result)) if as_json else f"{result.value:.4f}"

    if content is None:
        answer_each(text, answer, as_json=as_json)
    else:
        click.echo(answer(content))


@click.command(name="embed", cls=TextCommand)
@click.argument("text", required=False)
@model_options
@click.option(
    "--pooling",
    type=click.Choice(get_args(Pooling)),
    default="mean",
    show_default=True,
    help="Take the mean of all tokens' hidden states, or the last token's hidden state.",
)
@click.option("--normalize", is_flag=True, help="Scale the vector to length 1.")
@json_option("Print one JSON object per line.")
def embed(text: str | None, open_model: OpenModel, pooling: Pooling, normalize: bool, as_json: bool) -> None:
    """Print TEXT as a vector: the model's last hidden states, pooled.

    The numbers stand on one line, separated by spaces. Without TEXT, or with -, every line of standard input is a
    text.

    \b
    edgelm embed --normalize "A dog ran."
    cat sentences.txt | edgelm embed --json
    """
    model = open_model()

    def answer(one: str) -> str:
        vector = model.embed(one, pooling=pooling, normalize=normalize)
        if as_json:
            return json_line(embedding_facts(vector))
        return " ".join(f"{value:.9g}" for value in vector.tolist())  # nine digits tell every float32 apart

    answer_each(text, answer, as_json=as_json)


def _two_parts(line: str) -> tuple[str, str]:
    """The prompt and the continuation of a line; raises PromptError unless the line has exactly one tab."""
    parts = line.split("\t")
    if len(parts) != 2:
        raise PromptError(f"a line must be a prompt, a tab and a continuation, got {len(parts) - 1} tabs")
    return parts[0], parts[1]
