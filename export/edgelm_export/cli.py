"""``edgelm export``: a checkpoint becomes a bundle."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import click

from edgelm.bundle.certificate import Quality
from edgelm.bundle.manifest import FixedPrecision
from edgelm.bundle.task import read_task_file
from edgelm.cli.interrupt import unwinds
from edgelm.cli.shared import Size
from edgelm.cli.streams import escaped, note
from edgelm.errors import ExportError, install_hint
from edgelm.reuse.kv_file import KvDtype
from edgelm_export.publish.folder import check_output

_FILE = click.Path(path_type=Path)
_NEEDED = ("torch", "transformers", "optimum", "onnx")
_CHOOSE = "Choose the bits of every matrix so that"


@click.command(name="export")
@click.argument("source")
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Folder for the bundle: new, or empty.")
@click.option(
    "--precision",
    type=click.Choice(get_args(FixedPrecision)),
    help="fp32 is exact, fp16 is for CUDA, int8 and int4 are small. w8a8 is an int8 that reads long prompts faster and "
    "writes more slowly. int4-small has 4 bits in the token table too.  [default: int8]",
)
@click.option("--max-disk", type=Size(), help=f"{_CHOOSE} the bundle takes at most SIZE on disk, like 80M or 1.5G.")
@click.option("--max-ram", type=Size(), help=f"{_CHOOSE} a process with a full context takes at most SIZE of memory.")
@click.option(
    "--max-ppl", type=float, metavar="RATIO", help=f"{_CHOOSE} the perplexity is at most RATIO times the source's."
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option(
    "--eval-text",
    "eval_texts",
    multiple=True,
    type=_FILE,
    metavar="FILE",
    help="UTF-8 text to measure the bundle on, beside text drawn from SOURCE. May be given several times.",
)
@click.option("--adapter", metavar="ADAPTER", help="LoRA adapter, a folder or a hub id, to merge into SOURCE first.")
@click.option(
    "--tokenizer",
    metavar="FOLDER_OR_ID",
    help="Take the tokenizer of this folder or hub id, e.g. for a training checkpoint that was saved without one.",
)
@click.option(
    "--generation-config",
    type=_FILE,
    metavar="FILE",
    help="JSON of generation options that override SOURCE's generation_config.json. null brings a default back.",
)
@click.option(
    "--vocabulary",
    type=_FILE,
    metavar="FILE",
    help="UTF-8 text of your domain. Only the tokens that it needs are kept. Other text is spelt in smaller pieces.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="N",
    help="The longest text, in tokens: less memory for keys and values.  [default: SOURCE's own context]",
)
@click.option(
    "--prefix",
    type=_FILE,
    metavar="FILE",
    help="UTF-8 text, all of it, to compute once and put before every prompt, or a prefix file that was learned.",
)
@click.option(
    "--prefix-dtype",
    type=click.Choice(get_args(KvDtype)),
    help="Type of the prefix's keys and values. float16 halves the prefix and changes the last bits of the results.  "
    "[default: the model's own]",
)
@click.option(
    "--task",
    type=_FILE,
    metavar="FILE",
    help="JSON that says what the bundle is for, such as its template and its labels (docs/tasks.md).",
)
@click.option(
    "--draft",
    type=_FILE,
    metavar="BUNDLE",
    help="Bundle of a much smaller model with the same vocabulary, which then guesses tokens: faster, the same text.",
)
@click.option(
    "--two-stage-head",
    is_flag=True,
    help="Read the head in 4 bits, and then the rows of the 128 likeliest tokens in 8 bits: faster where memory is "
    "slow, less memory, more disk. For int8, w8a8 and int4.",
)
@click.option(
    "--int8-cache",
    is_flag=True,
    help="Keep keys and values in 8 bits: a quarter of the memory of a text. For all precisions but fp32 and fp16.",
)
@click.option("--accept-quality-loss", is_flag=True, help="Write the bundle even where it misses its quality gate.")
def command(
    source: str,
    output: str,
    precision: FixedPrecision | None,
    max_disk: int | None,
    max_ram: int | None,
    max_ppl: float | None,
    revision: str | None,
    eval_texts: tuple[Path, ...],
    adapter: str | None,
    tokenizer: str | None,
    generation_config: Path | None,
    vocabulary: Path | None,
    context: int | None,
    prefix: Path | None,
    prefix_dtype: KvDtype | None,
    task: Path | None,
    draft: Path | None,
    two_stage_head: bool,
    int8_cache: bool,
    accept_quality_loss: bool,
) -> None:
    """Turn the checkpoint SOURCE, a folder, a hub id or a GGUF file, into a bundle.

    \b
    edgelm export gpt2 -o gpt2-int8
    edgelm export ./my-checkpoint -o my-int4 --precision int4
    edgelm export gpt2 -o gpt2-small --max-disk 80M --max-ppl 1.02

    With a limit (--max-disk, --max-ram, --max-ppl) edgelm measures what every matrix loses at different bits, and
    chooses the bits that lose least. Limits of size are used up; a limit of perplexity alone gives the smallest bundle
    that keeps it.
    """
    limits = (max_disk, max_ram, max_ppl)
    if precision is not None and limits != (None, None, None):
        raise click.UsageError("--precision and limits (--max-disk, --max-ram, --max-ppl) exclude each other; give one")
    if two_stage_head and limits != (None, None, None):
        raise click.UsageError("--two-stage-head goes with --precision, not with limits; give one")
    if max_ppl is not None and not 1 < max_ppl <= 100:
        raise click.UsageError(f"--max-ppl must be more than 1 and at most 100, got {max_ppl:g}")
    if prefix_dtype is not None and prefix is None:
        raise click.UsageError("--prefix-dtype is given without --prefix; give both, or neither")
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ExportError(f"export needs {', '.join(missing)}; {install_hint('cpu,export')}")
    check_output(Path(output).absolute())  # before torch is loaded, which takes seconds
    if task is not None:
        read_task_file(task)
    with unwinds() as raise_again:
        progress = _Progress(raise_again)
        progress.begin("loading torch, transformers and optimum")
        from edgelm_export.pipeline import export
        from edgelm_export.quantize.budget import Budget

        try:
            exported = export(
                source,
                Path(output),
                precision or "int8" if limits == (None, None, None) else Budget(*limits),
                revision=revision,
                adapter=adapter,
                tokenizer=tokenizer,
                generation_config=generation_config,
                vocabulary=vocabulary,
                context=context,
                prefix=prefix,
                prefix_dtype=prefix_dtype,
                task=task,
                draft_model=draft,
                two_stage_head=two_stage_head,
                int8_cache=int8_cache,
                accept_quality_loss=accept_quality_loss,
                eval_texts=eval_texts,
                report=progress.begin,
            )
        finally:
            progress.end()
    note(progress.summary())
    for remark in exported.notes:
        note(f"note: {remark}")
    bundle, c = exported.bundle, exported.certificate
    for quality in c.texts[1:]:
        click.echo(escaped(f"{quality.text}: {_lost(quality)}"))
    summary = f"{output}: {bundle.manifest.recipe.name}, {bundle.size_bytes / 1e6:.1f} MB, {_lost(c.drawn)}; "
    click.echo(escaped(f"{summary}gate ({c.gate}) {'passed' if c.passed else 'MISSED'}"))


def _lost(quality: Quality) -> str:
    return (
        f"perplexity x {quality.perplexity_ratio:.4f}, KL {quality.mean_kl_divergence:.2g} nats, "
        f"same top token {quality.top1_agreement:.2%}"
    )


class _Progress:
    """Prints a line for each stage on stderr, with the seconds that it took. An interrupt ends it at the next stage."""

    def __init__(self, raise_interrupt: Callable[[], None]) -> None:
        self._raise_interrupt = raise_interrupt
        self._stage = ""
        self._began = 0.0
        self._seconds: dict[str, float] = {}

    def begin(self, stage: str) -> None:
        """End the current stage, and begin the stage called `stage`."""
        self.end()
        self._raise_interrupt()
        click.echo(escaped(f"{stage} ... "), err=True, nl=False)
        self._stage, self._began = stage, time.monotonic()

    def end(self) -> None:
        """End the current stage, if there is one."""
        if self._stage:
            self._seconds[self._stage] = time.monotonic() - self._began
            click.echo(f"{self._seconds[self._stage]:.1f} s", err=True)
        self._stage = ""

    def summary(self) -> str:
        """The seconds of the whole export and of its stages, the longest stage first."""
        stages = sorted(self._seconds.items(), key=lambda item: -item[1])
        parts = [f"{seconds:.1f} s {stage}" for stage, seconds in stages if seconds >= 0.05]
        return f"took {sum(self._seconds.values()):.1f} s: {', '.join(parts)}"
