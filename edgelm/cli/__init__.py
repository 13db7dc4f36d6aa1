"""The ``edgelm`` command. Subcommands load by name, so that ``edgelm --help`` imports only click."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from edgelm import __version__
from edgelm.cli.interrupt import EXIT_INTERRUPTED, ends_at_once
from edgelm.cli.streams import discard_stdout, note, prepare_streams
from edgelm.errors import ConfigError, EdgelmError, install_hint

_COMMANDS = {
    "run": ("edgelm.cli.run:command", "Continue a prompt."),
    "batch": ("edgelm.cli.batch:command", "Answer a file of prompts, and go on after a kill."),
    "chat": ("edgelm.cli.chat:command", "Talk with a model, at a terminal or over a pipe."),
    "score": ("edgelm.cli.scoring:score", "Measure how likely a text is after a prompt."),
    "choose": ("edgelm.cli.scoring:choose", "Choose the likeliest of several texts after a prompt."),
    "perplexity": ("edgelm.cli.scoring:perplexity", "Measure the perplexity of a text."),
    "embed": ("edgelm.cli.scoring:embed", "Turn a text into a vector."),
    "explain": ("edgelm.cli.explain:command", "Show how likely each token of a text was, and where attention looked."),
    "latent": ("edgelm.cli.latent:command", "Turn texts into latent vectors, and vectors into texts."),
    "serve": ("edgelm.cli.serve:command", "Answer HTTP requests like OpenAI's API."),
    "bake": ("edgelm.cli.bake:command", "Precompute a text that precedes every prompt."),
    "pretrain": ("edgelm_train.cli:pretrain_command", "Train a tokenizer and a GPT-2 model on text files."),
    "finetune": ("edgelm_train.cli:finetune_command", "Fine-tune a checkpoint on a text or on examples."),
    "distill": ("edgelm_train.cli:distill_command", "Train a smaller GPT-2 model to imitate a checkpoint."),
    "evaluate": ("edgelm_train.cli:evaluate_command", "Measure a bundle's task on labelled data."),
    "recipe": ("edgelm_recipes.cli:command", "Make a measured bundle of a public data set."),
    "export": ("edgelm_export.cli:command", "Convert a checkpoint into a bundle."),
    "info": ("edgelm.cli.info:command", "Show a bundle's source, size and quality certificate."),
    "verify": ("edgelm.cli.verify:command", "Check a bundle's files and measure its quality again."),
    "pack": ("edgelm.cli.pack:pack_command", "Write a bundle as one file."),
    "unpack": ("edgelm.cli.pack:unpack_command", "Write a packed bundle as a folder."),
    "pull": ("edgelm.cli.hub:pull_command", "Fetch a bundle from the Hugging Face hub."),
    "push": ("edgelm.cli.hub:push_command", "Upload a bundle to the Hugging Face hub."),
    "list": ("edgelm.cli.hub:list_command", "List pulled and installed bundles."),
    "rm": ("edgelm.cli.hub:rm_command", "Remove a pulled bundle."),
    "compare": ("edgelm.cli.compare:command", "Compare two bundles."),
    "bench": ("edgelm.cli.bench:command", "Measure a bundle's speed and memory on this machine."),
    "doctor": ("edgelm.cli.doctor:command", "Check this machine and this installation, with advice."),
}
"""Name of each command -> where it is defined ("module:attribute"), and its line in the help."""

_BUILD_COMMANDS = ("pretrain", "finetune", "distill", "recipe", "export")
"""These compute much with numpy and torch."""
_WRITE_FILES = (*_BUILD_COMMANDS, "batch", "bake", "pack", "unpack")
"""These make files, so they need no standard output."""

EXIT_USAGE = 2
EXIT_BROKEN_PIPE = 141  # as a shell reports a process that SIGPIPE ended


class _StdoutClosed(Exception):
    """The reader of standard output closed it."""


class _LazyGroup(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:  # versions of click differ in what they make of it
            click.echo(ctx.get_help(), err=True)
            ctx.exit(EXIT_USAGE)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        with ends_at_once():
            command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            similar = get_close_matches(args[0], _COMMANDS, 1)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {similar[0]!r}?" if similar else ""))
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # click would import every command to ask whether it is hidden.
        names = [
            CompletionItem(name, help=words) for name, (_, words) in _COMMANDS.items() if name.startswith(incomplete)
        ]
        return names + super(click.Group, self).shell_complete(ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, short_help) for name, (_, short_help) in _COMMANDS.items()])

    def main(self, *args: Any, **options: Any) -> Any:
        with _broken_pipe_told():
            # A prompt is no pattern of file names.
            result = super().main(*args, **{"windows_expand_args": False, **options})
            if sys.stdout is not None:
                sys.stdout.flush()
            return result

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _broken_pipe_told():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> object:
        with _broken_pipe_told():
            return super().invoke(ctx)


@contextmanager
def _broken_pipe_told() -> Iterator[None]:
    """Raise _StdoutClosed for a broken pipe, for which click itself would exit with 1."""
    try:
        yield
    except BrokenPipeError:
        raise _StdoutClosed from None


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="edgelm %(version)s")
def cli() -> None:
    """Run small language models on machines that have no room for PyTorch.

    \b
    edgelm run "Once upon a time"      use the embedded model
    edgelm export gpt2 -o gpt2-int8    convert a checkpoint
    edgelm run -m gpt2-int8 "Hello"    use the new bundle
    """


def main() -> NoReturn:
    """Run the command line; every failure is one line on stderr and an exit status."""
    prepare_streams()
    arguments = sys.argv[1:]
    if sys.stdout is None and not (arguments[:1] and arguments[0] in _WRITE_FILES and "--help" not in arguments):
        _fail("standard output is closed: there is nowhere to write the answer", 1)
    if not (arguments[:1] and arguments[0] in _BUILD_COMMANDS):
        # edgelm multiplies no matrices with numpy, whose threads need memory, and which fails where it gets none.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        status = cli.main(prog_name="edgelm", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)  # click has printed the newline
    except _StdoutClosed:
        discard_stdout()
        sys.exit(EXIT_BROKEN_PIPE)
    except click.UsageError as error:
        hint = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
        _fail(error.format_message() + hint, EXIT_USAGE)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except EdgelmError as error:
        _fail(_with_flags(str(error)), EXIT_USAGE if isinstance(error, ConfigError) else 1)
    except ModuleNotFoundError as error:
        _fail(f"the Python package {error.name!r} is missing; {install_hint('cpu')}", 1)
    except MemoryError:
        _fail("not enough memory", 1)
    except UnicodeEncodeError as error:
        discard_stdout()
        _fail(
            f"standard output cannot show {error.object[error.start]!a} in {error.encoding}: unset PYTHONIOENCODING", 1
        )
    except OSError as error:
        discard_stdout()
        _fail(f"{error.filename or 'output'}: {error.strerror or error}", 1)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    note(f"edgelm: {' '.join(message.split())}")
    sys.exit(status)


def _with_flags(message: str) -> str:
    """Spell options that a message gives as in Python, such as ``early_stopping='never'``, as flags of the shell."""
    return re.sub(r"\b([a-z]+(?:_[a-z]+)+)='(\w+)'", lambda m: f"--{m[1].replace('_', '-')} {m[2]}", message)
