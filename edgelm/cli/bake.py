"""``edgelm bake``: a text with its keys and values in a file, to precede every prompt."""

from pathlib import Path
from typing import get_args

import click

from edgelm.cli.interrupt import ends_at_once
from edgelm.cli.shared import check_output_file, device_options, model_option, read_text_file
from edgelm.cli.streams import note
from edgelm.errors import PrefixError
from edgelm.reuse.kv_file import KvDtype


@click.command(name="bake")
@click.argument("text_file", metavar="TEXT_FILE", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, metavar="FILE", help="Prefix file to write; replaces an existing file.")
@model_option
@device_options
@click.option(
    "--dtype",
    type=click.Choice(get_args(KvDtype)),
    help="float16 halves the file, but results then differ in the last bits.  [default: the model's own]",
)
def command(
    text_file: Path, output: str, model: str | None, device: str, threads: int | None, dtype: KvDtype | None
) -> None:
    """Precompute the UTF-8 text in TEXT_FILE, which can then precede every prompt.

    The whole file counts, up to its last byte. The prefix file fits only the bundle that computed it. One bundle can
    serve many tasks, each with its own prefix file.

    \b
    edgelm bake examples.txt -o task.prefix -m gpt2-int8
    edgelm run --prefix task.prefix -m gpt2-int8 "Q: Who is there?"
    """
    text = read_text_file(text_file, PrefixError)
    check_output_file(output)
    with ends_at_once():
        from edgelm.loading import load  # imports numpy and ONNX Runtime: after the cheap checks

        loaded = load(model, device=device, threads=threads)
    loaded.save_prefix(output, text, dtype=dtype)
    note(f"{output}: {Path(output).stat().st_size / 1e6:.2f} MB")
