"""``edgelm pack`` and ``edgelm unpack``: a bundle as one file or as a Python package, and back."""

from pathlib import Path

import click

from edgelm.bundle.folder import Bundle, file_fact
from edgelm.bundle.packed import PACKED_SUFFIX
from edgelm.bundle.packing import pack, unpack
from edgelm.bundle.wheel import write_wheel
from edgelm.cli.shared import bundle_options, check_output_file
from edgelm.cli.streams import note


@click.command(name="pack")
@bundle_options
@click.option(
    "-o", "--output", metavar="PATH", help="File to write, of a wheel the folder.  [default: NAME.edgelm, or here]"
)
@click.option("--wheel", is_flag=True, help="Write a Python package that pip installs.")
@click.option("--name", metavar="NAME", help="Name of the package and of the model.  [default: the bundle's name]")
@click.option("--version", metavar="VERSION", help="Version of the package.  [default: 1.0]")
def pack_command(place: str, output: str | None, wheel: bool, name: str | None, version: str | None) -> None:
    """Write a bundle as one file, which every command takes as it takes the folder.

    The same bundle makes the same bytes. The file is a zip archive whose members are not compressed, so its weights are
    mapped where they lie, and every zip program can open it.

    \b
    edgelm pack gpt2-int8              write gpt2-int8.edgelm
    edgelm run -m gpt2-int8.edgelm "Hello"
    edgelm pack gpt2-int8 --wheel --name my-model
    pip install ./my_model-1.0-py3-none-any.whl
    edgelm run -m my-model "Hello"
    """
    if not wheel and (name or version):
        raise click.UsageError("--name and --version belong to --wheel")
    bundle = Bundle.read(place)
    if wheel:
        _pack_wheel(bundle, Path(output or ""), name or bundle.name, version or "1.0")
        return
    target = output or bundle.name + PACKED_SUFFIX
    check_output_file(target)
    pack(bundle, target)
    note(f"{target}: {Path(target).stat().st_size / 1e6:.1f} MB, digest {bundle.manifest.digest}")


def _pack_wheel(bundle: Bundle, folder: Path, name: str, version: str) -> None:
    if not folder.is_dir():
        raise click.ClickException(f"there is no folder {str(folder)!r} for the wheel: --output names one")
    target = write_wheel(bundle, folder, name, version)
    fact = file_fact(target)
    note(f"{target}: {fact.size_bytes / 1e6:.1f} MB, digest {bundle.manifest.digest}")
    note(f"for a requirements file: {name}=={version} --hash=sha256:{fact.sha256}")


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
