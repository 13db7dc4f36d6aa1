"""``edgelm finetune``: from a checkpoint and a file of text or examples to a tuned model."""

from pathlib import Path
from typing import Any

import click

from edgelm_train.cli.pretrain import need_training_side, say, stopped
from edgelm_train.run_options import FILE, run_flags


@click.command(name="finetune")
@click.argument("base")
@click.option("--data", required=True, type=FILE, metavar="FILE", help="UTF-8 text, or .jsonl, .json, .tsv, .csv.")
@click.option(
    "-o", "--out", required=True, type=FILE, metavar="FOLDER", help="Where the result goes: new, or a run to resume."
)
@click.option(
    "--method",
    type=click.Choice(["full", "lora", "prefix"]),
    default="lora",
    show_default=True,
    help="Learn all weights, an adapter, or what stands before every prompt.",
)
@click.option("--prompt", metavar="TEMPLATE", help=r"A prompt, with columns in braces: 'Review: {text}\nIt was'.")
@click.option("--completion", metavar="TEMPLATE", help="What is to be answered: ' {label}'. Only this is learned.")
@click.option("--epochs", type=float, default=3.0, show_default=True, metavar="N", help="Passes over the data.")
@click.option("--batch-size", type=int, default=8, show_default=True, metavar="N", help="Examples or windows a step.")
@click.option("--window", type=int, metavar="N", help="Tokens of text learned at once.  [default: half the context]")
@click.option("--rank", type=int, default=8, show_default=True, metavar="N", help="Of LoRA's matrices.")
@click.option(
    "--prefix-tokens",
    type=int,
    default=16,
    show_default=True,
    metavar="N",
    help="How much of the context a prefix takes.",
)
@run_flags(patience=3)
def command(base: str, data: Path, out: Path, revision: str | None, **options: Any) -> int:
    """Tune the GPT-2 checkpoint BASE, a folder or a hub id, on a text or on examples.

    \b
    edgelm finetune gpt2 --data novel.txt --out novel
    edgelm export gpt2 --adapter novel -o novel-int8
    edgelm finetune gpt2 --data reviews.tsv --prompt "{text} It was" --completion " {label}" \\
        --method prefix --out reviews
    edgelm run -m gpt2-int8 --prefix reviews/prefix.kv "So dull. It was"

    Text is learned as it is. Of examples only the completion is, and an end of text after it; without templates they
    are the columns "prompt" and "completion". Ctrl-C writes a checkpoint, and the same command goes on from there.
    """
    need_training_side("finetune", "peft")
    from edgelm_train.finetune import FinetuneOptions, finetune

    done = finetune(base, data, out, FinetuneOptions(**options), revision=revision, say=say)
    if done.report is None:
        return stopped(done.outcome)
    losses = done.report.losses
    click.echo(
        f"{out}: held-out loss {losses['before']:.4f} before, {losses['after']:.4f} after; "
        f"{done.outcome.seconds:,.0f} s; see {out / 'report.md'}"
    )
    return 0
