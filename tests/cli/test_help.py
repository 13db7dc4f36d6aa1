"""``docs/help.md`` contains the help of all commands; EDGELM_UPDATE_HELP=1 writes it again."""

import os

import click
from click.testing import CliRunner

from edgelm.cli import cli
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "help.md"
WIDTH = 100


def help_page() -> str:
    def shown(*command: str) -> str:
        result = CliRunner().invoke(cli, [*command, "--help"], prog_name="edgelm", terminal_width=WIDTH)
        return f"## edgelm {' '.join(command)}".rstrip() + f"\n\n```\n{result.output}```\n"

    context = click.Context(cli)
    commands: list[tuple[str, ...]] = []
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        parts = command.list_commands(context) if isinstance(command, click.Group) else []
        commands += [(name,), *((name, part) for part in parts)]
    intro = (
        "# The commands\n\nWritten by `EDGELM_UPDATE_HELP=1 pytest tests/cli/test_help.py`; a test compares it.\n\n"
        "Tab completes commands, flags and folders after a line in your shell's start file: "
        '`eval "$(_EDGELM_COMPLETE=bash_source edgelm)"` for bash, with `zsh_source` for zsh, and '
        "`_EDGELM_COMPLETE=fish_source edgelm | source` for fish.\n"
    )
    return "\n".join([intro, shown(), *(shown(*command) for command in commands)])


def test_the_help_page_is_up_to_date() -> None:
    page = help_page()
    if os.environ.get("EDGELM_UPDATE_HELP") == "1":
        PAGE.write_text(page, encoding="utf-8")
    # Words only: where click breaks lines differs between its versions.
    assert PAGE.read_text(encoding="utf-8").split() == page.split()
