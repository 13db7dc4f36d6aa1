"""What several commands share: options, the answers to one text or many, and tables that fit the terminal."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeVar

import click
from click.shell_completion import CompletionItem

from edgelm.batch import lines
from edgelm.batch.lines import LINE_ERRORS, complaint, line_text, next_line, without_line_end
from edgelm.bundle.small_files import MAX_TEXT_BYTES, SmallFileError, read_small_file
from edgelm.cli.interrupt import ends_at_once
from edgelm.cli.progress import progress
from edgelm.cli.streams import escaped, note, print_line, shows_in_stdout
from edgelm.errors import EdgelmError, PromptError

if TYPE_CHECKING:
    from edgelm.bundle.folder import Bundle
    from edgelm.generation.results import Stats
    from edgelm.model import Model

Function = TypeVar("Function", bound=Callable[..., object])


class OpenModel(Protocol):
    """Loads the model that a command's options name."""

    def __call__(self, *, task: str | None = None, draft: str | None = None) -> "Model":
        """Load it, with the task in the file `task` in place of the bundle's own, and the bundle `draft` to draft."""


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


class Size(click.ParamType):  # type: ignore[type-arg]  # generic in new versions of click only
    """A number of bytes like 80M: K, M and G are powers of 1000."""

    name = "SIZE"

    def __init__(self, *, zero: bool = False) -> None:
        """`zero` allows 0 too."""
        self._zero = zero

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([KMG]?)B?", value.strip().upper())
        if not match or not (float(match[1]) or self._zero):
            self.fail(f"{value!r} is not a size like 80M or 1.5G", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class TextCommand(click.Command):
    """A command whose arguments are texts: several unquoted words get a hint."""

    allow_extra_args = True  # so that `parse_args` sees them

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; a surplus argument is a usage error."""
        surplus = super().parse_args(ctx, args)
        if surplus:
            plural = "s" if len(surplus) > 1 else ""
            ctx.fail(f"Got unexpected extra argument{plural} ({' '.join(surplus)}); put each text in quotes")
        return surplus


def model_option(function: Function) -> Function:
    """``-m/--model``: where the bundle is; None stands for the embedded model."""
    meaning = "Bundle folder or packed file; by default the embedded model."
    return click.option(
        "-m",
        "--model",
        metavar="BUNDLE",
        envvar="EDGELM_MODEL",
        show_envvar=True,
        help=meaning,
        shell_complete=lambda ctx, param, begun: [CompletionItem(begun, type="file")],
    )(function)


def threads_option(function: Function) -> Function:
    """``--threads``."""
    meaning = "Number of CPU threads; by default one per CPU that this process may use."
    return click.option("--threads", type=int, metavar="N", help=meaning)(function)


def device_options(function: Function) -> Function:
    """``--device`` and ``--threads``."""
    meaning = "auto, cpu, cuda or cuda:N; an explicit device never falls back to another one."
    device = click.option("--device", metavar="DEVICE", default="auto", show_default=True, help=meaning)
    return device(threads_option(function))


def json_option(help_text: str) -> Callable[[Function], Function]:
    """``--json``, which reaches the command as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help_text)


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """``--model``, ``--prefix``, ``--context``, ``--device`` and ``--threads`` become one function `open_model`.

    `open_model()` loads the model. Call it after the cheap checks, because it imports numpy and ONNX Runtime.
    """
    meaning = "Prefix file (of `edgelm bake` or prefix-tuning) that precedes every prompt, perhaps with a task."

    @model_option
    @click.option("--prefix", metavar="FILE", help=meaning)
    @click.option("--context", type=int, metavar="N", help="Longest text in tokens; by default what the model can.")
    @device_options
    @wraps(command)
    def with_model(
        *,
        model: str | None,
        prefix: str | None,
        context: int | None,
        device: str,
        threads: int | None,
        **options: object,
    ) -> None:
        def open_model(*, task: str | None = None, draft: str | None = None) -> "Model":
            with ends_at_once():
                from edgelm.loading import load

                return load(
                    model, device=device, threads=threads, prefix=prefix, task=task, context=context, draft=draft
                )

        command(open_model=open_model, **options)

    return with_model


def draft_option(function: Function) -> Function:
    """``--draft``."""
    meaning = "Bundle of a much smaller model with the same vocabulary, which guesses tokens: faster, the same text."
    return click.option("--draft", metavar="BUNDLE", help=meaning)(function)


def bundle_options(command: Callable[..., None]) -> Callable[..., None]:
    """A bundle as an argument or as ``--model``, which reaches `command` as one path `place`.

    Without both it is the folder of the embedded model.
    """

    @click.argument("bundle", metavar="[BUNDLE]", required=False)
    @model_option
    @wraps(command)
    def with_place(*, bundle: str | None, model: str | None, **options: object) -> None:
        from edgelm.bundle.folder import default_bundle_path

        command(place=given_place(bundle, model) or str(default_bundle_path()), **options)

    return with_place


def given_place(bundle: str | None, model: str | None) -> str | None:
    """The bundle out of an argument and ``--model``; None without both. Raises UsageError if they differ."""
    context = click.get_current_context()
    from_environment = context.get_parameter_source("model") is click.core.ParameterSource.ENVIRONMENT
    if bundle is not None and model is not None and bundle != model and not from_environment:
        raise click.UsageError(f"two bundles are given, {bundle!r} and --model {model!r}; give one", context)
    return model if bundle is None else bundle


def read_text_file(path: Path, error: type[EdgelmError]) -> str:
    """The content of the UTF-8 file at `path`; raises `error` if it cannot be read, is too large or is not UTF-8."""
    try:
        content = read_small_file(path, MAX_TEXT_BYTES)
    except SmallFileError as reason:
        raise error(f"cannot read {str(path)!r}: it {reason}") from None
    except (OSError, ValueError) as reason:  # ValueError: a NUL byte in the path
        words = (isinstance(reason, OSError) and reason.strerror) or reason
        raise error(f"cannot read {str(path)!r}: {words}") from None
    return _decoded(content, repr(str(path)), error)


def read_prompt_file(path: Path) -> str:
    """The content of the file `path`, without the last line end; raises PromptError if it cannot be read."""
    return without_line_end(read_text_file(path, PromptError))


def read_prompt() -> str:
    """All of standard input, without the last line end; raises PromptError if it is closed or not UTF-8 text."""
    content = _stdin("give the prompt as an argument", "reading the prompt from the terminal; end it").read()
    # `echo` and editors end a text with a line end that is not part of the prompt.
    return without_line_end(_decoded(content, "standard input", PromptError))


def check_output_file(path: str) -> None:
    """Raise ClickException if the file `path` cannot be written, before a long command computes what it shall hold."""
    target = Path(path)
    if target.is_dir():
        raise click.ClickException(f"cannot write {path!r}: it is a folder; give a file")
    if target.exists() and not target.is_file():  # it would be replaced
        raise click.ClickException(f"cannot write {path!r}: it is a device or a pipe; give a file")
    if not target.parent.is_dir():
        raise click.ClickException(f"cannot write {path!r}: there is no folder {str(target.parent)!r}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise click.ClickException(f"cannot write {path!r}: the folder {str(target.parent)!r} is not writable")


def answer_each(argument: str | None, answer: Callable[[str], str], *, as_json: bool) -> None:
    """Print `answer(argument)`, or for None and "-" the answer to every line of standard input, each on its own line.

    A line is answered before the next one is read. If a line is not UTF-8, or `answer` raises PromptError or
    TokenizerError, the error is reported with the number of the line, its answer is empty (in JSON an object with
    "line" and "error"), and the command ends with status 1 after the last line.
    """
    if argument is not None and argument != "-":
        print_line(answer(argument))
        return
    failed = False
    # On a terminal the answers show how far the command is.
    with nullcontext(_ignore) if sys.stdout.isatty() else progress("answered") as show:
        stdin = _stdin("give the text as an argument", "reading lines from the terminal; end")
        for number, line in enumerate(iter(partial(next_line, stdin), None), 1):
            try:
                answered = answer(line_text(line))
            except LINE_ERRORS as error:
                message = complaint(f"line {number} of standard input", error)
                note(f"edgelm: {message}")
                answered = json_line({"line": number, "error": message}) if as_json else ""
                failed = True
            print_line(answered)
            show(f"{number:,} lines")
    if failed:
        click.get_current_context().exit(1)


def json_line(content: object) -> str:
    """One JSON object on one line for standard output, whatever that can write; see `edgelm.batch.lines`."""
    return lines.json_line(content, shows_in_stdout)


def print_json(content: object) -> None:
    """One JSON object on stdout, on one line."""
    print_line(json_line(content))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of a name and one value or more, in columns.

    Values wrap where the terminal is too narrow. Output to a file or pipe wraps only if the environment sets COLUMNS.
    """
    rows = [[escaped(cell) for cell in row] for row in rows]
    name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    terminal_width = shutil.get_terminal_size((0, 0)).columns
    if terminal_width:
        name_width = min(name_width, max(16, terminal_width - sum(min(width, 10) + 2 for width in widths)))
        room = terminal_width - name_width
        for rank, column in enumerate(sorted(range(len(widths)), key=widths.__getitem__)):  # the narrowest first
            share = room // (len(widths) - rank) - 2
            widths[column] = min(widths[column], max(10, share))
            room -= widths[column] + 2
    sizes = [name_width, *widths]
    for row in rows:
        cells = [_wrapped(text, size) for text, size in zip(row, sizes, strict=True)]
        for line in range(max(map(len, cells))):
            texts = [cell[line] if line < len(cell) else "" for cell in cells]
            print_line("  ".join(f"{text:<{size}}" for text, size in zip(texts, sizes, strict=True)).rstrip())


def print_wrapped(text: str) -> None:
    """Print a line that wraps, as tables do, where the terminal is too narrow."""
    for line in _wrapped(text, shutil.get_terminal_size((0, 0)).columns or len(text)):
        print_line(line)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, at least one; spaces at the beginning stay."""
    return textwrap.wrap(text, max(1, width), break_on_hyphens=False) or [""]


def storage_formats(bundle: "Bundle") -> str:
    """How a bundle stores its matrices, such as "32-bit float32, 8-bit block"."""
    manifest = bundle.manifest
    formats = ", ".join(sorted({f"{matrix.bits}-bit {matrix.format}" for matrix in manifest.recipe.matrices}))
    exact = manifest.graph.exact_logits
    head = "" if exact is None else f"; a head of two stages, {exact} logits exact"
    cache = "; keys and values in 8 bits" if manifest.graph.kv_dtype == "int8" else ""
    return f"{formats}{head}{cache}"


def stats_line(stats: "Stats", model: "Model") -> str:
    """What `stats` say of a generation, on one line."""
    drafts = f" ({stats.accepted_tokens} of {stats.drafted_tokens} drafted)" if stats.drafted_tokens else ""
    reused = f" ({stats.reused_tokens} reused)" if stats.reused_tokens else ""
    prefix = f"prefix {stats.prefix_tokens} tok | " if stats.prefix_tokens else ""
    return (
        f"{prefix}prompt {stats.prompt_tokens} tok{reused} in {stats.prefill_seconds * 1e3:.0f} ms | "
        f"{stats.new_tokens} tok{drafts}, {stats.tokens_per_second:.1f} tok/s | load {stats.load_seconds:.2f} s | "
        f"peak {stats.peak_rss_bytes / 1e6:.0f} MB | {model.session.device}, {model.session.threads} threads"
    )


def model_facts(model: "Model") -> dict[str, object]:
    """What made an answer, for an object of JSON."""
    manifest = model.bundle.manifest
    return {
        "model": str(model.bundle.path),
        "digest": manifest.digest,
        "precision": manifest.recipe.name,
        "device": str(model.session.device),
        "threads": model.session.threads,
    }


def _ignore(how_far: str) -> None:
    """Show nothing."""


def _stdin(instead: str, at_terminal: str) -> BinaryIO:
    if sys.stdin is None:
        raise PromptError(f"standard input is closed: {instead}")
    if sys.stdin.isatty():
        note(f"edgelm: {at_terminal} with Ctrl-D (Ctrl-Z on Windows)")
    return sys.stdin.buffer


def _decoded(content: bytes, name: str, error: type[EdgelmError]) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise error(f"{name} is not UTF-8 text (byte {reason.start})") from None
