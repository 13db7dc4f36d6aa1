"""What the options of all training commands have in common: their limits, their record, their flags."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from edgelm.errors import TrainingError

_MOST = {"seed": 2**32 - 1, "tokens": 10**13, "hours": 10**6, "epochs": 10**6}
"""The greatest values, of options that have the field: numpy's for a seed, of the others what nobody wants."""
Function = TypeVar("Function", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


def check_limits(options: object, least: Mapping[str, float]) -> None:
    """Raises TrainingError where a field of `options` is below its least value, or above its greatest; None passes."""
    for name, limit in least.items():
        value = getattr(options, name)
        if value is not None and not value >= limit:
            raise TrainingError(f"--{_flag(name)} must be at least {limit}, got {value}")
    for name, limit in _MOST.items():
        value = getattr(options, name, None)
        if value is not None and not value <= limit:
            raise TrainingError(f"--{_flag(name)} must be at most {limit:,}, got {value}")


def check_positive(options: object, *names: str) -> None:
    """Raises TrainingError where a field of `options` is not above 0; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise TrainingError(f"--{_flag(name)} must be more than 0, got {value}")


def recorded(options: object) -> dict[str, object]:
    """What must stay the same when a run is resumed, by option name."""
    fields = {_flag(name): value for name, value in vars(options).items()}
    return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}


def patience_flag(default: int) -> Callable[[Function], Function]:
    """When any training run stops early."""
    return click.option(
        "--patience",
        type=int,
        default=default,
        show_default=True,
        metavar="N",
        help="End after N measurements without progress; 0: never.",
    )


def place_flags(function: Function) -> Function:
    """Where any training run computes, and from which random numbers."""
    device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
    return device(click.option("--seed", type=int, default=0, show_default=True)(function))


def run_flags(patience: int) -> Callable[[Function], Function]:
    """The flags of any run that starts from a checkpoint.

    Args:
        patience: its default.
    """
    flags = [
        click.option("--held-out", type=FILE, metavar="FILE", help="Measure on this.  [default: a part of the data]"),
        click.option("--learning-rate", type=float, metavar="RATE", help="Its peak.  [default: what suits the model]"),
        patience_flag(patience),
        click.option(
            "--evaluations",
            type=int,
            default=10,
            show_default=True,
            metavar="N",
            help="Measurements on held-out data over the run.",
        ),
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id."),
        place_flags,
    ]

    def add(function: Function) -> Function:
        for flag in reversed(flags):
            function = flag(function)
        return function

    return add


def _flag(name: str) -> str:
    return name.replace("_", "-")
