"""``edgelm pretrain``: from text files to a model."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.errors import TrainingError, install_hint
from edgelm_train.data.template import unescaped
from edgelm_train.run_options import FILE, patience_flag, place_flags

if TYPE_CHECKING:
    from edgelm_train.run.loop import Outcome

_NEEDED = ("torch", "transformers", "tokenizers", "accelerate", "tensorboard", "matplotlib")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


class Count(click.ParamType):  # type: ignore[type-arg]  # generic in new versions of click only
    """A number like 12.4M: K, M and B are powers of 1000."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([KMGB]?)", str(value).strip().upper())
        if not match or float(match[1]) * _UNITS[match[2]] < 1:
            self.fail(f"{value!r} is not a number like 500K or 12.4M", param, ctx)
        return round(float(match[1]) * _UNITS[match[2]])


def need_training_side(command: str, *more: str) -> None:
    """Say that the packages of the [train] extra are about to be loaded, which takes seconds.

    Raises:
        TrainingError: one of them, or of `more` packages, is missing.
    """
    missing = [name for name in (*_NEEDED, *more) if find_spec(name) is None]
    if missing:
        raise TrainingError(f"{command} needs {', '.join(missing)}; {install_hint('cpu,train')}")
    click.echo("loading torch and transformers ...", err=True)


def say(line: str) -> None:
    """Tell whoever started a run how it goes."""
    click.echo(f"edgelm: {line}", err=True)


def stopped(outcome: "Outcome") -> int:
    """Say that a signal ended a run; the exit status that tells so to a shell."""
    say(f"stopped after step {outcome.steps:,}; a checkpoint is written, the same command goes on")
    return 128 + (outcome.signal or 0)


@click.command(name="pretrain")
@click.option("--data", "data", multiple=True, required=True, type=FILE, metavar="FILE", help="UTF-8 text; repeatable.")
@click.argument("more", nargs=-1, type=FILE, metavar="[FILE]...")
@click.option(
    "-o", "--out", required=True, type=FILE, metavar="FOLDER", help="Where the model goes: new, or a run to resume."
)
@click.option("--size", metavar="SIZE", help="1M, 6M, 30M, 124M, or a GPT-2 config.json.  [default: 6M]")
@click.option(
    "--from", "start_from", type=FILE, metavar="FOLDER", help="Go on from this GPT-2's weights and tokenizer."
)
@click.option(
    "--tokens", type=Count(), help="Train on so many, for example 12.4M.  [default: four passes over the data]"
)
@click.option("--hours", type=float, metavar="H", help="Train for so long at most.")
@click.option("--vocab-size", type=Count(), help="Tokens of the BPE to train.  [default: by size]")
@click.option(
    "--tokenizer", type=FILE, metavar="FOLDER", help="Use this folder's tokenizer.json instead of training one."
)
@click.option(
    "--separator",
    default="<|endoftext|>",
    metavar="TEXT",
    help="What stands between documents; \\n is a new line.  [default: <|endoftext|>]",
)
@click.option("--held-out", type=Count(), help="Measure on the first N documents.  [default: every 50th]")
@click.option(
    "--short-windows",
    type=float,
    default=0.5,
    show_default=True,
    metavar="PART",
    help="This first part of the steps sees half the context.",
)
@click.option("--batch-tokens", type=Count(), help="Tokens an optimizer step sees.  [default: by size]")
@click.option(
    "--accumulate",
    type=int,
    metavar="N",
    help="Compute a batch in N parts.  [default: as few as fit into memory]",
)
@click.option("--learning-rate", type=float, metavar="RATE", help="Its peak.  [default: by size]")
@click.option(
    "--warmup",
    type=float,
    default=0.03,
    show_default=True,
    metavar="PART",
    help="This first part of the steps warms up.",
)
@click.option(
    "--optimizer",
    type=click.Choice(["muon", "adamw"]),
    default="muon",
    show_default=True,
    help="Muon is for the matrices of the blocks; the rest has AdamW.",
)
@click.option("--weight-decay", type=float, default=0.1, show_default=True, metavar="W")
@click.option("--dropout", type=float, default=0.05, show_default=True, metavar="P")
@patience_flag(5)
@click.option(
    "--keep",
    type=click.Choice(["best", "last"]),
    default="best",
    show_default=True,
    help="Weights of the best held-out loss, or the last.",
)
@click.option(
    "--evaluations",
    type=int,
    default=40,
    show_default=True,
    metavar="N",
    help="Measurements on held-out text over the run.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="auto measures which is faster here.",
)
@place_flags
def command(data: tuple[Path, ...], more: tuple[Path, ...], out: Path, **options: Any) -> int:
    """Train a tokenizer and a GPT-2 on text files.

    \b
    edgelm pretrain --data stories.txt --out stories --size 6M --tokens 12M
    edgelm export stories -o stories-int8
    edgelm run -m stories-int8 "Once upon a time"

    Documents are separated by <|endoftext|>; a file without it is one document. Ctrl-C writes a checkpoint, and the
    same command goes on from there. FOLDER then has report.md and curves.svg too.
    """
    need_training_side("pretrain")
    from edgelm_train.pretrain import pretrain
    from edgelm_train.pretrain_options import PretrainOptions

    options["separator"] = unescaped(options["separator"])
    done = pretrain([*data, *more], out, PretrainOptions(**options), say=say)
    outcome = done.outcome
    if done.report is None:
        return stopped(outcome)
    losses = ", ".join(f"{loss:.4f} in windows of {window}" for window, loss in done.report.held_out.items())
    click.echo(
        f"{out}: held-out loss {losses}; overfitting gap {done.report.gap:.4f}; {outcome.seconds:,.0f} s; "
        f"see {out / 'report.md'}"
    )
    return 0
