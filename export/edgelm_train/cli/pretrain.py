"""``edgelm pretrain``: from text files to a model."""

from pathlib import Path
from typing import Any

import click

from edgelm_train.cli.shared import FILE, OUT, flags, prepare, say, stopped
from edgelm_train.data.records import unescaped
from edgelm_train.options import PretrainOptions


@click.command(name="pretrain")
@click.option("--data", multiple=True, required=True, type=FILE, metavar="FILE", help="UTF-8 text; repeatable.")
@click.argument("more", nargs=-1, type=FILE, metavar="[FILE]...")
@OUT
@flags(PretrainOptions)
def command(data: tuple[Path, ...], more: tuple[Path, ...], out: Path, **options: Any) -> int:
    """Train a tokenizer and a GPT-2 on text files.

    \b
    edgelm pretrain --data stories.txt --out stories --size 6M --tokens 12M
    edgelm export stories -o stories-int8
    edgelm run -m stories-int8 "Once upon a time"

    Documents are separated by <|endoftext|>; a file without it is one document. The output folder also gets report.md
    and curves.svg. Ctrl-C writes a checkpoint, and the same command goes on from there.
    """
    chosen = PretrainOptions(**{**options, "separator": unescaped(options["separator"])})
    files = [*data, *more]
    prepare("pretrain", out, files)
    from edgelm_train.pretrain import pretrain

    done = pretrain(files, out, chosen, say=say)
    if done.report is None:
        return stopped(done.outcome)
    losses = ", ".join(f"{loss:.4f} in windows of {window}" for window, loss in done.report.held_out.items())
    click.echo(
        f"{out}: held-out loss {losses}; overfitting gap {done.report.gap:.4f}; {done.outcome.seconds:,.0f} s; "
        f"see {out / 'report.md'}"
    )
    return 0
