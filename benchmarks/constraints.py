"""Whether texts obey random constraints, and what a constraint costs for each token.

    python -m benchmarks.constraints

Texts of the embedded model are drawn at a high temperature under random regular expressions and JSON schemas. Every
text that is finished must be valid by `re` or `jsonschema`; the command ends with status 1 if one is not. Prints
Markdown tables, and one JSON object as its last line.
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
    token: float
    """A token without a constraint, from prompt to text."""


def cost(model: edgelm.Model, constraint: Case) -> Cost:
    """Follow texts of `model` through a constraint, token by token."""
    plain = model.generate("Once upon a time", max_new_tokens=100, eos_token_id=None, seed=0).stats
    readers = [ConstraintReader(model.tokenizer) for _ in range(5)]
    for reader in readers:
        reader.read(edgelm.Choices(["a"]), ())  # reads the vocabulary
    reading, choosing, forced = [], [], []
    logits = np.zeros(model.tokenizer.vocab_size, np.float32)
    for seed, reader in enumerate(readers):
        started = time.perf_counter()
        matcher = reader.read(constraint, ()).matcher
        reading.append(time.perf_counter() - started)
        done = model.generate("Once upon a time", constraint=constraint, max_new_tokens=400, seed=seed)
        row, skipped = RowConstraint(matcher, model.generation_config), 0
        for token in done.choices[0].token_ids:
            if row.forced_token is not None:
                skipped += 1
                row.take(token)
                continue
            started = time.perf_counter()
            row.masked(logits)
            row.take(token)
            choosing.append(time.perf_counter() - started)
        forced.append(100 * skipped / len(done.choices[0].token_ids))
    return Cost(median(reading) * 1e6, median(choosing) * 1e6, median(forced), 1e6 / plain.tokens_per_second)


def main() -> None:
    """Run everything, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regexes", type=int, default=1000, help="how many regular expressions (default 1000)")
    parser.add_argument("--schemas", type=int, default=1000, help="how many JSON schemas (default 1000)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="length of a text (default 200)")
    arguments = parser.parse_args()
    model = edgelm.load()
    groups: dict[str, list[Case]] = {
        "regular expressions": [random_regex(seed) for seed in range(arguments.regexes)],
        "JSON schemas": [edgelm.JsonSchema(random_schema(seed)) for seed in range(arguments.schemas)],
    }
    facts: dict[str, Any] = {"cpu": cpu_name(), "llguidance": version("llguidance")}
    failed = False
    print("| constraints | texts | finished | not valid | cut off | refused |\n|---|---|---|---|---|---|")
    for name, cases in groups.items():
        ends, wrong = obeyed(model, cases, arguments.max_new_tokens)
        finished = ends["eos"] + ends["stop"]
        print(f"| {name} | {len(cases)} | {finished} | {len(wrong)} | {ends['length']} | {ends['refused']} |")
        facts[name] = {"texts": len(cases), "ends": dict(ends), "not_valid": wrong}
        failed |= bool(wrong)
    print(
        "\n| constraint | reading it, µs | choosing a token, µs | forced | a token without it, µs |\n"
        "|---|---|---|---|---|"
    )
    measured: dict[str, Case] = {
        "any 400 characters": edgelm.Regex("(?s:.){400}"),
        "a sentence": edgelm.Regex(r" [A-Z][a-z]+( [a-z]+){5,30}\\."),
        "an object of four fields": edgelm.JsonSchema(PERSON),
    }
    for name, constraint in measured.items():
        one = cost(model, constraint)
        facts[name] = asdict(one)
        print(f"| {name} | {one.reading:.0f} | {one.choosing:.0f} | {one.forced:.0f} % | {one.token:.0f} |")
    print(json.dumps(facts))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
