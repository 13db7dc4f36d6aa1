"""``edgelm score``: the log-probability of a text after another."""

from dataclasses import asdict

import click

from edgelm.cli.lines import answer_each, need_stdout
from edgelm.cli.options import device_options, json_line, model_option, prefix_option
from edgelm.errors import PromptError


@click.command(name="score")
@click.argument("prompt", required=False)
@click.argument("continuation", required=False)
@model_option
@prefix_option
@device_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line, with every token.")
def command(
    prompt: str | None,
    continuation: str | None,
    model: str | None,
    prefix: str | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Print the log-probability (in nats) of CONTINUATION after PROMPT.

    Without CONTINUATION, or with -, every line of standard input is one; without PROMPT too, every line is a prompt,
    a tab and a continuation. A space between the two belongs to either.

    \b
    edgelm score "Once upon a time" ", there was"
    cat endings.txt | edgelm score "Once upon a"
    """
    need_stdout()

    from edgelm.model import load  # imports numpy and ONNX Runtime: after the cheap checks

    loaded = load(model, device=device, threads=threads, prefix=prefix)

    def answer(line: str) -> str:
        before, after = _parts(line) if prompt is None else (prompt, line)
        found = loaded.score(before, after)
        if not as_json:
            return f"{found.logprob:.6f}"
        return json_line({"prompt": before, "continuation": after, **asdict(found)})

    answer_each(continuation, answer)


def _parts(line: str) -> tuple[str, str]:
    """Raises PromptError where a line has not one tab."""
    parts = line.split("\t")
    if len(parts) != 2:
        raise PromptError(f"a line must be a prompt, a tab and a continuation, got {len(parts) - 1} tabs")
    return parts[0], parts[1]
