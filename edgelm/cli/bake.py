"""``edgelm bake``: a text with its keys and values in a file, to stand before every prompt."""

from pathlib import Path
from typing import get_args

import click

from edgelm.cli.options import device_options, model_option
from edgelm.errors import PrefixError
from edgelm.reuse.kv_file import KvDtype


@click.command(name="bake")
@click.argument("text_file", metavar="TEXT_FILE", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, metavar="FILE", help="Where the prefix goes; a file there is replaced.")
@model_option
@device_options
@click.option(
    "--dtype",
    type=click.Choice(get_args(KvDtype)),
    help="float16 halves the file, and results are no longer the same to the last bit.  [default: the model's own]",
)
def command(
    text_file: Path, output: str, model: str | None, device: str, threads: int | None, dtype: KvDtype | None
) -> None:
    """Compute the UTF-8 text in TEXT_FILE, all of it to the last byte, and store it to stand before every prompt.

    The file fits the bundle that made it. One bundle with many such files serves many tasks.

    \b
    edgelm bake examples.txt -o task.prefix -m gpt2-int8
    edgelm run --prefix task.prefix -m gpt2-int8 "Q: Who is there?"
    """
    text = read_text(text_file)

    from edgelm.model import load  # imports numpy and ONNX Runtime: after the cheap checks

    load(model, device=device, threads=threads).save_prefix(output, text, dtype=dtype)
    click.echo(f"{output}: {Path(output).stat().st_size / 1e6:.2f} MB", err=True)


def read_text(path: Path) -> str:
    """Raises PrefixError where the file is not there or is not UTF-8 text."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PrefixError(f"{str(path)!r} is not UTF-8 text (byte {error.start})") from None
