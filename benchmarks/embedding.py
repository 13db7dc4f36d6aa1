"""Batches, restored states and prompt lookup, each compared with generating without it.

    python -m benchmarks.embedding [--work DIR]

Run `python -m benchmarks.prepare` first: it makes the models, which have random weights of GPT-2's shape. Prints
Markdown tables of medians over interleaved rounds, with minimum and maximum in brackets, and one JSON object as its
last line. Progress goes to stderr. Nothing is downloaded.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np

import edgelm
from benchmarks.machine import machine_facts
from benchmarks.make_gpt2 import add_shape_options, shape_of
from benchmarks.prepare import DEFAULT_WORK, model_folder
from edgelm.model import Model
from edgelm.text.prompts import Prompt

RECIPES = ("int8", "int4")
ROWS = 8
PROMPT_TOKENS, NEW_TOKENS, STATE_TOKENS = 128, 64, 512
WIDTHS = (4, 8)
FORCED_LOGIT = 1e9
REPETITIVE = "Tom said: run, dog, run. The dog ran. Tom said: run, dog, run. The dog ran. Tom said:"
ORDINARY = "Once upon a time there was a little girl who lived near the forest."

Times = dict[str, list[float]]


def measured(ways: dict[str, Callable[[], float]], rounds: int) -> Times:
    """The value of each way in each round; the first round is a warm-up and does not count."""
    values: Times = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            value = way()
            if number:
                values[name].append(value)
    return values


def batch_ways(model: Model, rng: np.random.Generator) -> dict[str, Callable[[], float]]:
    """Tokens per second: decoding one text, decoding 1 to `ROWS` texts together, and in whole calls."""
    vocabulary = model.session.vocab_size
    lengths = np.linspace(PROMPT_TOKENS // 2, PROMPT_TOKENS * 3 // 2, ROWS).astype(int)
    prompts: list[Prompt] = [rng.integers(0, vocabulary, n).tolist() for n in lengths]
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    invariant = edgelm.load(model.bundle.path, device="cpu", threads=model.session.threads, batch_invariant=True)

    def decode_one(model: Model) -> float:
        model.forget()
        return model.generate(prompts[ROWS // 2], **options).stats.tokens_per_second

    def decode_together(rows: int) -> float:
        session = model.session
        session.reset()
        batch = session.empty_batch(rows)
        for prompt in prompts[:rows]:
            session.reset()
            session.step(np.asarray(prompt))
            session.copy_into(batch)
        tokens = [1] * rows
        started = time.perf_counter()
        for _ in range(NEW_TOKENS):
            logits = batch.step(tokens)
            tokens = logits.argmax(axis=1).tolist()
        return rows * NEW_TOKENS / (time.perf_counter() - started)

    def calls_one_by_one() -> float:
        started = time.perf_counter()
        for prompt in prompts:
            model.forget()
            model.generate(prompt, **options)
        return ROWS * NEW_TOKENS / (time.perf_counter() - started)

    def call_together() -> float:
        model.forget()
        started = time.perf_counter()
        model.generate_batch(prompts, max_rows=ROWS, **options)
        return ROWS * NEW_TOKENS / (time.perf_counter() - started)

    return {
        "one text, decoding": lambda: decode_one(model),
        "one text, batch invariant": lambda: decode_one(invariant),
        "1 row of a batch": lambda: decode_together(1),
        "2 rows": lambda: decode_together(2),
        "4 rows": lambda: decode_together(4),
        f"{ROWS} rows": lambda: decode_together(ROWS),
        f"{ROWS} calls of generate": calls_one_by_one,
        f"generate_batch of {ROWS}": call_together,
    }


def state_ways(model: Model, rng: np.random.Generator, folder: Path) -> dict[str, Callable[[], float]]:
    """Milliseconds to the first new token of a prompt whose first `STATE_TOKENS` tokens were seen earlier."""
    prefix = rng.integers(0, model.session.vocab_size, STATE_TOKENS).tolist()
    prompt = [*prefix, 5, 6, 7, 8]
    for name in ("float32", "float16"):
        model.save_state(folder / name, prefix, dtype=name)

    def first_token(prepare: Callable[[], object]) -> float:
        model.forget()
        started = time.perf_counter()
        prepare()
        model.generate(prompt, max_new_tokens=1, do_sample=False)
        return 1e3 * (time.perf_counter() - started)

    def reused() -> float:
        model.generate([*prefix, 9, 9], max_new_tokens=1, do_sample=False)
        started = time.perf_counter()
        model.generate(prompt, max_new_tokens=1, do_sample=False)
        return 1e3 * (time.perf_counter() - started)

    return {
        "computed": lambda: first_token(lambda: None),
        "state read from a file, float32": lambda: first_token(lambda: model.load_state(folder / "float32")),
        "state read from a file, float16": lambda: first_token(lambda: model.load_state(folder / "float16")),
        "prefix of the previous call": reused,
    }


def lookup_ways(model: Model, rng: np.random.Generator) -> dict[str, Callable[[], float]]:
    """Tokens per second of decoding with drafts that are always accepted, never accepted, or looked up.

    A processor forces the text that plain decoding gave. Without it, checking several tokens at once would change the
    last bits of the logits, and those of random weights are so close together that another text would follow.
    """
    prompt = rng.integers(0, model.session.vocab_size, PROMPT_TOKENS).tolist()
    expected = [*prompt, *model.generate(prompt, max_new_tokens=2 * NEW_TOKENS, do_sample=False).choices[0].token_ids]

    def forced(ids: Any, logits: Any) -> Any:
        logits[expected[len(ids)]] = FORCED_LOGIT
        return logits

    def rate(width: int | None, guess: Callable[[Any, int], list[int]] | None = None) -> float:
        model.forget()
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "logits_processor": forced}
        with mock.patch("edgelm.decoding.prompt_lookup.continuation", guess) if guess else mock.patch("os.sep", "/"):
            completion = model.generate(prompt, prompt_lookup_num_tokens=width, **options)
        return completion.stats.tokens_per_second

    def right(ids: Any, count: int) -> list[int]:
        return expected[len(ids) : len(ids) + max(1, count)]

    def wrong(ids: Any, count: int) -> list[int]:
        return [(token + 1) % model.session.vocab_size for token in right(ids, count)]

    def right_if_single(ids: Any, count: int) -> list[int]:
        return wrong(ids, count) if count > 1 else right(ids, count)

    return {
        "no drafts": lambda: rate(None),
        **{f"all drafts accepted, width {width}": lambda width=width: rate(width, right) for width in WIDTHS},  # type: ignore[misc]
        "no draft accepted": lambda: rate(8, wrong),
        "single guesses accepted, drafts never": lambda: rate(8, right_if_single),
        "drafts looked up in the text": lambda: rate(8),
    }


def story_facts(rounds: int) -> dict[str, dict[str, float]]:
    """How often drafts are accepted in stories of the embedded model, and the speed that gains."""
    model, facts = edgelm.load(device="cpu", threads=2), dict[str, dict[str, float]]()
    for name, prompt in (("repetitive", REPETITIVE), ("ordinary", ORDINARY)):
        for kind, sampling in (("greedy", {"do_sample": False}), ("sampled", {"temperature": 0.8, "top_p": 0.95})):
            options: dict[str, Any] = {**sampling, "max_new_tokens": 200, "eos_token_id": ()}
            drafted = accepted = 0
            ratios = []
            for seed in range(rounds):
                plain = model.generate(prompt, **options, seed=seed).stats
                fast = model.generate(prompt, **options, seed=seed, prompt_lookup_num_tokens=8).stats
                drafted, accepted = drafted + fast.drafted_tokens, accepted + fast.accepted_tokens
                ratios.append(fast.tokens_per_second / plain.tokens_per_second)
            facts[f"{name}, {kind}"] = {
                "drafted_per_100_tokens": 100 * drafted / (200 * rounds),
                "accepted_share": accepted / drafted if drafted else 0.0,
                "speed": median(ratios),
            }
    return facts


def table(title: str, unit: str, results: dict[str, Times]) -> str:
    """A Markdown table with a row for each way. `x` is the median over the rounds of the ratio to the first way."""
    rows = [f"| {title} | {' | '.join(f'{recipe} {unit} | x' for recipe in results)} |"]
    rows.append("|---" * (1 + 2 * len(results)) + "|")
    for name in next(iter(results.values())):
        cells = []
        for times in results.values():
            own, base = times[name], next(iter(times.values()))
            ratio = median(a / b for a, b in zip(own, base, strict=True))
            cells.append(f"{median(own):.1f} ({min(own):.1f}-{max(own):.1f}) | {ratio:.2f}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure batches, restored states and prompt lookup.")
    parser.add_argument(
        "--work", type=Path, default=DEFAULT_WORK, metavar="DIR", help="has the models; default %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="after the warm-up; default %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default %(default)s")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    add_shape_options(parser)
    options = parser.parse_args()
    results: dict[str, dict[str, Times]] = {"batch": {}, "state": {}, "lookup": {}}
    for recipe in options.recipes:
        folder = model_folder(options.work, shape_of(options), f"edgelm-{recipe}")
        model = edgelm.load(folder, device="cpu", threads=options.threads)
        rng = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as states:
            kinds = {
                "batch": batch_ways(model, rng),
                "state": state_ways(model, rng, Path(states)),
                "lookup": lookup_ways(model, rng),
            }
            for kind, ways in kinds.items():
                print(f"measuring {recipe}: {kind}", file=sys.stderr)
                results[kind][recipe] = measured(ways, options.rounds)
    print(table("batches", "tokens/s", results["batch"]), end="\n\n")
    print(table(f"first token after {STATE_TOKENS} known tokens", "ms", results["state"]), end="\n\n")
    print(table("prompt lookup", "tokens/s", results["lookup"]), end="\n\n")
    stories = story_facts(options.rounds)
    print("| stories-6m int8, width 8 | drafted per 100 tokens | accepted | speed x |\n|---|---|---|---|")
    for name, facts in stories.items():
        print(
            f"| {name} | {facts['drafted_per_100_tokens']:.1f} | {facts['accepted_share']:.0%} | {facts['speed']:.2f} |"
        )
    print()
    print(json.dumps({"machine": machine_facts(), "rounds": options.rounds, **results, "stories": stories}))


if __name__ == "__main__":
    main()
