"""``edgelm export``: a GPT-2 checkpoint becomes a bundle."""

import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import cast, get_args

import click

from edgelm.errors import ExportError
from edgelm.manifest import Precision
from edgelm_export.publish import check_output

_NEEDED = ("torch", "transformers", "optimum", "onnx")


@click.command(name="export")
@click.argument("source")
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Where the bundle goes: new, or empty.")
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default="int8",
    show_default=True,
    help="fp32 is exact, fp16 is for CUDA, int8 and int4 are small.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option("--adapter", metavar="ADAPTER", help="Merge this LoRA adapter (a folder or a hub id) into SOURCE first.")
@click.option(
    "--vocabulary",
    metavar="FILE",
    help="Keep only the tokens this text of your domain needs; all other text is spelt with smaller ones.",
)
@click.option("--accept-quality-loss", is_flag=True, help="Write the bundle even if it misses its quality gate.")
def command(
    source: str,
    output: str,
    precision: str,
    revision: str | None,
    adapter: str | None,
    vocabulary: str | None,
    accept_quality_loss: bool,
) -> None:
    """Turn the GPT-2 checkpoint SOURCE, a folder or a hub id, into a bundle.

    \b
    edgelm export gpt2 -o gpt2-int8
    edgelm export ./my-checkpoint -o my-int4 --precision int4
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ExportError(f"export needs {', '.join(missing)}; run: pip install 'edgelm[cpu,export]'")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that the half-built bundle is removed

    check_output(Path(output).absolute())  # before the seconds it takes to load torch

    progress = _Progress()
    progress.begin("loading torch, transformers and optimum")
    from edgelm_export.export import export

    try:
        exported = export(
            source,
            Path(output),
            cast(Precision, precision),
            revision=revision,
            adapter=adapter,
            vocabulary=None if vocabulary is None else Path(vocabulary),
            accept_quality_loss=accept_quality_loss,
            report=progress.begin,
        )
    finally:
        progress.end()
    for note in exported.notes:
        click.echo(f"note: {note}", err=True)
    c = exported.certificate
    click.echo(
        f"{output}: {precision}, {exported.bundle.size_bytes / 1e6:.1f} MB, perplexity x {c.perplexity_ratio:.4f}, "
        f"KL {c.mean_kl_divergence:.2g} nats, same top token {c.top1_agreement:.2%}; "
        f"gate ({c.gate}) {'passed' if c.passed else 'MISSED'}"
    )


class _Progress:
    """One line a stage on stderr, with the seconds it took."""

    def __init__(self) -> None:
        self._began = 0.0
        self._open = False

    def begin(self, stage: str) -> None:
        self.end()
        click.echo(f"{stage} ... ", err=True, nl=False)
        self._began, self._open = time.monotonic(), True

    def end(self) -> None:
        if self._open:
            click.echo(f"{time.monotonic() - self._began:.1f} s", err=True)
        self._open = False
