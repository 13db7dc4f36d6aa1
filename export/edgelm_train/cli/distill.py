"""``edgelm distill``: from a checkpoint and a text to a smaller checkpoint."""

from pathlib import Path
from typing import Any

import click

from edgelm_train.cli.pretrain import Count, need_training_side, say, stopped
from edgelm_train.run_options import FILE, run_flags


@click.command(name="distill")
@click.argument("teacher")
@click.option("--data", required=True, type=FILE, metavar="FILE", help="UTF-8 text.")
@click.option(
    "-o", "--out", required=True, type=FILE, metavar="FOLDER", help="Where the student goes: new, or a run to resume."
)
@click.option(
    "--size",
    default="1M",
    show_default=True,
    metavar="SIZE",
    help="A new student: 1M, 6M, 30M, 124M, or a GPT-2 config.json.",
)
@click.option("--layers", type=int, metavar="N", help="Instead: a student of N of the teacher's layers.")
@click.option(
    "--tokens", type=Count(), help="Train on so many, for example 12.4M.  [default: two passes over the data]"
)
@click.option("--batch-tokens", type=Count(), help="Tokens an optimizer step sees.  [default: by size]")
@click.option(
    "--soft", type=float, default=1.0, show_default=True, metavar="W", help="Weight of the teacher's distribution."
)
@click.option(
    "--hidden", type=float, default=1.0, show_default=True, metavar="W", help="Weight of the teacher's hidden states."
)
@click.option("--hard", type=float, default=0.5, show_default=True, metavar="W", help="Weight of the text itself.")
@click.option(
    "--temperature", type=float, default=2.0, show_default=True, metavar="T", help="Softens the teacher's distribution."
)
@click.option(
    "--alone/--no-alone", default=True, show_default=True, help="Also train the student without a teacher, to compare."
)
@run_flags(patience=0)
def command(teacher: str, data: Path, out: Path, revision: str | None, **options: Any) -> int:
    """Train a small GPT-2 on a text and on what the checkpoint TEACHER, a folder or a hub id, makes of it.

    \b
    edgelm distill stories-6m --data stories.txt --out stories-1m --size 1M --tokens 2M
    edgelm export stories-1m -o stories-1m-int8

    The student has the teacher's tokenizer. The report compares it with its teacher, and with the same student after
    as much training without one. Ctrl-C writes a checkpoint, and the same command goes on from there.
    """
    need_training_side("distill")
    from edgelm_train.distill import DistillOptions, distill

    done = distill(teacher, data, out, DistillOptions(**options), revision=revision, say=say)
    if done.report is None:
        return stopped(done.outcome)
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in done.report.losses.items())
    click.echo(f"{out}: held-out loss: {losses}; {done.outcome.seconds:,.0f} s; see {out / 'report.md'}")
    return 0
