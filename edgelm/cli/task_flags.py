"""The flags about tasks."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from edgelm.cli.generation_flags import GroupedOption

Function = TypeVar("Function", bound=Callable[..., Any])


def _option(*names: str, help: str, metavar: str | None = None, multiple: bool = False, is_flag: bool = False) -> Any:
    return click.option(
        *names, help=help, metavar=metavar, multiple=multiple, is_flag=is_flag, cls=GroupedOption, group="Task"
    )


def task_option(function: Function) -> Function:
    """``--task``, the path of a file."""
    meaning = (
        "Task file (docs/tasks.md) that says what to do with an input; by default the prefix's or the bundle's own."
    )
    option: Callable[[Function], Function] = _option("--task", metavar="FILE", help=meaning)
    return option(function)


def input_options(function: Function) -> Function:
    """``--field``, ``--lines`` and ``--raw``: where the inputs of a task come from."""
    lines = "Take every line of standard input as an input, and answer each with a JSON object on one line."
    for option in (
        _option("--raw", is_flag=True, help="Continue PROMPT as it stands, whatever the bundle's task is."),
        _option("--lines", is_flag=True, help=lines),
        _option(
            "--field",
            "fields",
            multiple=True,
            metavar="NAME=TEXT",
            help="A field of the task's input, in place of PROMPT. Repeatable.",
        ),
    ):
        function = option(function)
    return function
