"""Options and arguments that several commands share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def model_option(function: Function) -> Function:
    """``-m/--model``: the bundle folder; None stands for the embedded model."""
    return click.option(
        "-m",
        "--model",
        metavar="FOLDER",
        envvar="EDGELM_MODEL",
        show_envvar=True,
        help="Bundle folder; the embedded model when not given.",
    )(function)


def bundle_argument(function: Function) -> Function:
    """The bundle folder as an argument, for commands that have no other."""
    return click.argument("bundle", metavar="[FOLDER]", required=False)(function)


def one_bundle(bundle: str | None, model: str | None) -> str | None:
    """The folder named by argument or option.

    Raises:
        click.UsageError: both are given and differ.
    """
    context = click.get_current_context()
    from_environment = context.get_parameter_source("model") is click.core.ParameterSource.ENVIRONMENT
    if bundle is not None and model is not None and bundle != model and not from_environment:
        raise click.UsageError(f"two folders are given, {bundle!r} and --model {model!r}; give one", context)
    return bundle if bundle is not None else model


def device_options(function: Function) -> Function:
    """``--device`` and ``--threads``."""
    device = click.option(
        "--device",
        metavar="DEVICE",
        default="auto",
        show_default=True,
        help="auto, cpu, cuda or cuda:N; a named device never falls back.",
    )
    threads = click.option("--threads", type=int, metavar="N", help="CPU threads; all allowed CPUs when not given.")
    return device(threads(function))


def prefix_option(function: Function) -> Function:
    """``--prefix``: what stands before every prompt; None for what the bundle itself has."""
    return click.option(
        "--prefix",
        metavar="FILE",
        help="Put this before every prompt: a file that `edgelm bake` or prefix-tuning made.",
    )(function)


def json_line(content: object) -> str:
    """One JSON object on one line."""
    import json

    return json.dumps(content, ensure_ascii=False)


def print_json(content: object) -> None:
    """One JSON object on stdout, on one line."""
    click.echo(json_line(content))
