"""``edgelm latent``: texts become vectors of a bundle's latent space, and vectors become texts."""

import json
from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

import click

from edgelm.batch.facts import rounded
from edgelm.cli.generation_flags import GroupedCommand, generation_options, given_options
from edgelm.cli.shared import OpenModel, TextCommand, answer_each, json_line, json_option, model_options
from edgelm.cli.streams import print_line
from edgelm.errors import PromptError, pass_interrupts_on, shown

if TYPE_CHECKING:
    from edgelm.bundle.latent_maps import Vector
    from edgelm.decoding.generation_config import GenerationOptions
    from edgelm.model import Model


class _Command(TextCommand, GroupedCommand):
    """Takes texts, and groups its many options in ``--help``."""


@click.group(name="latent", no_args_is_help=False)
def command() -> None:
    """Work in the latent space of a bundle that `edgelm finetune --latent` and `edgelm export` made.

    A text becomes a vector (encode), and a vector becomes a text (decode). A vector is a JSON list of numbers.

    \b
    edgelm latent encode -m captions-int8 "A dog runs." | edgelm latent decode -m captions-int8
    edgelm latent sample -m captions-int8 --count 5
    edgelm latent interpolate -m captions-int8 "A dog runs." "Two men are cooking."
    """


def _decodes(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a command that writes texts behind vectors: `write` has them all, and `as_json` is ``--json``."""

    @model_options
    @generation_options
    @click.option("--prompt", default="", metavar="TEXT", help="Begin every text with this.")
    @json_option("Print one JSON object per line, with the vector and the text.")
    @wraps(command)
    def with_options(*, open_model: OpenModel, prompt: str, as_json: bool, seed: int | None, **options: Any) -> None:
        names = list(options)
        own = {name: options.pop(name) for name in names if name in ("vector", "count", "a", "b", "steps")}
        chosen = cast("GenerationOptions", given_options(options | {"seed": seed}))

        def write(model: "Model", z: "Vector") -> str:
            """The line of the text behind `z`."""
            completion = model.generate(prompt, latent=z, **chosen)
            text = f"{prompt}{completion}"
            if as_json:
                return json_line({"z": rounded(z), "text": text, "finish_reason": completion.choices[0].finish_reason})
            return " ".join(text.splitlines())

        command(open_model=open_model, write=write, as_json=as_json, seed=seed, **own)

    return with_options


@command.command(name="encode", cls=TextCommand)
@click.argument("text", required=False)
@model_options
def encode(text: str | None, open_model: OpenModel) -> None:
    """Print what the encoder makes of TEXT: a normal distribution of vectors, as a JSON object on one line.

    "mean" is the vector of the text, "log_variance" how uncertain it is, "kl" its divergence from the prior in nats.
    Without TEXT, or with -, every line of standard input is a text.
    """
    model = open_model()
    space = model.latent

    def answer(line: str) -> str:
        found = space.encode(line)
        values = {"mean": rounded(found.mean), "log_variance": rounded(found.log_variance)}
        return json_line({**values, "kl": found.kl_divergence})

    answer_each(text, answer, as_json=True)


@command.command(name="decode", cls=_Command)
@click.argument("vector", required=False)
@_decodes
def decode(
    vector: str | None, open_model: OpenModel, write: "Callable[[Model, Vector], str]", as_json: bool, seed: int | None
) -> None:
    """Print the text that the decoder writes behind VECTOR, on one line.

    VECTOR is a JSON list of numbers, or an object whose "z" or "mean" is such a list, as `encode` and --json print
    them. Without VECTOR, or with -, every line of standard input is a vector.
    """
    model = open_model()
    space = model.latent
    answer_each(vector, lambda line: write(model, space.vector(read_vector(line))), as_json=as_json)


@command.command(name="sample", cls=_Command)
@click.option("--count", type=click.IntRange(1, 100_000), default=1, show_default=True, metavar="N", help="Vectors.")
@_decodes
def sample(
    count: int, open_model: OpenModel, write: "Callable[[Model, Vector], str]", as_json: bool, seed: int | None
) -> None:
    """Draw vectors from the prior, and print the text that the decoder writes behind each, one a line.

    --seed decides the first vector, the next number the next vector, and so on.
    """
    model = open_model()
    space = model.latent
    _print_each(write(model, space.sample(None if seed is None else seed + i)) for i in range(count))


@command.command(name="interpolate", cls=_Command)
@click.argument("a")
@click.argument("b")
@click.option("--steps", type=int, default=5, show_default=True, metavar="N", help="Vectors, both ends included.")
@_decodes
def interpolate(
    a: str,
    b: str,
    steps: int,
    open_model: OpenModel,
    write: "Callable[[Model, Vector], str]",
    as_json: bool,
    seed: int | None,
) -> None:
    """Print the texts on the straight line between the vectors of two texts A and B, one a line.

    A text that is a JSON list of numbers, or an object as for `decode`, is taken as a vector.
    """
    model = open_model()
    ends = [read_vector(end) if end.lstrip()[:1] in ("[", "{") else end for end in (a, b)]
    vectors = model.latent.interpolate(ends[0], ends[1], steps)
    _print_each(write(model, z) for z in vectors)


def _print_each(lines: Iterable[str]) -> None:
    for line in lines:
        print_line(line)


def read_vector(line: str) -> list[float]:
    """The numbers of a vector in JSON; raises PromptError if it is none."""
    expected = 'a vector is a JSON list of numbers, or an object whose "z" or "mean" is one'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        pass_interrupts_on(error)
        raise PromptError(f"{expected}, got {shown(line)}") from None
    if isinstance(value, dict):
        value = value.get("z", value.get("mean"))
    is_numbers = isinstance(value, list) and all(type(number) in (int, float) for number in value)
    if not is_numbers or not value:
        raise PromptError(f"{expected}, got {shown(line)}")
    return cast("list[float]", value)
