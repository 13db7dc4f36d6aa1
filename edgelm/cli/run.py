"""``edgelm run``: a prompt and its continuation on stdout, all else on stderr."""

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import click

from edgelm.cli.generation_flags import GroupedCommand, generation_options, given_options
from edgelm.cli.options import device_options, model_option, prefix_option, print_json
from edgelm.errors import PromptError

if TYPE_CHECKING:
    from edgelm.decoding.generation_options import GenerationOptions
    from edgelm.generation.results import Chunk, Stats
    from edgelm.model import Model
    from edgelm.reuse.state import PromptState


@click.command(name="run", cls=GroupedCommand)
@click.argument("prompt", required=False)
@model_option
@generation_options
@prefix_option
@device_options
@click.option("--no-echo", is_flag=True, help="Print the continuation without the prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--logprobs", type=int, metavar="N", help="With --json: log-probabilities, and N likeliest tokens.")
@click.option("--state", metavar="FILE", help="Keep the computed prompt here; prompts that begin like it start faster.")
@click.option("--stats", is_flag=True, help="Print times and memory on stderr.")
def command(
    prompt: str | None,
    model: str | None,
    prefix: str | None,
    device: str,
    threads: int | None,
    no_echo: bool,
    as_json: bool,
    state: str | None,
    stats: bool,
    **options: Any,
) -> None:
    """Continue PROMPT; without PROMPT, or with -, read it from standard input.

    \b
    edgelm run "Once upon a time"
    edgelm run --greedy -n 20 "Lily went to"
    echo "One day" | edgelm run --no-echo --seed 7
    """
    if sys.stdout is None:
        raise click.ClickException("standard output is closed: there is nowhere to write the text")
    if options["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json: text has no place for them", click.get_current_context())
    text = _read_stdin() if prompt is None or prompt == "-" else prompt
    given = cast("GenerationOptions", given_options(options))

    from edgelm.model import load  # imports numpy and ONNX Runtime: after the cheap checks

    loaded = load(model, device=device, threads=threads, prefix=prefix)
    kept = None if state is None or not os.path.lexists(state) else loaded.load_state(state)
    if as_json:
        completion = loaded.generate(text, **given)
        final = completion.stats
        print_json({**_model_facts(loaded), **asdict(completion)})
    else:
        final = _print_stream(loaded.stream(text, **given), None if no_echo else text)
    if state is not None and final.dropped_tokens:
        click.echo("edgelm: the prompt is longer than the context, so its state is not kept", err=True)
    elif state is not None:
        _keep_state(loaded, state, text, kept)
    if stats:
        click.echo(_stats_line(final, loaded), err=True)


def _keep_state(model: "Model", path: str, prompt: str, kept: "PromptState | None") -> None:
    """Save the prompt's state, behind the text of a prefix, where there is none or the prompt goes on from it."""
    if kept is None:
        model.save_state(path, prompt)
        return
    text = model.tokenizer.decode(kept.ids, skip_special_tokens=True)
    whole = prompt if model.prefix is None or model.prefix.text is None else f"{model.prefix.text}{prompt}"
    if whole == text:
        return
    if whole.startswith(text):
        model.save_state(path, prompt)
    elif not text.startswith(whole):
        click.echo(f"edgelm: the prompt does not go on from what {path!r} holds, which stays as it is", err=True)


def _read_stdin() -> str:
    if sys.stdin is None:
        raise PromptError("standard input is closed: give the prompt as an argument")
    if sys.stdin.isatty():
        click.echo("edgelm: reading the prompt from the terminal; end it with Ctrl-D (Ctrl-Z on Windows)", err=True)
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not UTF-8 text (byte {error.start})") from None
    # `echo` and editors end a text with a newline nobody meant to be continued.
    return text.removesuffix("\n").removesuffix("\r")


def _print_stream(chunks: "Iterator[Chunk]", echo: str | None) -> "Stats":
    """Print each row as it comes, a blank line between rows; nothing is printed before the first token is there."""
    final: Stats | None = None
    row = -1
    for chunk in chunks:
        if chunk.index != row:
            row = chunk.index
            sys.stdout.write("\n" if row else "")
            sys.stdout.write(echo or "")
        sys.stdout.write(chunk.text)
        if chunk.finish_reason is not None:
            sys.stdout.write("\n")
        sys.stdout.flush()
        final = chunk.stats or final
    assert final is not None  # the last chunk always carries them
    return final


def _model_facts(model: "Model") -> dict[str, object]:
    manifest = model.bundle.manifest
    return {
        "model": str(model.bundle.path),
        "digest": manifest.digest,
        "precision": manifest.recipe.name,
        "device": str(model.session.device),
        "threads": model.session.threads,
    }


def _stats_line(stats: "Stats", model: "Model") -> str:
    drafts = f" ({stats.accepted_tokens} of {stats.drafted_tokens} drafted)" if stats.drafted_tokens else ""
    reused = f" ({stats.reused_tokens} reused)" if stats.reused_tokens else ""
    prefix = f"prefix {stats.prefix_tokens} tok | " if stats.prefix_tokens else ""
    return (
        f"{prefix}prompt {stats.prompt_tokens} tok{reused} in {stats.prefill_seconds * 1e3:.0f} ms | "
        f"{stats.new_tokens} tok{drafts}, {stats.tokens_per_second:.1f} tok/s | load {stats.load_seconds:.2f} s | "
        f"peak {stats.peak_rss_bytes / 1e6:.0f} MB | {model.session.device}, {model.session.threads} threads"
    )
