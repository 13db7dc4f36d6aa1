"""The flags of ``edgelm run`` that say what the text must be."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.generation_flags import GroupedOption
from edgelm.cli.shared import read_text_file
from edgelm.decoding.options import CONSTRAINT
from edgelm.errors import ConfigError

if TYPE_CHECKING:
    from edgelm.text.constraints import Constraint

EXIT_CUT = 3
"""A text was cut off before it was what it must be."""

_FLAGS = ("choices", "regex", "json_schema", "grammar")


def constraint_options(command: Callable[..., None]) -> Callable[..., None]:
    """``--choices``, ``--regex``, ``--json-schema`` and ``--grammar``, which reach `command` as `constraint`."""

    @_option("--choices", multiple=True, metavar="TEXT", help="The text is TEXT, or another one given so. Repeatable.")
    @_option("--regex", metavar="REGEX", help="The whole text matches REGEX, in the syntax of Rust.")
    @_option("--json-schema", metavar="FILE", help="The text is JSON that the JSON schema in FILE allows.")
    @_option("--grammar", metavar="FILE", help="The text is one of the grammar in FILE, in Lark's syntax.")
    @wraps(command)
    def with_constraint(
        *,
        choices: tuple[str, ...],
        regex: str | None,
        json_schema: str | None,
        grammar: str | None,
        **options: object,
    ) -> None:
        command(constraint=_given(choices, regex, json_schema, grammar), **options)

    return with_constraint


def _option(name: str, *, multiple: bool = False, metavar: str, help: str) -> Callable[..., Callable[..., None]]:
    return click.option(
        name, multiple=multiple, metavar=metavar, help=help, cls=GroupedOption, group=CONSTRAINT.heading
    )


def _given(
    choices: tuple[str, ...], regex: str | None, json_schema: str | None, grammar: str | None
) -> "Constraint | None":
    values: tuple[object, ...] = (choices or None, regex, json_schema, grammar)
    given = [f"--{name.replace('_', '-')}" for name, value in zip(_FLAGS, values, strict=True) if value is not None]
    if len(given) > 1:
        raise click.UsageError(
            f"{given[0]} and {given[1]} contradict each other; give one", click.get_current_context()
        )
    if not given:
        return None
    from edgelm.text.constraints import Choices, Grammar, JsonSchema, Regex

    if choices:
        return Choices(choices)
    if regex is not None:
        return Regex(regex)
    if json_schema is not None:
        return JsonSchema(read_text_file(Path(json_schema), ConfigError))
    assert grammar is not None
    return Grammar(read_text_file(Path(grammar), ConfigError))
