"""Sentiment of film reviews by `Model.choose`: a task done by scoring alone.

    python -m benchmarks.sentiment --data ../shared/data/sst2

The folder holds `train.tsv` and `dev.tsv`, a sentence, a tab and 0 or 1 a line (SST-2). Solved examples come from
`train.tsv`, and prompts are tried there (`--split train`): the default one was.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import edgelm
from edgelm.scoring.results import LengthNormalization

TEMPLATE = "{} Tom said it was"
OPTIONS = (" bad.", " good.")

Example = tuple[str, int]
"""A sentence and its label: 0 negative, 1 positive."""


@dataclass(frozen=True, slots=True)
class Task:
    """How a sentence becomes a question."""

    template: str
    """Of the prompt; {} stands for the sentence."""
    options: tuple[str, str]
    """What stands for label 0 and for label 1."""
    shots: tuple[Example, ...]
    """Solved examples that come first."""
    neutral: str | None
    """A sentence that says nothing, to calibrate with."""

    def prompt(self, sentence: str) -> str:
        """The examples, each with its answer, and the sentence without."""
        solved = [self.template.replace("{}", text) + self.options[label] + "\n\n" for text, label in self.shots]
        return "".join(solved) + self.template.replace("{}", sentence)


def read_examples(path: Path) -> list[Example]:
    """The lines of a TSV file."""
    pairs = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [(text.strip(), int(label)) for text, label in pairs]


def draw_shots(examples: list[Example], count: int, seed: int, longest: int) -> tuple[Example, ...]:
    """`count` examples of at most `longest` characters, as many of each label, in random order."""
    generator = random.Random(seed)
    short = [example for example in examples if len(example[0]) <= longest]
    drawn: list[Example] = []
    for label in (0, 1):
        drawn += generator.sample([example for example in short if example[1] == label], (count + 1 - label) // 2)
    generator.shuffle(drawn)
    return tuple(drawn)


def answers(
    model: edgelm.Model, task: Task, examples: list[Example], length_normalization: LengthNormalization
) -> Iterator[int]:
    """The label the model chooses for each example."""
    calibrate = None if task.neutral is None else task.prompt(task.neutral)
    for text, _ in examples:
        found = model.choose(
            task.prompt(text), task.options, length_normalization=length_normalization, calibrate=calibrate
        )
        yield found.index


def main() -> None:
    """Answer every example, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2"), help="default %(default)s")
    parser.add_argument("--model", help="a bundle; the embedded model when not given")
    parser.add_argument("--split", choices=("dev", "train"), default="dev", help="default %(default)s")
    parser.add_argument("--limit", type=int, help="only the first N examples")
    parser.add_argument("--template", default=TEMPLATE, help="{} stands for the sentence; default %(default)r")
    parser.add_argument("--options", nargs=2, default=OPTIONS, help="for negative and positive; default %(default)s")
    parser.add_argument("--shots", type=int, default=0, help="solved examples before each; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="which examples those are")
    parser.add_argument("--neutral", default=None, help="calibrate with this sentence")
    parser.add_argument("--length-normalization", choices=get_args(LengthNormalization), default="none")
    arguments = parser.parse_args()
    train = read_examples(arguments.data / "train.tsv")
    # From the second half, so that prompts may be tried on the first.
    shots = draw_shots(train[len(train) // 2 :], arguments.shots, arguments.seed, longest=80)
    negative, affirmative = arguments.options
    task = Task(arguments.template, (negative, affirmative), shots, arguments.neutral)
    examples = (train if arguments.split == "train" else read_examples(arguments.data / "dev.tsv"))[: arguments.limit]
    model = edgelm.load(arguments.model)
    started = time.perf_counter()
    found = list(answers(model, task, examples, arguments.length_normalization))
    seconds = time.perf_counter() - started
    right = sum(answer == label for answer, (_, label) in zip(found, examples, strict=True))
    positive = sum(label for _, label in examples)
    accuracy = right / len(examples)
    result = {
        "model": model.bundle.manifest.source.name,
        "precision": model.bundle.manifest.recipe.name,
        "digest": model.bundle.manifest.digest,
        "split": arguments.split,
        "examples": len(examples),
        "template": task.template,
        "options": list(task.options),
        "shots": len(shots),
        "seed": arguments.seed,
        "neutral": task.neutral,
        "length_normalization": arguments.length_normalization,
        "accuracy": accuracy,
        "standard_error": (accuracy * (1 - accuracy) / len(examples)) ** 0.5,
        "majority_accuracy": max(positive, len(examples) - positive) / len(examples),
        "share_answered_positive": sum(found) / len(found),
        "sentences_per_second": len(examples) / seconds,
    }
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
