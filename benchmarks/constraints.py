"""Whether texts obey random constraints, and what a constraint costs for each token.

    python -m benchmarks.constraints
    python -m benchmarks.constraints --bundle path/to/bundle --regexes 0 --schemas 0

Texts of the embedded model are drawn at a high temperature under random regular expressions and JSON schemas. Every
text that is finished must be valid by `re` or `jsonschema`; the command ends with status 1 if one is not. What a
constraint costs is measured in turns with texts without one. Prints Markdown tables, and one JSON object as its last
line.
"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np

import edgelm
from edgelm.decoding.constraint import RowConstraint
from edgelm.engine.machine import cpu_name
from edgelm.errors import ConfigError
from edgelm.text.token_matcher import ConstraintReader
from tests.text.random_constraints import matches, random_regex, random_schema

Case = edgelm.Regex | edgelm.JsonSchema
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 3, "maxItems": 6},
        "story": {"type": "string", "minLength": 200, "maxLength": 400},
    },
    "required": ["name", "age", "likes", "story"],
    "additionalProperties": False,
}


def obeyed(model: edgelm.Model, cases: list[Case], max_new_tokens: int) -> tuple[Counter[str], list[str]]:
    """How the texts of `cases` ended, and those that are finished but not valid."""
    ends, wrong = Counter[str](), list[str]()
    with model.scheduler(max_waiting=len(cases)) as scheduler:
        waiting = []
        for seed, case in enumerate(cases):
            try:
                submission = scheduler.submit(
                    "Once upon a time", constraint=case, seed=seed, temperature=1.5, max_new_tokens=max_new_tokens
                )
            except ConfigError as error:
                ends["refused"] += 1
                print(f"refused: {error}", file=sys.stderr)
                continue
            waiting.append((case, submission))
        for case, submission in waiting:
            choice = submission.completion().choices[0]
            ends[choice.finish_reason] += 1
            if choice.finish_reason in ("eos", "stop") and not matches(case, choice.text):
                wrong.append(f"{case} gave {choice.text!r}")
    return ends, wrong


@dataclass(frozen=True)
class Cost:
    """What one constraint costs, medians over texts; times in microseconds."""

    reading: float
    """Once, before the first text."""
    choosing: float
    """Masking the logits of a token and noting it: for each token that is chosen."""
    forced: float
    """Share of tokens that need no logits, in percent."""
    plain_token: float
    """A token without a constraint, from prompt to text."""
    token: float
    """A token with it, forced ones included."""
    overhead: float
    """`choosing` in percent of `plain_token`: the median of pairs of texts, one after the other."""


def cost(model: edgelm.Model, constraint: Case) -> Cost:
    """Follow texts of `model` through a constraint, token by token, each beside a text without it."""
    # A constraint needs a token that ends a text. Models with random weights have none.
    ends = () if model.generation_config.eos_token_id else (model.tokenizer.vocab_size - 1,)
    readers = [ConstraintReader(model.tokenizer) for _ in range(5)]
    for reader in readers:
        reader.read(edgelm.Choices(["a"]), ends)  # reads the vocabulary
    reading, choosing, forced, plain, obeying, overhead = [], [], [], [], [], []
    logits = np.zeros(model.tokenizer.vocab_size, np.float32)
    model.generate("Once upon a time", max_new_tokens=8)
    for seed, reader in enumerate(readers):
        stats = model.generate(
            "Once upon a time", max_new_tokens=40, eos_token_id=None, do_sample=True, seed=seed
        ).stats
        plain.append(1e6 / stats.tokens_per_second)
        started = time.perf_counter()
        matcher = reader.read(constraint, ends).matcher
        reading.append(time.perf_counter() - started)
        done = model.generate(
            "Once upon a time",
            constraint=constraint,
            max_new_tokens=80,
            do_sample=True,
            seed=seed,
            eos_token_id=ends or model.generation_config.eos_token_id,
        )
        obeying.append(1e6 / done.stats.tokens_per_second)
        row, skipped, masking = RowConstraint(matcher, model.generation_config), 0, list[float]()
        for token in done.choices[0].token_ids:
            if row.forced_token is not None:
                skipped += 1
                row.take(token)
                continue
            started = time.perf_counter()
            row.masked(logits)
            row.take(token)
            masking.append(time.perf_counter() - started)
        choosing += masking
        overhead.append(100e6 * median(masking) / plain[-1])
        forced.append(100 * skipped / len(done.choices[0].token_ids))
    return Cost(
        reading=median(reading) * 1e6,
        choosing=median(choosing) * 1e6,
        forced=median(forced),
        plain_token=median(plain),
        token=median(obeying),
        overhead=median(overhead),
    )


def main() -> None:
    """Run everything, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regexes", type=int, default=1000, help="how many regular expressions (default 1000)")
    parser.add_argument("--schemas", type=int, default=1000, help="how many JSON schemas (default 1000)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="length of a text (default 200)")
    parser.add_argument("--bundle", metavar="FOLDER", help="the model; by default the embedded one")
    parser.add_argument("--threads", type=int, help="threads of the model")
    arguments = parser.parse_args()
    try:
        model = edgelm.load(arguments.bundle, threads=arguments.threads)
    except edgelm.EdgelmError as error:
        sys.exit(f"constraints: {error}")
    groups: dict[str, list[Case]] = {
        "regular expressions": [random_regex(seed) for seed in range(arguments.regexes)],
        "JSON schemas": [edgelm.JsonSchema(random_schema(seed)) for seed in range(arguments.schemas)],
    }
    started = time.perf_counter()
    ConstraintReader(model.tokenizer).read(edgelm.Choices(["a"]), model.generation_config.eos_token_id or (0,))
    vocabulary_seconds = time.perf_counter() - started
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "llguidance": version("llguidance"),
        "model": model.bundle.path.name,
        "vocabulary_seconds": round(vocabulary_seconds, 3),
    }
    failed = False
    print("| constraints | texts | finished | not valid | cut off | refused |\n|---|---|---|---|---|---|")
    for name, cases in groups.items():
        ends, wrong = obeyed(model, cases, arguments.max_new_tokens)
        finished = ends["eos"] + ends["stop"]
        print(f"| {name} | {len(cases)} | {finished} | {len(wrong)} | {ends['length']} | {ends['refused']} |")
        facts[name] = {"texts": len(cases), "ends": dict(ends), "not_valid": wrong}
        failed |= bool(wrong)
    print(
        f"\nThe vocabulary of {model.tokenizer.vocab_size:,} tokens is read once, in {vocabulary_seconds:.2f} s.\n\n"
        "| constraint | reading it, µs | choosing a token, µs | forced | a token without it, µs | choosing, of that | "
        "a token with it, µs |\n|---|---|---|---|---|---|---|"
    )
    measured: dict[str, Case] = {
        "any 400 characters": edgelm.Regex("(?s:.){400}"),
        "a sentence": edgelm.Regex(r" [A-Z][a-z]+( [a-z]+){5,30}\."),
        "an object of four fields": edgelm.JsonSchema(PERSON),
    }
    for name, constraint in measured.items():
        one = cost(model, constraint)
        facts[name] = asdict(one)
        print(
            f"| {name} | {one.reading:.0f} | {one.choosing:.0f} | {one.forced:.0f} % | {one.plain_token:.0f} | "
            f"{one.overhead:.1f} % | {one.token:.0f} |"
        )
    print(json.dumps(facts))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
