"""``edgelm bench``: speed and memory of a bundle on this machine; the last line of output is JSON."""

from statistics import median

import click

from edgelm.cli.options import bundle_argument, device_options, model_option, one_bundle, print_json
from edgelm.errors import ContextError

WARM_UP_RUNS = 1


@click.command(name="bench")
@bundle_argument
@model_option
@device_options
@click.option("--prompt-tokens", type=click.IntRange(1), metavar="N", help="[default: 128, or half a small context]")
@click.option("-n", "--new-tokens", type=click.IntRange(2), metavar="N", help="[default: 64, or the context's rest]")
@click.option("--runs", type=click.IntRange(1, 1000), default=5, show_default=True, metavar="N")
def command(
    bundle: str | None,
    model: str | None,
    device: str,
    threads: int | None,
    prompt_tokens: int | None,
    new_tokens: int | None,
    runs: int,
) -> None:
    """Measure prefill, first token, decode, load time and peak memory; medians over --runs, greedy."""
    import numpy as np

    from edgelm.engine.device import import_onnxruntime
    from edgelm.engine.machine import cpu_name, system_name
    from edgelm.model import load

    loaded = load(one_bundle(bundle, model), device=device, threads=threads)
    session, facts = loaded.session, loaded.bundle.manifest
    prompt_tokens = prompt_tokens or max(1, min(128, session.context_length // 2))
    new_tokens = new_tokens or max(2, min(64, session.context_length + 1 - prompt_tokens))
    if prompt_tokens + new_tokens > session.context_length + 1:
        raise ContextError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit "
            f"this model's context of {session.context_length}"
        )
    prompt = np.random.Generator(np.random.Philox(0)).integers(0, session.vocab_size, prompt_tokens).tolist()
    stats = []
    for _ in range(WARM_UP_RUNS + runs):
        loaded.forget()  # or every run but the first would have the prompt already
        stats.append(loaded.generate(prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=()).stats)
    measured = stats[WARM_UP_RUNS:]
    first_token = median(s.prefill_seconds for s in measured)
    rates = [s.tokens_per_second for s in measured]
    result = {
        "model": facts.source.name,
        "precision": facts.recipe.name,
        "digest": facts.digest,
        "cpu": cpu_name(),
        "system": system_name(),
        "onnxruntime": import_onnxruntime().__version__,
        "device": str(session.device),
        "threads": session.threads,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "runs": runs,
        "prefill_tokens_per_second": median(prompt_tokens / s.prefill_seconds for s in measured),
        "first_token_seconds": first_token,
        "decode_tokens_per_second": median(rates),
        "decode_tokens_per_second_min": min(rates),
        "decode_tokens_per_second_max": max(rates),
        "load_seconds": loaded.load_seconds,
        "peak_rss_bytes": measured[-1].peak_rss_bytes,
    }
    click.echo(f"{facts.source.name} {facts.recipe.name} on {session.device}, {session.threads} threads, {runs} runs")
    click.echo(f"prefill      {result['prefill_tokens_per_second']:10.1f} tokens/s ({prompt_tokens} tokens)")
    click.echo(f"first token  {first_token * 1e3:10.1f} ms")
    click.echo(f"decode       {median(rates):10.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f})")
    click.echo(f"load         {loaded.load_seconds * 1e3:10.1f} ms")
    click.echo(f"peak memory  {measured[-1].peak_rss_bytes / 1e6:10.1f} MB")
    print_json(result)
