"""Whether texts obey random constraints, and what a constraint costs for each token.

    python -m benchmarks.constraints

Texts of the embedded model are drawn at a high temperature under random regular expressions and JSON schemas. Every
text that is finished must be valid by `re` or `jsonschema`; the command ends with status 1 if one is not. Prints a
Markdown table, and one JSON object as its last line.
"""

import argparse
import json
import sys
import time
from collections import Counter
from importlib.metadata import version
from statistics import median
from typing import Any

import edgelm
from edgelm.engine.machine import cpu_name
from edgelm.errors import ConfigError
from tests.text.random_constraints import matches, random_regex, random_schema

Case = edgelm.Regex | edgelm.JsonSchema
TOKENS = 200
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


def microseconds_a_token(model: edgelm.Model, options: dict[str, Any]) -> float:
    """Median time of a token, forced ones included."""
    times = []
    for seed in range(9):
        started = time.perf_counter()
        stats = model.generate("Once upon a time", max_new_tokens=TOKENS, seed=seed, **options).stats
        times.append((time.perf_counter() - started) / max(1, stats.new_tokens))
    return median(times) * 1e6


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
    settings: dict[str, dict[str, Any]] = {
        "no constraint": {"eos_token_id": None},
        "a regular expression (any letters)": {"constraint": edgelm.Regex("(?s:.){2000}"), "eos_token_id": None},
        "a JSON schema": {"constraint": edgelm.JsonSchema(PERSON)},
        "a JSON schema, forced tokens computed one by one": {"constraint": edgelm.JsonSchema(PERSON), "logprobs": 0},
    }
    print("\n| text | µs a token |\n|---|---|")
    for name, options in settings.items():
        facts[name] = microseconds_a_token(model, options)
        print(f"| {name} | {facts[name]:.0f} |")
    print(json.dumps(facts))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
