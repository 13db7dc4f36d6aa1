"""``edgelm choose``: which of several texts is likeliest after a prompt."""

from dataclasses import asdict
from typing import cast, get_args

import click

from edgelm.cli.lines import answer_each, need_stdout
from edgelm.cli.options import device_options, json_line, model_option, prefix_option
from edgelm.scoring.results import LengthNormalization


@click.command(name="choose")
@click.argument("prompt", required=False)
@click.option("-o", "--option", "texts", multiple=True, metavar="TEXT", help="What to choose from; at least two.")
@model_option
@prefix_option
@device_options
@click.option(
    "--length-normalization",
    type=click.Choice(get_args(LengthNormalization)),
    default="none",
    show_default=True,
    help="Compare log-probabilities as they are, by token or by character.",
)
@click.option(
    "--calibrate", metavar="TEXT", help="A prompt that says nothing; what options are worth there is subtracted."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line, with every option's probability.")
def command(
    prompt: str | None,
    texts: tuple[str, ...],
    model: str | None,
    prefix: str | None,
    device: str,
    threads: int | None,
    length_normalization: str,
    calibrate: str | None,
    as_json: bool,
) -> None:
    """Print which option the model finds likeliest after PROMPT.

    Without PROMPT, or with -, every line of standard input is one. A space between the prompt and the options
    belongs to either.

    \b
    edgelm choose "Lily was sad. She began to" -o " cry" -o " laugh"
    cat questions.txt | edgelm choose -o " yes" -o " no" --json
    """
    need_stdout()
    if len(texts) < 2:
        raise click.UsageError(
            f"there is nothing to choose: give -o twice at least, got {len(texts)}", click.get_current_context()
        )

    from edgelm.model import load  # imports numpy and ONNX Runtime: after the cheap checks

    loaded = load(model, device=device, threads=threads, prefix=prefix)
    by = cast("LengthNormalization", length_normalization)

    def answer(text: str) -> str:
        found = loaded.choose(text, texts, length_normalization=by, calibrate=calibrate)
        if not as_json:
            return found.best.text
        options = [asdict(option) for option in found.options]
        return json_line({"prompt": text, "best": found.best.text, "index": found.index, "options": options})

    answer_each(prompt, answer)
