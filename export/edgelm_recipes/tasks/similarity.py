"""How alike two sentences are in meaning: the STS benchmark."""

import csv
import io
import math
from pathlib import Path

from edgelm.errors import TrainingError
from edgelm_recipes.recipe import Baseline, Parts, Recipe, Row, Source, one_line, read_file

SOURCE = Source(
    name="STS benchmark (Cer et al. 2017), English part of stsb_multi_mt",
    licence="CC BY-SA 4.0",
    url="https://github.com/PhilipMay/stsb-multi-mt",
    files=("stsb-en-train.csv", "stsb-en-dev.csv"),
)
_HIGHEST_SCORE = 5


def read(folder: Path) -> Parts:
    """The pairs of ``stsb-en-train.csv`` and ``stsb-en-dev.csv``: two sentences and a score, without a header."""
    train, dev = (_rows(folder, name) for name in SOURCE.files)
    return Parts(train, dev)


def _rows(folder: Path, name: str) -> tuple[Row, ...]:
    reader = csv.reader(io.StringIO(read_file(folder, name, SOURCE), newline=""), strict=True)
    rows = []
    try:
        for values in reader:
            if not values:
                continue
            try:
                first, second, score = values
                number = float(score)
            except ValueError:
                number = math.nan
            if not 0 <= number <= _HIGHEST_SCORE or not first.strip() or not second.strip():
                raise TrainingError(
                    f"line {reader.line_num} of {str(folder / name)!r} must be two sentences and a score from 0 to "
                    f"{_HIGHEST_SCORE}, separated by commas; correct it"
                )
            rows.append({"first": one_line(first), "second": one_line(second), "score": score.strip()})
    except csv.Error as error:
        raise TrainingError(
            f"line {reader.line_num} of {str(folder / name)!r} is no CSV: {error}; correct it"
        ) from None
    return tuple(rows)


RECIPE = Recipe(
    name="similarity",
    does="tells how alike two sentences are in meaning",
    source=SOURCE,
    read=read,
    inputs=("first", "second"),
    target="score",
    task={
        "kind": "embed",
        "template": "{first}",
        "second_template": "{second}",
        "pooling": "mean",
        "description": "Tells how alike two English sentences are in meaning: the cosine of their vectors.",
    },
    training={
        "similarity": "score",
        "epochs": 4.0,
        "batch_size": 32,
    },
    metric="Spearman",
    baseline=Baseline("the base before tuning", None),
)
