"""A flag for every generation option, made from its declaration in `edgelm.decoding.generation_config`.

Values are checked by `GenerationConfig`, so that Python, JSON and the shell have the same limits and messages.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

from edgelm.decoding.generation_config import OPTIONS, default_text
from edgelm.decoding.options import COMMON, OUTPUT, Kind

Function = TypeVar("Function", bound=Callable[..., Any])
Values = tuple[str, ...]


class GroupedOption(click.Option):
    """An option that stands under its group's heading."""

    def __init__(self, *args: Any, group: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help has a section for each group; options without a group stand under "Output and machine"."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group, in the order of the options."""
        sections: dict[str, list[tuple[str, str]]] = {COMMON.heading: [], OUTPUT.heading: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                own = COMMON.heading if parameter.name == "model" else OUTPUT.heading
                sections.setdefault(getattr(parameter, "group", own), []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


def _id_lists(ctx: click.Context, param: click.Parameter, values: Values) -> list[list[int]]:
    """Lists of token ids, each written as ``11,42``."""
    try:
        return [[int(part) for part in value.split(",")] for value in values]
    except ValueError:
        raise click.BadParameter("token ids go like 11 or 11,42", ctx, param) from None


def _flat_ids(ctx: click.Context, param: click.Parameter, values: Values) -> list[int]:
    """The ids of all lists together."""
    return [token for ids in _id_lists(ctx, param, values) for token in ids]


def _biases(ctx: click.Context, param: click.Parameter, values: Values) -> list[tuple[list[int], float]]:
    """Pairs of token ids and a number, each written ``11,42=-3.5``."""
    parts = [value.rpartition("=") for value in values]
    try:
        numbers = [float(number) for _, _, number in parts]
    except ValueError:
        raise click.BadParameter("a bias goes like 11=-3.5", ctx, param) from None
    return list(zip(_id_lists(ctx, param, tuple(ids for ids, _, _ in parts)), numbers, strict=True))


def _token_biases(ctx: click.Context, param: click.Parameter, values: Values) -> list[tuple[int, float]]:
    """Pairs of one token id and a number, each written ``11=-3.5``."""
    biases = _biases(ctx, param, values)
    if any(len(ids) != 1 for ids, _ in biases):
        raise click.BadParameter("one token each, like 11=-3.5", ctx, param)
    return [(ids[0], bias) for ids, bias in biases]


def _start_and_factor(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    if value is None:
        return None
    if not math.isfinite(value[0]) or value[0] != int(value[0]):
        raise click.BadParameter("the first is a whole number of tokens, like 20 1.05", ctx, param)
    return int(value[0]), value[1]


_READERS: dict[Kind, dict[str, Any]] = {
    "switch": {"is_flag": True, "default": None},
    "whole": {"type": int},
    "number": {"type": float},
    "decay": {"type": float, "nargs": 2, "callback": _start_and_factor},
    "texts": {"multiple": True},
    "ids": {"multiple": True, "callback": _flat_ids},
    "sequences": {"multiple": True, "callback": _id_lists},
    "token_biases": {"multiple": True, "callback": _token_biases},
    "sequence_biases": {"multiple": True, "callback": _biases},
}
"""How click reads a value of each kind."""


def _choice(choices: tuple[object, ...]) -> dict[str, Any]:
    """How click reads one of `choices`; True and False are written in lower case."""
    spelled = {str(choice).lower() if isinstance(choice, bool) else str(choice): choice for choice in choices}
    read = lambda ctx, param, value: None if value is None else spelled[value]  # noqa: E731
    return {"type": click.Choice(list(spelled)), "callback": read}


def generation_flag(name: str) -> Callable[[Function], Function]:
    """The flag of one generation option."""
    option = OPTIONS[name]
    attributes = _choice(option.rule.choices) if option.rule.kind == "choice" else _READERS[option.rule.kind]
    attributes = {"metavar": option.rule.metavar or None, "group": option.group, **attributes}
    text = option.meaning.partition(". ")[0].removesuffix(".") + "."
    text += " Repeatable." if "multiple" in attributes else ""
    text += f"  [default: {default_text(name)}]" if option.show_default else ""
    flags = option.flags or (f"--{name.replace('_', '-')}",)
    return click.option(*flags, help=text, cls=GroupedOption, **attributes)


def generation_options_without(*names: str) -> Callable[[Function], Function]:
    """All flags but those of `names` and of the group "Output and machine"; the command gets them as ``**options``."""

    def add(function: Function) -> Function:
        for name, option in reversed(OPTIONS.items()):
            if option.rule.kind != "python" and option.group != OUTPUT.heading and name not in names:
                function = generation_flag(name)(function)
        return function

    return add


generation_options = generation_options_without()
"""All flags but those of the group "Output and machine"; the command gets their values as ``**options``."""


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user gave."""
    return {name: value for name, value in options.items() if value is not None and value != () and value != []}
