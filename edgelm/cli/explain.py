"""``edgelm explain``: how likely each token of a text was, what else could have come, and where attention looked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.shared import (
    OpenModel,
    TextCommand,
    check_output_file,
    json_option,
    model_options,
    print_json,
    print_table,
    read_prompt,
)
from edgelm.cli.streams import note

if TYPE_CHECKING:
    from edgelm.model import Model
    from edgelm.scoring.explanation import Explanation
    from edgelm.scoring.results import TokenLogprob

PICTURES = (".html", ".svg")
"""Endings of the files that can be written."""
_DIGITS = 6
"""Of a share in JSON, behind the point."""


@click.command(name="explain", cls=TextCommand)
@click.argument("text", required=False)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Write a page (FILE.html) or a picture (FILE.svg) with the attention; replaces an existing file.",
)
@click.option("--top", type=int, default=5, show_default=True, metavar="N", help="Likeliest tokens at each place.")
@model_options
@json_option("Print one JSON object, with the attention of every layer and head.")
def command(text: str | None, output: str | None, top: int, open_model: OpenModel, as_json: bool) -> None:
    """Show what the model made of TEXT: how likely each token was, and what else could have come.

    Without -o and --json, print a table. A page and a picture also show the attention, which says how much each token
    took from those before it. The page needs no other file and no network. Without TEXT, or with -, read it from
    standard input.

    \b
    edgelm explain "Once upon a time, there was a little girl"
    edgelm explain "Once upon a time" -o page.html
    edgelm run "One day" | edgelm explain -o page.svg
    """
    if output is not None:
        if Path(output).suffix.lower() not in PICTURES:
            click.get_current_context().fail(f"-o {output!r} must end in {' or '.join(PICTURES)}")
        check_output_file(output)
    content = read_prompt() if text is None or text == "-" else text
    model = open_model()
    explanation = _explained(model, content, top, output)
    if output is not None:
        _write(output, explanation, model.bundle.name)
    if as_json:
        print_json(_json(explanation, model))
    elif output is None:
        print_table([("token", "probability", "likeliest in its place"), *_rows(explanation)])


def _explained(model: "Model", text: str, top: int, output: str | None) -> "Explanation":
    from edgelm.pictures.explanation_data import MAX_PAGE_ATTENTION_BYTES

    if output is None:
        return model.explain(text, top=top)
    return model.explain(text, top=top, max_attention_bytes=MAX_PAGE_ATTENTION_BYTES)


def _write(output: str, explanation: "Explanation", model: str) -> None:
    from edgelm.bundle.whole_file import write_whole_file
    from edgelm.pictures.explanation_html import html_page
    from edgelm.pictures.explanation_svg import svg_picture

    target = Path(output)
    draw: Callable[[Explanation, str], str] = html_page if target.suffix.lower() == ".html" else svg_picture
    content = draw(explanation, model).encode("utf-8", "replace")  # a token of half a character
    write_whole_file(target, content)
    note(f"{output}: {len(content) / 1e3:,.0f} kB")


def _rows(explanation: "Explanation") -> list[tuple[str, str, str]]:
    """The rows of the table: every token, and what could come next."""
    from edgelm.pictures.shares import percent, visible

    def likeliest(top: "Sequence[TokenLogprob]") -> str:
        return ", ".join(f"{visible(one.text)} {percent(math.exp(one.logprob))}" for one in top)

    rows = [
        (visible(token.text), "" if token.logprob is None else percent(math.exp(token.logprob)), likeliest(token.top))
        for token in explanation.tokens
    ]
    return [*rows, ("(what comes next)", "", likeliest(explanation.following))]


def _json(explanation: "Explanation", model: "Model") -> dict[str, object]:
    """All of an explanation. A token's row of attention ends with its own share: the rest would be zeros."""
    before = explanation.prefix_tokens + 1
    return {
        "model": str(model.bundle.path),
        "tokens": [asdict(token) for token in explanation.tokens],
        "following": [asdict(token) for token in explanation.following],
        "prefix_tokens": explanation.prefix_tokens,
        "attentions": [
            [
                [[round(share, _DIGITS) for share in row[: before + t].tolist()] for t, row in enumerate(head)]
                for head in layer
            ]
            for layer in explanation.attentions
        ],
    }
