"""``edgelm bench``: speed and memory of a bundle on this machine."""

from statistics import median

import click

from edgelm.cli.interrupt import ends_at_once
from edgelm.cli.progress import progress
from edgelm.cli.shared import bundle_options, device_options, json_option, print_json, print_table
from edgelm.errors import ContextError

WARM_UP_RUNS = 1


@click.command(name="bench")
@bundle_options
@device_options
@click.option("--prompt-tokens", type=click.IntRange(1), metavar="N", help="[default: 128, or half a small context]")
@click.option("-n", "--new-tokens", type=click.IntRange(2), metavar="N", help="[default: 64, or the context's rest]")
@click.option("--runs", type=click.IntRange(1, 1000), default=5, show_default=True, metavar="N")
@json_option("Print one JSON object instead of text.")
def command(
    place: str,
    device: str,
    threads: int | None,
    prompt_tokens: int | None,
    new_tokens: int | None,
    runs: int,
    as_json: bool,
) -> None:
    """Measure a bundle's speed and memory on this machine.

    Decoding is greedy. The figures are medians over --runs runs; one more run before them warms up.
    """
    with ends_at_once():
        import numpy as np

        from edgelm.engine.device import onnxruntime_version
        from edgelm.engine.machine import cpu_name, system_name
        from edgelm.loading import load

        model = load(place, device=device, threads=threads, draft=False)
    session, manifest = model.session, model.bundle.manifest
    prompt_tokens = prompt_tokens or max(1, min(128, session.context_length // 2))
    new_tokens = new_tokens or max(2, min(64, session.context_length + 1 - prompt_tokens))
    if prompt_tokens + new_tokens > session.context_length + 1:
        raise ContextError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit "
            f"this model's context of {session.context_length}"
        )
    prompt = np.random.Generator(np.random.Philox(0)).integers(0, session.vocab_size, prompt_tokens).tolist()
    stats = []
    with progress("measured") as show:
        for run in range(WARM_UP_RUNS + runs):
            model.forget()  # otherwise only the first run would compute the prompt
            stats.append(model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=()).stats)
            show(f"{run + 1} of {WARM_UP_RUNS + runs} runs")
    measured = stats[WARM_UP_RUNS:]
    prefill_rate = median(prompt_tokens / s.prefill_seconds for s in measured)
    first_token = median(s.prefill_seconds for s in measured)
    rates = [s.tokens_per_second for s in measured]
    peak = measured[-1].peak_rss_bytes
    if as_json:
        print_json(
            {
                "model": manifest.source.name,
                "precision": manifest.recipe.name,
                "digest": manifest.digest,
                "cpu": cpu_name(),
                "system": system_name(),
                "onnxruntime": onnxruntime_version(),
                "device": str(session.device),
                "threads": session.threads,
                "prompt_tokens": prompt_tokens,
                "new_tokens": new_tokens,
                "runs": runs,
                "prefill_tokens_per_second": prefill_rate,
                "first_token_seconds": first_token,
                "decode_tokens_per_second": median(rates),
                "decode_tokens_per_second_min": min(rates),
                "decode_tokens_per_second_max": max(rates),
                "load_seconds": model.load_seconds,
                "peak_rss_bytes": peak,
            }
        )
        return
    spread = f"{min(rates):.1f} to {max(rates):.1f}, " if runs > 1 else ""
    machine = f"{session.device}, {session.threads} threads, ONNX Runtime {onnxruntime_version()}"
    print_table(
        [
            ("bundle", f"{manifest.source.name} {manifest.recipe.name}"),
            ("machine", f"{cpu_name()}, {system_name()}"),
            ("runs", f"{runs} on {machine}"),
            ("prefill", f"{prefill_rate:10.1f} tokens/s ({prompt_tokens} tokens)"),
            ("first token", f"{first_token * 1e3:10.1f} ms"),
            ("decode", f"{median(rates):10.1f} tokens/s ({spread}{new_tokens} tokens)"),
            ("load", f"{model.load_seconds * 1e3:10.1f} ms"),
            ("peak memory", f"{peak / 1e6:10.1f} MB"),
        ]
    )
