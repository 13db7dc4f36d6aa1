"""Sentiment of film reviews by `Model.choose`, a task that needs scoring alone.

    python -m benchmarks.data sst2
    python -m benchmarks.sentiment

The data folder has `train.tsv` and `dev.tsv` (SST-2), with a sentence, a tab and 0 or 1 on each line. Solved examples
are drawn from `train.tsv`. Try prompts there too (`--split train`), as the default prompt was. Prints one JSON object.
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
from benchmarks.data import DEFAULT_OUT
from edgelm.scoring.results import LengthNormalization

TEMPLATE = "{} Tom said it was"
OPTIONS = (" bad.", " good.")

Example = tuple[str, int]
"""A sentence and its label: 0 negative, 1 positive."""


@dataclass(frozen=True, slots=True)
class Task:
    """How a sentence becomes a prompt."""

    template: str
    """Template of the prompt; {} stands for the sentence."""
    options: tuple[str, str]
    """The continuations that stand for label 0 and label 1."""
    shots: tuple[Example, ...]
    """Solved examples that precede the sentence."""
    neutral: str | None
    """Sentence without sentiment, to calibrate with; None does not calibrate."""

    def prompt(self, sentence: str) -> str:
        """The solved examples with their answers, then the sentence without an answer."""
        solved = [self.template.replace("{}", text) + self.options[label] + "\n\n" for text, label in self.shots]
        return "".join(solved) + self.template.replace("{}", sentence)


def read_examples(path: Path) -> list[Example]:
    """The sentences and labels of a TSV file."""
    pairs = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [(text.strip(), int(label)) for text, label in pairs]


def draw_shots(examples: list[Example], count: int, seed: int, longest: int) -> tuple[Example, ...]:
    """Draw solved examples in random order, half of them for each label.

    Args:
        examples: examples to draw from.
        count: number of examples to draw.
        seed: seed of the draw.
        longest: maximum length of a sentence, in characters.
    """
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
    """The label that the model chooses for each example."""
    calibrate = None if task.neutral is None else task.prompt(task.neutral)
    for text, _ in examples:
        choice = model.choose(
            task.prompt(text), task.options, length_normalization=length_normalization, calibrate=calibrate
        )
        yield choice.index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_OUT / "sst2", help="default: data/sst2 of the clone")
    parser.add_argument("--model", help="a bundle; default: the embedded model")
    parser.add_argument("--split", choices=("dev", "train"), default="dev", help="default %(default)s")
    parser.add_argument("--limit", type=int, help="only the first N examples")
    parser.add_argument("--template", default=TEMPLATE, help="{} stands for the sentence; default %(default)r")
    parser.add_argument("--options", nargs=2, default=OPTIONS, help="for negative and positive; default %(default)s")
    parser.add_argument(
        "--shots", type=int, default=0, help="solved examples before each sentence; default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw of solved examples")
    parser.add_argument("--neutral", default=None, help="calibrate with this sentence")
    parser.add_argument("--length-normalization", choices=get_args(LengthNormalization), default="none")
    arguments = parser.parse_args()
    train = read_examples(arguments.data / "train.tsv")
    # Solved examples come from the second half, so that prompts can be tried on the first half.
    shots = draw_shots(train[len(train) // 2 :], arguments.shots, arguments.seed, longest=80)
    negative, affirmative = arguments.options
    task = Task(arguments.template, (negative, affirmative), shots, arguments.neutral)
    examples = (train if arguments.split == "train" else read_examples(arguments.data / "dev.tsv"))[: arguments.limit]
    model = edgelm.load(arguments.model)
    started = time.perf_counter()
    labels = list(answers(model, task, examples, arguments.length_normalization))
    seconds = time.perf_counter() - started
    right = sum(answer == label for answer, (_, label) in zip(labels, examples, strict=True))
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
        "share_answered_positive": sum(labels) / len(labels),
        "sentences_per_second": len(examples) / seconds,
    }
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
