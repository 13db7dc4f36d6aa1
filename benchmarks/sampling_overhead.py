"""Time to choose a token from logits, for every decoding method at GPT-2's vocabulary size.

    python -m benchmarks.sampling_overhead

Covers processors, filters and the draw. Prints a Markdown table of medians in microseconds, and one JSON object as its
last line. There are two kinds of logits. "text" has probabilities that fall with the rank as those of words do (Zipf).
"flat" is normally distributed with a standard deviation of 3, which leaves thousands of tokens in a nucleus and is the
worst case.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from benchmarks.machine import machine_facts
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.logits_processors import process, processors_of
from edgelm.decoding.logprobs import log_softmax
from edgelm.decoding.sampling import TokenChoice, largest
from edgelm.ids import IdArray, Logits

VOCABULARY = 50_257
PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.2, "frequency_penalty": 0.1}

METHODS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k=40": {"top_k": 40},
    "top_p=0.95": {"top_p": 0.95},
    "min_p=0.05": {"min_p": 0.05},
    "top_k=40, top_p=0.95, min_p=0.05": {"top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "temperature=0.8, top_k, top_p, min_p with penalties": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        **PENALTIES,
    },
    "temperature=0.8, top_p=0.95 with penalties": {"temperature": 0.8, "top_p": 0.95, **PENALTIES},
    "temperature=0.8, min_p=0.05 with penalties": {"temperature": 0.8, "min_p": 0.05, **PENALTIES},
    "typical_p=0.9": {"typical_p": 0.9},
    "epsilon_cutoff=0.0003": {"epsilon_cutoff": 3e-4},
    "eta_cutoff=0.0003": {"eta_cutoff": 3e-4},
    "top_n_sigma=1": {"top_n_sigma": 1.0},
    "xtc_probability=1": {"xtc_probability": 1.0},
    "mirostat_tau=5": {"mirostat_tau": 5.0},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "no_repeat_ngram_size=3": {"no_repeat_ngram_size": 3},
    "dry_multiplier=0.8": {"dry_multiplier": 0.8, "dry_sequence_breakers": [198, 25, 1, 9]},
    "200 bad words, 200 biases": {
        "bad_words_ids": [[i, i + 1] for i in range(200)],
        "logit_bias": dict.fromkeys(range(200), -1.0),
    },
}


def text_logits(rng: np.random.Generator) -> Logits:
    """Log-probabilities that fall with 1.5 times the logarithm of the rank, in random order."""
    ranks = rng.permutation(VOCABULARY) + 1
    return (-1.5 * np.log(ranks) + rng.normal(size=VOCABULARY) * 0.3).astype(np.float32)


def flat_logits(rng: np.random.Generator) -> Logits:
    """Normally distributed logits with a standard deviation of 3."""
    return (rng.normal(size=VOCABULARY) * 3).astype(np.float32)


def chooser(options: dict[str, Any], ids: IdArray) -> Callable[[Logits, int], object]:
    """A function (logits, step) that chooses one token with these options.

    Args:
        options: generation options.
        ids: token ids of the text so far.
    """
    config = GenerationConfig().updated(options)
    processors = processors_of(config, 64, VOCABULARY)
    choose = TokenChoice(config, seed=0, row=0)
    return lambda logits, step: choose(process(processors, ids, logits), step)


def four_beams(logits: Logits, step: int) -> object:
    """The work of a step with four beams: four log-softmaxes, and the best eight continuations of each beam."""
    return [largest(log_softmax(logits, np.float32), 8) for _ in range(4)]


def microseconds(call: Callable[[Logits, int], object], rows: list[Logits], runs: int) -> float:
    """Median time of a call over `runs` calls, in microseconds."""
    taken = []
    for step in range(runs + 10):
        logits = rows[step % len(rows)]
        started = time.perf_counter()
        call(logits, step)
        taken.append(time.perf_counter() - started)
    return median(taken[10:]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the time to choose a token from logits.")
    parser.add_argument("--runs", type=int, default=500, metavar="N", help="of each method; default %(default)s")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="text so far; default %(default)s")
    parser.add_argument("--step-ms", type=float, default=3.5, metavar="MS", help="a model's step; default %(default)s")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.3, options.tokens), VOCABULARY - 1).astype(np.int64)
    kinds = {name: [make(rng) for _ in range(8)] for name, make in (("text", text_logits), ("flat", flat_logits))}
    calls = {name: chooser(given, ids) for name, given in METHODS.items()} | {"num_beams=4": four_beams}
    results = {
        name: {kind: round(microseconds(call, rows, options.runs), 1) for kind, rows in kinds.items()}
        for name, call in calls.items()
    }
    print(f"| method | µs, text | % of {options.step_ms} ms | µs, flat | % |\n|---|--:|--:|--:|--:|")
    for name, times in results.items():
        cells = [f"{times[kind]:.0f} | {times[kind] / options.step_ms / 10:.1f}" for kind in kinds]
        print(f"| {name} | {' | '.join(cells)} |")
    print()
    print(json.dumps({**vars(options), "machine": machine_facts(), "microseconds": results}))


if __name__ == "__main__":
    main()
