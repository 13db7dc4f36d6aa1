"""``edgelm distill``: from a checkpoint and a text to a smaller checkpoint."""

from pathlib import Path
from typing import Any

import click

from edgelm_train.cli.shared import FILE, OUT, REVISION, flags, prepare, say, stopped
from edgelm_train.options import DistillOptions


@click.command(name="distill")
@click.argument("teacher")
@click.option("--data", required=True, type=FILE, metavar="FILE", help="UTF-8 text.")
@OUT
@flags(DistillOptions, REVISION)
def command(teacher: str, data: Path, out: Path, revision: str | None, **options: Any) -> int:
    """Train a small GPT-2 on a text and on what the checkpoint TEACHER, a folder or a hub id, predicts for it.

    \b
    edgelm distill stories-6m --data stories.txt --out stories-1m --size 1M --tokens 2M
    edgelm export stories-1m -o stories-1m-int8

    The student has the teacher's tokenizer. The report compares the student with its teacher, and with an equal
    student that was trained as long without a teacher. Ctrl-C writes a checkpoint, and the same command goes on from
    there.
    """
    chosen = DistillOptions(**options)
    prepare("distill", out, [data] if chosen.held_out is None else [data, chosen.held_out])
    from edgelm_train.distill import distill

    done = distill(teacher, data, out, chosen, revision=revision, say=say)
    if done.report is None:
        return stopped(done.outcome)
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in done.report.losses.items())
    click.echo(f"{out}: held-out loss: {losses}; {done.outcome.seconds:,.0f} s; see {out / 'report.md'}")
    return 0
