"""``edgelm verify``: every file of a bundle against its manifest."""

import click

from edgelm.bundle import Bundle
from edgelm.cli.options import bundle_argument, model_option, one_bundle


@click.command(name="verify")
@bundle_argument
@model_option
def command(bundle: str | None, model: str | None) -> None:
    """Check the digest, the size and the SHA-256 of every file of a bundle; exit 1 if anything differs."""
    from edgelm.model import default_bundle_path

    folder = one_bundle(bundle, model)
    opened = Bundle.read(default_bundle_path() if folder is None else folder)
    total = opened.verify(lambda name, size: click.echo(f"hashing {name} ({size / 1e6:.1f} MB)", err=True))
    click.echo(f"ok: {len(opened.manifest.files)} files, {total:,} bytes, digest {opened.manifest.digest}")
