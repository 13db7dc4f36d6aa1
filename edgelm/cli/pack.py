"""``edgelm pack`` and ``edgelm unpack``: a bundle as one file or as a Python package, and back."""

from pathlib import Path

import click

from edgelm.bundle.folder import Bundle
from edgelm.bundle.packed import PACKED_SUFFIX
from edgelm.bundle.packing import pack, unpack
from edgelm.cli.shared import bundle_options, check_output_file
from edgelm.cli.streams import note


@click.command(name="pack")
@bundle_options
@click.option("-o", "--output", metavar="FILE", help="File to write.  [default: the bundle's name and .edgelm]")
def pack_command(place: str, output: str | None) -> None:
    """Write a bundle as one file, which every command takes as it takes the folder.

    The same bundle makes the same bytes. The file is a zip archive whose members are not compressed, so its weights are
    mapped where they lie, and every zip program can open it.

    \b
    edgelm pack gpt2-int8              write gpt2-int8.edgelm
    edgelm run -m gpt2-int8.edgelm "Hello"
    """
    bundle = Bundle.read(place)
    target = output or bundle.name + PACKED_SUFFIX
    check_output_file(target)
    pack(bundle, target)
    note(f"{target}: {Path(target).stat().st_size / 1e6:.1f} MB, digest {bundle.manifest.digest}")


@click.command(name="unpack")
@click.argument("file", metavar="FILE")
@click.option("-o", "--output", metavar="FOLDER", help="New folder.  [default: the file's name without .edgelm]")
def unpack_command(file: str, output: str | None) -> None:
    """Write the files of a packed bundle into a new folder. Every file is hashed on the way."""
    bundle = Bundle.read(file)
    target = output or bundle.name
    if target == file:
        raise click.UsageError(f"{file!r} has no suffix that could be left out: name the folder with --output")
    unpack(bundle, target)
    note(f"{target}: {bundle.file_count} files, digest {bundle.manifest.digest}")
