"""What the three training commands share: flags made from option classes, checks before torch is loaded, messages."""

import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from edgelm.errors import TrainingError, install_hint
from edgelm_train.data.corpus import check_file
from edgelm_train.options import Declaration, TrainingOptions, declarations
from edgelm_train.run.folder import check_out

if TYPE_CHECKING:
    from edgelm_train.run.loop import Outcome

Function = TypeVar("Function", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)
OUT = click.option(
    "-o", "--out", required=True, type=FILE, metavar="FOLDER", help="Output folder: new, or with a run to resume."
)
REVISION = click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")

_NEEDED = ("torch", "transformers", "tokenizers", "accelerate", "tensorboard", "matplotlib")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


class Count(click.ParamType):  # type: ignore[type-arg]  # generic in new versions of click only
    """A number like 12.4M; K is a thousand, M a million, G and B are a billion."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([KMGB]?)", str(value).strip().upper())
        if not match or float(match[1]) * _UNITS[match[2]] < 1:
            self.fail(f"{value!r} is not a number like 500K or 12.4M", param, ctx)
        return round(float(match[1]) * _UNITS[match[2]])


def flags(options: type[TrainingOptions], *more: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """A decorator that gives a command one flag for each option of a class.

    Args:
        options: the class.
        more: further flags of the command, listed before ``--device``.
    """
    decorators: list[Callable[[Any], Any]] = []
    for declared in declarations(options):
        decorators += more if declared.name == "device" else ()
        decorators.append(_flag(declared))

    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _flag(declared: Declaration) -> Callable[[Any], Any]:
    option, kind = declared.option, declared.kind
    name = f"--{declared.flag}/--no-{declared.flag}" if kind is bool else f"--{declared.flag}"
    choices = get_args(kind)
    return click.option(
        name,
        declared.name,
        type=click.Choice(choices) if choices else FILE if kind is Path else Count() if option.counted else kind,
        default=declared.default,
        show_default=declared.default is not None,
        metavar=option.metavar,
        help=option.help if option.unset is None else f"{option.help}  [default: {option.unset}]",
    )


def prepare(command: str, out: Path, files: Iterable[Path], *packages: str) -> None:
    """Refuse what can be refused without torch, then say that torch is about to be loaded, which takes seconds.

    Args:
        command: name of the command.
        out: its output folder.
        files: the text files it reads.
        packages: Python packages it needs beside those of all training commands.

    Raises:
        TrainingError: `out` cannot be used, a file is missing, or a package is not installed.
    """
    missing = [name for name in (*_NEEDED, *packages) if find_spec(name) is None]
    if missing:
        raise TrainingError(f"{command} needs {', '.join(missing)}; {install_hint('cpu,train')}")
    check_out(out)
    for file in files:
        check_file(file)
    click.echo("loading torch and transformers ...", err=True)


def say(line: str) -> None:
    """Print one line about the progress of a run."""
    click.echo(f"edgelm: {line}", err=True)


def stopped(outcome: "Outcome") -> int:
    """Say that a signal stopped a run; returns the exit status with which a shell reports that signal."""
    say(f"stopped after step {outcome.steps:,}; a checkpoint is written, and the same command goes on from there")
    return 128 + (outcome.signal or 0)
