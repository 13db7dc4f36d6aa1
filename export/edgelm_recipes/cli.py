"""The command ``edgelm recipe``. This file loads without torch."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import click

from edgelm.bundle.manifest import FixedPrecision
from edgelm.cli.interrupt import unwinds
from edgelm.cli.progress import percent, progress
from edgelm.cli.shared import print_wrapped
from edgelm.cli.streams import escaped, note, print_line
from edgelm.errors import TrainingError, install_hint
from edgelm_recipes.augment import Augmentation
from edgelm_recipes.back_translation import BackTranslation
from edgelm_recipes.order import Order
from edgelm_recipes.recipe import Recipe
from edgelm_recipes.tasks import RECIPES
from edgelm_train.options import Device, Method

_FILE = click.Path(path_type=Path)
_NEEDED = ("torch", "transformers", "tokenizers", "accelerate", "tensorboard", "matplotlib", "peft", "optimum", "onnx")
_MEASURING = ("sacrebleu", "rouge_score", "scipy")


def _list(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        for recipe in RECIPES.values():
            print_line(recipe.name)
            for line in _description(recipe):
                print_wrapped(f"  {line}")
        ctx.exit()


def _description(recipe: Recipe) -> list[str]:
    source = recipe.source
    return [
        f"{recipe.does}; {recipe.metric}, beside {recipe.baseline.name}",
        f"data: {source.name}: {', '.join(source.files)}",
        f"from {source.url}; licence: {source.licence}",
    ]


@click.command(name="recipe")
@click.argument("name", type=click.Choice(list(RECIPES)), metavar="NAME")
@click.option("--list", is_flag=True, expose_value=False, is_eager=True, callback=_list, help="Show every recipe.")
@click.option("--data", required=True, type=_FILE, metavar="FOLDER", help="The files of the recipe's data set.")
@click.option(
    "-o", "--out", required=True, type=_FILE, metavar="FOLDER", help="Output folder: new, or with a run to go on with."
)
@click.option("--base", default="gpt2", show_default=True, metavar="CHECKPOINT", help="Folder or hub id to tune.")
@click.option(
    "--method",
    type=click.Choice(get_args(Method)),
    default="full",
    show_default=True,
    help="Train all weights, an adapter, or a prefix for one bundle of the base.",
)
@click.option(
    "--precision",
    type=click.Choice([name for name in get_args(FixedPrecision) if name not in ("fp32", "fp16")]),
    default="int8",
    show_default=True,
    help="Of the quantized bundle, which is measured beside one in fp32.",
)
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=_FILE,
    metavar="BUNDLE",
    help="A bundle of the base that is at hand, quantized or fp32, for --method prefix. Repeatable.",
)
@click.option(
    "--augment",
    multiple=True,
    type=click.Choice(get_args(Augmentation)),
    help="Also train on copies with words of the input exchanged, or left out. Repeatable.",
)
@click.option(
    "--back-translate",
    type=(_FILE, _FILE),
    metavar="BUNDLE FILE",
    help="Also train on each line of FILE as an answer. BUNDLE, which works the other way round, writes its input.",
)
@click.option("--rows", type=click.IntRange(3), metavar="N", help="Train on N examples only.")
@click.option("--limit", type=click.IntRange(2), metavar="N", help="Measure on N examples only.")
@click.option("--epochs", type=float, metavar="N", help="Passes over the data.  [default: the recipe's]")
@click.option("--batch-size", type=int, metavar="N", help="Examples in a step.  [default: the recipe's]")
@click.option("--learning-rate", type=float, metavar="RATE", help="Peak learning rate.  [default: by method and width]")
@click.option("--seed", type=int, metavar="N", help="Seed of all random numbers.  [default: 0]")
@click.option("--device", type=click.Choice(get_args(Device)), help="Where to train.  [default: auto]")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    metavar="N",
    help="CPU threads on which bundles are measured.",
)
def command(
    name: str,
    data: Path,
    out: Path,
    base: str,
    method: Method,
    precision: FixedPrecision,
    bundles: tuple[Path, ...],
    augment: tuple[Augmentation, ...],
    back_translate: tuple[Path, Path] | None,
    rows: int | None,
    limit: int | None,
    threads: int,
    **tuning: Any,
) -> int:
    """Make a measured bundle out of the files of a public data set, as the recipe NAME says.

    \b
    edgelm recipe --list
    edgelm recipe sentiment --data sst2 --out sentiment
    edgelm run -m sentiment/bundle "I loved it"

    The steps are: examples (data), tuning (tuned), a bundle in fp32 and a quantized one (bundles), their scores and
    that of a trivial baseline on the development part (scores), and the quantized bundle with its task and its score
    (bundle). report.md and report.json say what came out. Ctrl-C stops, and the same command goes on from there.
    """
    missing = [package for package in _NEEDED if find_spec(package) is None]
    measuring = [package for package in _MEASURING if find_spec(package) is None]
    if missing or measuring:
        hint = install_hint("cpu,train,evaluate" if measuring else "cpu,train")
        raise TrainingError(f"recipe needs {', '.join([*missing, *measuring])}; {hint}")
    given = {option: value for option, value in tuning.items() if value is not None}
    order = Order(
        recipe=RECIPES[name],
        data=data,
        out=out,
        base=base,
        method=method,
        precision=precision,
        rows=rows,
        limit=limit,
        augment=augment,
        back_translation=None if back_translate is None else BackTranslation(*back_translate),
        tuning=given,
        bundles=bundles,
        threads=threads,
        command=shlex.join(["edgelm", *sys.argv[1:]]),
    )
    order.check()  # before torch is loaded, which takes seconds
    with unwinds() as raise_again:

        def say(line: str) -> None:
            raise_again()
            note(f"edgelm: {line}")

        @contextmanager
        def watch(what: str) -> Iterator[Any]:
            with progress(what) as show:
                yield percent(show)

        say("loading torch and transformers ...")
        from edgelm_recipes.make import make

        made = make(order, say, watch)
    if made.report is None:
        say("stopped; the same command goes on from there")
        return 128 + made.signal
    click.echo(escaped(f"{out}: {made.report.summary}; see {out / 'report.md'}"))
    return 0
