"""``edgelm embed``: a text as a vector."""

from typing import cast, get_args

import click

from edgelm.cli.lines import answer_each, need_stdout
from edgelm.cli.options import device_options, json_line, model_option, prefix_option
from edgelm.scoring.results import Pooling


@click.command(name="embed")
@click.argument("text", required=False)
@model_option
@prefix_option
@device_options
@click.option(
    "--pooling",
    type=click.Choice(get_args(Pooling)),
    default="mean",
    show_default=True,
    help="The mean of all tokens' hidden states, or the last token's.",
)
@click.option("--normalize", is_flag=True, help="Scale the vector to length 1.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
def command(
    text: str | None,
    model: str | None,
    prefix: str | None,
    device: str,
    threads: int | None,
    pooling: str,
    normalize: bool,
    as_json: bool,
) -> None:
    """Print TEXT as a vector: the model's last hidden states, pooled; numbers on a line, with spaces between.

    Without TEXT, or with -, every line of standard input is a text.

    \b
    edgelm embed --normalize "A dog ran."
    cat sentences.txt | edgelm embed --json
    """
    need_stdout()

    from edgelm.model import load  # imports numpy and ONNX Runtime: after the cheap checks

    loaded = load(model, device=device, threads=threads, prefix=prefix)
    by = cast("Pooling", pooling)

    def answer(one: str) -> str:
        vector = loaded.embed(one, pooling=by, normalize=normalize)
        # Nine digits tell every float32 apart.
        numbers = [f"{value:.9g}" for value in vector.tolist()]
        return json_line({"embedding": [float(number) for number in numbers]}) if as_json else " ".join(numbers)

    answer_each(text, answer)
