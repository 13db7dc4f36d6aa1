"""``edgelm bake``: a text with its keys and values in a file, to precede every prompt, perhaps with a task."""

from pathlib import Path
from typing import get_args

import click

from edgelm.bundle.task import read_task_file
from edgelm.cli.interrupt import ends_at_once
from edgelm.cli.shared import check_output_file, device_options, model_option, read_text_file
from edgelm.cli.streams import note
from edgelm.errors import PrefixError
from edgelm.reuse.kv_file import KvDtype, is_safetensors


@click.command(name="bake")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, metavar="FILE", help="Prefix file to write; replaces an existing file.")
@click.option(
    "--task",
    metavar="FILE",
    help="Task file (docs/tasks.md) that says what the prefix is for. A model with the prefix does this task.",
)
@model_option
@device_options
@click.option(
    "--dtype",
    type=click.Choice(get_args(KvDtype)),
    help="float16 halves the file, but results then differ in the last bits.  [default: the model's own]",
)
def command(
    file: Path,
    output: str,
    task: str | None,
    model: str | None,
    device: str,
    threads: int | None,
    dtype: KvDtype | None,
) -> None:
    """Precompute the UTF-8 text in FILE, which can then precede every prompt, or put a task into a prefix file.

    The whole text counts, up to its last byte. The prefix file fits only the bundle that computed it. One bundle can
    serve many tasks, each with its own prefix file. A FILE that is a prefix already, such as one of prefix-tuning,
    keeps its keys and values, and gets the task.

    \b
    edgelm bake examples.txt -o mood.prefix -m gpt2-int8 --task mood.json
    edgelm run --prefix mood.prefix -m gpt2-int8 "Lily lost her doll."
    edgelm bake tuned/prefix.safetensors -o mood.safetensors -m gpt2-int8 --task mood.json
    """
    given = _is_prefix(file)
    text = "" if given else read_text_file(file, PrefixError)
    if given and task is None:
        raise click.UsageError(f"{str(file)!r} is a prefix already: give --task to put a task into it")
    if given and dtype is not None:
        raise click.UsageError(f"the keys and values of {str(file)!r} stay as they are: drop --dtype")
    check_output_file(output)
    if task is not None:
        read_task_file(task)
    with ends_at_once():  # imports numpy and ONNX Runtime: after the cheap checks
        from edgelm.bundle.folder import Bundle, default_bundle_path
        from edgelm.generation.prefix_task import give_task
        from edgelm.loading import load

        loaded = None if given else load(model, device=device, threads=threads, draft=False)
    if loaded is not None:
        loaded.save_prefix(output, text, dtype=dtype, task=task)
    elif task is not None:
        give_task(file, task, output, Bundle.read(default_bundle_path() if model is None else model))
    note(f"{output}: {Path(output).stat().st_size / 1e6:.2f} MB")


def _is_prefix(file: Path) -> bool:
    """Whether `file` is a prefix file, damaged or not; False where it cannot be read, which its reader explains."""
    try:
        if not file.is_file():
            return False
        with file.open("rb") as stream:
            return is_safetensors(stream.read(9))
    except (OSError, ValueError):  # ValueError: a NUL byte in the path
        return False
