"""Facts out of texts as JSON of a schema: whether every answer is valid, and how many are right.

    python -m benchmarks.extraction path/to/smollm2-int4
    python -m benchmarks.extraction path/to/smollm2-int4 --data data/sst2
    python -m benchmarks.extraction

With a bundle the texts are 100 reviews of products that this file writes, whose product, sentiment and stars are known,
behind six solved ones. With `--data` they are the first sentences of `dev.tsv` in a folder of SST-2, whose sentiment is
known. Without a bundle the embedded model reads the stories of `benchmarks/texts`. Answers are greedy. Prints one line
for each text on standard error, a Markdown table, and one JSON object as its last line; the command ends with status 1
if an answer that is finished is not valid by `jsonschema`.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

import edgelm
from benchmarks.data import END_OF_TEXT, HELD_OUT_STORIES
from benchmarks.sentiment import read_examples
from edgelm.engine.machine import cpu_name

SENTIMENTS = ("negative", "neutral", "positive")
REVIEW_SCHEMA = {
    "type": "object",
    "properties": {
        "product": {"type": "string", "minLength": 1, "maxLength": 40},
        "sentiment": {"enum": ["positive", "neutral", "negative"]},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["product", "sentiment", "stars"],
    "additionalProperties": False,
}
STORY_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,11}$"},
        "feels": {"enum": ["happy", "sad", "scared", "angry"]},
        "age": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["name", "feels", "age"],
    "additionalProperties": False,
}
PRODUCTS = """kettle;headphones;office chair;phone case;backpack;desk lamp;coffee grinder;running shoes;keyboard;
umbrella;blender;mattress;garden hose;electric toothbrush;board game;winter jacket;frying pan;alarm clock;water bottle;
vacuum cleaner"""
OPINIONS = (
    (1, "The {} broke after two days, and nobody answered when I asked for my money back. Terrible, do not buy it."),
    (2, "I expected more of this {}. It works now and then, but it feels cheap and I am disappointed."),
    (3, "The {} is okay. It does what it should, nothing more. Some things are good, others are not."),
    (4, "I like the {} a lot. It is solid and easy to use; only the delivery was a little slow."),
    (5, "Absolutely wonderful {}! I use it every day, it is the best I ever had, and I would buy it again at once."),
)
SHOTS = (
    ("The watch stopped after a week. Awful.", "watch", "negative", 1),
    ("A good lawn mower. It cuts well, though it is a bit loud.", "lawn mower", "positive", 4),
    (
        "The toaster burns everything, and then it stopped working. I want my money back.",
        "toaster",
        "negative",
        1,
    ),
    ("What a lovely tent. We spent a week in the rain and stayed dry. Perfect!", "tent", "positive", 5),
    ("This bicycle is a disappointment: it is heavy and the brakes are weak.", "bicycle", "negative", 2),
    ("The curtains are fine. Not great, not bad.", "curtains", "neutral", 3),
)
"""Solved reviews: text, product, sentiment, stars."""
STORY_PROMPT = """Once upon a time, there was a little girl named Lily. She loved to play with her toys. One day, she \
lost her doll. She was very sad. Her name was {{"name":"Lily","feels":"sad","age":3}}

{} Her name was """

Answer = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A text, and what is right about its answer."""

    text: str
    checks: dict[str, Callable[[Answer], bool]]
    """By the name of what is right; each gets a valid answer."""


def written_reviews() -> list[Case]:
    """100 reviews: each product with each opinion."""
    names = [name.strip() for name in PRODUCTS.split(";")]
    return [_review(opinion.format(name), name, stars) for name in names for stars, opinion in OPINIONS]


def _review(text: str, product: str, stars: int) -> Case:
    sentiment = "negative" if stars < 3 else "positive" if stars > 3 else "neutral"
    return Case(
        text,
        {
            "product": lambda answer: answer["product"].lower() == product,
            "sentiment": lambda answer: answer["sentiment"] == sentiment,
            "stars": lambda answer: answer["stars"] == stars,
            "stars within 1": lambda answer: abs(answer["stars"] - stars) <= 1,
            "stars fit the sentiment": _stars_fit,
        },
    )


def _stars_fit(answer: Answer) -> bool:
    return bool(SENTIMENTS[(answer["stars"] > 2) + (answer["stars"] > 3)] == answer["sentiment"])


def film_reviews(folder: Path, count: int) -> list[Case]:
    """The first sentences of SST-2's `dev.tsv`."""
    examples = read_examples(folder / "dev.tsv")[:count]
    return [_film_review(text, label) for text, label in examples]


def _film_review(text: str, label: int) -> Case:
    sentiment = "positive" if label else "negative"
    return Case(
        text,
        {
            "sentiment": lambda answer: answer["sentiment"] == sentiment,
            "sentiment, where it is not neutral": lambda answer: answer["sentiment"] in (sentiment, "neutral"),
            "stars fit the sentiment": _stars_fit,
        },
    )


def stories(count: int) -> list[Case]:
    """The beginnings of held-out stories, about 300 characters each."""
    texts = [text.strip() for text in HELD_OUT_STORIES.read_text(encoding="utf-8").split(END_OF_TEXT)]
    short = [" ".join(text.split())[:300].rpartition(".")[0] + "." for text in texts if text]
    return [_story(text) for text in short[:count] if len(text) > 40]


def _story(text: str) -> Case:
    return Case(text, {"the name is in the story": lambda answer: answer["name"] in text.replace(".", " ").split()})


def review_prompt(text: str) -> str:
    """Six solved reviews, and the review."""
    solved = (
        (review, {"product": product, "sentiment": sentiment, "stars": stars})
        for review, product, sentiment, stars in SHOTS
    )
    examples = (f"Review: {review}\nJSON: {json.dumps(answer, separators=(',', ':'))}\n\n" for review, answer in solved)
    return f"{''.join(examples)}Review: {text}\nJSON: "


def story_prompt(text: str) -> str:
    """A solved story, and the story."""
    return STORY_PROMPT.format(text)


def extracted(
    model: edgelm.Model,
    prompt: Callable[[str], str],
    cases: list[Case],
    schema: dict[str, Any],
    max_new_tokens: int,
) -> dict[str, Any]:
    """Answer every case under `schema`; returns counts, rates, seconds, and the answers that are wrong in form."""
    validator, constraint = Draft202012Validator(schema), edgelm.JsonSchema(schema)
    ends, right, values, invalid = Counter[str](), Counter[str](), Counter[str](), list[str]()
    tokens, started = 0, time.perf_counter()
    for case in cases:
        done = model.generate(prompt(case.text), constraint=constraint, do_sample=False, max_new_tokens=max_new_tokens)
        reason = done.choices[0].finish_reason
        ends[reason] += 1
        tokens += done.stats.new_tokens
        print(f"{done.text}  <- {case.text[:90]}", file=sys.stderr)
        if reason not in ("eos", "stop"):
            continue
        try:
            answer = json.loads(done.text)
            validator.validate(answer)
        except Exception as error:  # whatever is wrong is what this benchmark looks for
            invalid.append(f"{done.text!r}: {str(error).splitlines()[0]}")
            continue
        values[next(str(value) for name, value in answer.items() if name in ("sentiment", "feels"))] += 1
        right.update(name for name, check in case.checks.items() if check(answer))
    names = dict.fromkeys(name for case in cases for name in case.checks)
    seconds = time.perf_counter() - started
    return {
        "texts": len(cases),
        "finished": ends["eos"] + ends["stop"],
        "cut_off": len(cases) - ends["eos"] - ends["stop"],
        "invalid": invalid,
        "right": {name: right[name] for name in names},
        "answers": dict(values),
        "new_tokens": tokens,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Extract, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, help="a bundle; by default the embedded model")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="take reviews from SST-2's dev.tsv in FOLDER")
    parser.add_argument("--threads", type=int, help="threads of the model")
    parser.add_argument("--texts", type=int, default=100, help="how many texts (default 100)")
    parser.add_argument("--max-new-tokens", type=int, default=60, help="length of an answer (default 60)")
    arguments = parser.parse_args()
    if arguments.texts < 1:
        parser.error("--texts must be at least 1")
    if arguments.bundle is None and arguments.data is not None:
        parser.error("--data needs a bundle")
    try:
        model = edgelm.load(arguments.bundle, threads=arguments.threads)
        if arguments.bundle is None:
            cases, prompt, schema = stories(arguments.texts), story_prompt, STORY_SCHEMA
        elif arguments.data is None:
            # Every opinion comes as often, also in a part of the reviews.
            cases, prompt, schema = (
                list(islice(cycle(written_reviews()), arguments.texts)),
                review_prompt,
                REVIEW_SCHEMA,
            )
        else:
            cases, prompt, schema = film_reviews(arguments.data, arguments.texts), review_prompt, REVIEW_SCHEMA
        facts = extracted(model, prompt, cases, schema, arguments.max_new_tokens)
    except (OSError, edgelm.EdgelmError) as error:
        sys.exit(f"extraction: {error}")
    columns = {
        "texts": facts["texts"],
        "valid": facts["finished"] - len(facts["invalid"]),
        "not valid": len(facts["invalid"]),
        "cut off": facts["cut_off"],
        **facts["right"],
    }
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n| {' | '.join(map(str, columns.values()))} |")
    print(json.dumps({"cpu": cpu_name(), "model": model.bundle.path.name, **facts}))
    sys.exit(1 if facts["invalid"] else 0)


if __name__ == "__main__":
    main()
