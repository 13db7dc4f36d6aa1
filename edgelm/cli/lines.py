"""One answer for each text: an argument, or many lines of standard input, answered as they come."""

import sys
from collections.abc import Callable, Iterator

import click

from edgelm.errors import PromptError


def answer_each(argument: str | None, answer: Callable[[str], str]) -> None:
    """Print `answer(text)` on a line of its own for the text `argument`, or where it is None or "-" for every line
    of standard input, each before the next line is read.

    Raises:
        PromptError: what `answer` raises, with the number of the line; a line that is not UTF-8.
    """
    if argument is not None and argument != "-":
        click.echo(answer(argument))
        return
    for number, text in _lines():
        try:
            click.echo(answer(text))
        except PromptError as error:
            raise type(error)(f"line {number} of standard input: {error}") from None
        sys.stdout.flush()


def _lines() -> Iterator[tuple[int, str]]:
    """The lines of standard input without their ends, counted from 1."""
    if sys.stdin is None:
        raise PromptError("standard input is closed: give the text as an argument")
    if sys.stdin.isatty():
        click.echo("edgelm: reading lines from the terminal; end with Ctrl-D (Ctrl-Z on Windows)", err=True)
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield number, line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise PromptError(f"line {number} of standard input is not UTF-8 text (byte {error.start})") from None


def need_stdout() -> None:
    """Raises click.ClickException where there is nowhere to write: before a model is loaded."""
    if sys.stdout is None:
        raise click.ClickException("standard output is closed: there is nowhere to write the answers")
