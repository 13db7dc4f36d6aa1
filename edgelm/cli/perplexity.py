"""``edgelm perplexity``: how surprised the model is by a text."""

from pathlib import Path

import click

from edgelm.cli.lines import answer_each, need_stdout
from edgelm.cli.options import device_options, json_line, model_option, prefix_option
from edgelm.errors import PromptError


@click.command(name="perplexity")
@click.argument("text", required=False)
@model_option
@prefix_option
@device_options
@click.option("--file", type=click.Path(path_type=Path), metavar="PATH", help="Measure this whole file as one text.")
@click.option("--stride", type=int, metavar="N", help="Windows begin every N tokens.  [default: half the context]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
def command(
    text: str | None,
    model: str | None,
    prefix: str | None,
    device: str,
    threads: int | None,
    file: Path | None,
    stride: int | None,
    as_json: bool,
) -> None:
    """Print the perplexity of TEXT, of any length: windows of the model's context slide over it.

    Without TEXT, or with -, every line of standard input is a text.

    \b
    edgelm perplexity "The cat sat on the mat."
    edgelm perplexity --file story.txt --json
    """
    need_stdout()
    if file is not None and text is not None:
        raise click.UsageError("a text and --file are given; give one", click.get_current_context())
    whole = text if file is None else _read(file)

    from edgelm.model import load  # imports numpy and ONNX Runtime: after the cheap checks

    loaded = load(model, device=device, threads=threads, prefix=prefix)

    def answer(one: str) -> str:
        found = loaded.perplexity(one, stride=stride)
        return json_line({"perplexity": found.value, "tokens": found.tokens}) if as_json else f"{found.value:.4f}"

    if file is None:
        answer_each(whole, answer)
    elif whole is not None:
        click.echo(answer(whole))


def _read(path: Path) -> str:
    """Raises PromptError where the file is not UTF-8 text."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{str(path)!r} is not UTF-8 text (byte {error.start})") from None
