"""The ``edgelm`` command. Subcommands load by name, so that ``edgelm --help`` imports nothing but click."""

import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from edgelm import __version__
from edgelm.errors import ConfigError, EdgelmError

_COMMANDS = {
    "run": ("edgelm.cli.run", "Continue a prompt."),
    "score": ("edgelm.cli.score", "How likely a text is after another."),
    "choose": ("edgelm.cli.choose", "Which of several texts is likeliest after a prompt."),
    "perplexity": ("edgelm.cli.perplexity", "How surprised the model is by a text."),
    "embed": ("edgelm.cli.embed", "A text as a vector."),
    "bake": ("edgelm.cli.bake", "Store a text to stand before every prompt."),
    "pretrain": ("edgelm_train.cli.pretrain", "Train a tokenizer and a GPT-2 on text files."),
    "finetune": ("edgelm_train.cli.finetune", "Tune a GPT-2 checkpoint on a text or on examples."),
    "distill": ("edgelm_train.cli.distill", "Train a smaller GPT-2 to do as a checkpoint does."),
    "export": ("edgelm_export.cli", "Turn a GPT-2 checkpoint into a bundle."),
    "info": ("edgelm.cli.info", "Show what a bundle is and what it lost."),
    "verify": ("edgelm.cli.verify", "Check every file of a bundle, and measure it again."),
    "compare": ("edgelm.cli.compare", "Show two bundles side by side."),
    "bench": ("edgelm.cli.bench", "Measure a bundle's speed and memory here."),
}

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # as a shell reports a process ended by SIGINT
EXIT_BROKEN_PIPE = 141  # and by SIGPIPE


class _StdoutClosed(Exception):
    """The reader of our output went away."""


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(_COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, short_help) for name, (_, short_help) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
            return result
        except BrokenPipeError:  # click itself would exit with 1
            raise _StdoutClosed from None


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="edgelm %(version)s")
def cli() -> None:
    """Text generation on machines that cannot carry torch.

    \b
    edgelm run "Once upon a time"          with the embedded model
    edgelm export gpt2 -o gpt2-int8        make a bundle of a GPT-2 checkpoint
    edgelm run -m gpt2-int8 "Hello"        and use it
    """


def main() -> NoReturn:
    """Run the command line; every failure is one line on stderr and an exit status."""
    try:
        status = cli.main(prog_name="edgelm", standalone_mode=False)
    except click.Abort:
        sys.exit(EXIT_INTERRUPTED)  # click has printed the newline
    except _StdoutClosed:
        _discard_stdout()
        sys.exit(EXIT_BROKEN_PIPE)
    except click.UsageError as error:
        hint = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
        _fail(error.format_message() + hint, EXIT_USAGE)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except ConfigError as error:
        _fail(str(error), EXIT_USAGE)
    except EdgelmError as error:
        _fail(str(error), 1)
    except ModuleNotFoundError as error:
        _fail(f"the Python package {error.name!r} is missing; run: pip install 'edgelm[cpu]'", 1)
    except MemoryError:
        _fail("not enough memory", 1)
    except OSError as error:
        _discard_stdout()
        _fail(f"{error.filename or 'output'}: {error.strerror or error}", 1)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    if sys.stderr is not None:
        click.echo(f"edgelm: {' '.join(message.split())}", err=True)
    sys.exit(status)


def _discard_stdout() -> None:
    """Point stdout nowhere, so that the interpreter's last flush does not complain again."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
