"""``edgelm finetune``: from a checkpoint and a file of text or examples to a tuned model."""

from pathlib import Path
from typing import Any

import click

from edgelm_train.cli.shared import FILE, OUT, REVISION, flags, prepare, say, stopped
from edgelm_train.options import FinetuneOptions


@click.command(name="finetune")
@click.argument("base")
@click.option("--data", required=True, type=FILE, metavar="FILE", help="UTF-8 text, or .jsonl, .json, .tsv, .csv.")
@OUT
@flags(FinetuneOptions, REVISION)
def command(base: str, data: Path, out: Path, revision: str | None, **options: Any) -> int:
    """Tune the GPT-2 checkpoint BASE, a folder or a hub id, on a text or on examples.

    \b
    edgelm finetune gpt2 --data novel.txt --out novel
    edgelm export gpt2 --adapter novel -o novel-int8
    edgelm finetune gpt2 --data reviews.tsv --prompt "{text} It was" --completion " {label}" \\
        --method prefix --out reviews
    edgelm run -m gpt2-int8 --prefix reviews/prefix.safetensors "So dull. It was"

    Every token of a plain text is learned. Of an example, only the completion and an end-of-text token after it are
    learned; without templates, the columns "prompt" and "completion" are taken. Ctrl-C writes a checkpoint, and the
    same command goes on from there.
    """
    chosen = FinetuneOptions(**options)
    chosen.task_for(data)
    prepare("finetune", out, [data] if chosen.held_out is None else [data, chosen.held_out], "peft")
    from edgelm_train.finetune import finetune

    done = finetune(base, data, out, chosen, revision=revision, say=say)
    if done.report is None:
        return stopped(done.outcome)
    losses = done.report.losses
    click.echo(
        f"{out}: held-out loss {losses['before']:.4f} before, {losses['after']:.4f} after; "
        f"{done.outcome.seconds:,.0f} s; see {out / 'report.md'}"
    )
    click.echo("\n    ".join(["use it like this:", *done.report.next_steps]), err=True)
    return 0
