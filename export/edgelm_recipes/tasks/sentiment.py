"""Whether a sentence speaks well or ill of its subject: SST-2."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from edgelm.errors import TrainingError
from edgelm_recipes.recipe import Baseline, Parts, Recipe, Row, Source, read_lines

SOURCE = Source(
    name="SST-2 (Socher et al. 2013), sentences",
    licence="not stated by the source; do not redistribute",
    url="https://github.com/clairett/pytorch-sentiment-classification",
    files=("train.tsv", "dev.tsv"),
)
_LABELS = {"0": "negative", "1": "positive"}
_WORDS = {"negative": "bad", "positive": "good"}


def read(folder: Path) -> Parts:
    """The sentences of ``train.tsv`` and ``dev.tsv``: a sentence, a tab, 0 or 1, in each line."""
    return Parts(_rows(folder, "train.tsv"), _rows(folder, "dev.tsv"))


def natural(text: str) -> str:
    """A sentence as people write it, of one that was cut into tokens: "it 's n't , he said" -> "it's n't, he said"."""
    text = re.sub(r" (n't|'(?:s|re|ve|ll|d|m)\b)", r"\1", text)
    text = re.sub(r" ([,.;:!?%)])", r"\1", text)
    return re.sub(r"(\() ", r"\1", text).strip()


def _rows(folder: Path, name: str) -> tuple[Row, ...]:
    rows = []
    for number, line in enumerate(read_lines(folder, name, SOURCE), 1):
        text, tab, label = line.rpartition("\t")
        if not tab or label.strip() not in _LABELS or not text.strip():
            raise TrainingError(
                f"line {number} of {str(folder / name)!r} must be a sentence, a tab, and 0 or 1; correct it"
            )
        answer = _LABELS[label.strip()]
        rows.append({"text": natural(text), "label": answer, "word": _WORDS[answer]})
    return tuple(rows)


def majority(train: Sequence[Row], dev: Sequence[Row]) -> list[str]:
    """The more common label of the rows to train on, as an answer to everything."""
    label = Counter(row["label"] for row in train).most_common(1)[0][0]
    return [label] * len(dev)


RECIPE = Recipe(
    name="sentiment",
    does="tells whether a sentence of a review is positive or negative",
    source=SOURCE,
    read=read,
    inputs=("text",),
    target="label",
    task={
        "kind": "choose",
        "template": "{text} It was",
        "choices": {"positive": " good", "negative": " bad"},
        "description": "Tells whether a sentence of an English film review is positive or negative.",
    },
    training={"completion": " {word}", "epochs": 3.0, "batch_size": 16},
    metric="accuracy",
    baseline=Baseline("the more common label", majority),
)
