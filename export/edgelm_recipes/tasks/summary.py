"""A dialogue in a sentence or two: DialogSum."""

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgelm.errors import TrainingError
from edgelm_recipes.recipe import Baseline, Parts, Recipe, Row, Source, one_line, read_lines

SOURCE = Source(
    name="DialogSum (Chen et al. 2021)",
    licence="CC BY-NC-SA 4.0",
    url="https://github.com/cylnlp/dialogsum",
    files=("dialogsum.train.jsonl", "dialogsum.dev.jsonl"),
)
_LEAD_TURNS = 2


def read(folder: Path) -> Parts:
    """The dialogues and summaries of ``dialogsum.train.jsonl`` and ``dialogsum.dev.jsonl``."""
    train, dev = (_rows(folder, name) for name in SOURCE.files)
    return Parts(train, dev)


def parsed(line: str) -> Mapping[str, object]:
    """The object in a line: JSON, or a literal as Python prints it, which the public file has in its place.

    Raises:
        ValueError: it is neither, or no object with texts "dialogue" and "summary".
    """
    try:
        value = json.loads(line)
    except ValueError:
        try:
            value = ast.literal_eval(line)
        except (SyntaxError, MemoryError, RecursionError, TypeError) as error:
            raise ValueError(f"it is neither JSON nor a literal of Python ({error})") from None
    if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in ("dialogue", "summary")):
        raise ValueError('it must be an object with texts "dialogue" and "summary"')
    return value


def _rows(folder: Path, name: str) -> tuple[Row, ...]:
    rows = []
    for number, line in enumerate(read_lines(folder, name, SOURCE), 1):
        if not line.strip():
            continue
        try:
            value = parsed(line)
        except ValueError as error:
            raise TrainingError(f"line {number} of {str(folder / name)!r}: {error!s:.200}; correct it") from None
        turns = [one_line(turn) for turn in str(value["dialogue"]).splitlines()]
        rows.append({"dialogue": "\n".join(turn for turn in turns if turn), "summary": one_line(str(value["summary"]))})
    return tuple(rows)


def leads(train: Sequence[Row], dev: Sequence[Row]) -> list[str]:
    """The first two turns of each dialogue; on the public data they score more than its first two sentences."""
    return [" ".join(row["dialogue"].split("\n")[:_LEAD_TURNS]) for row in dev]


RECIPE = Recipe(
    name="summary",
    does="sums up a conversation in a sentence or two",
    source=SOURCE,
    read=read,
    inputs=("dialogue",),
    target="summary",
    task={
        "kind": "generate",
        "template": "{dialogue}\nSummary:",
        "generation": {"do_sample": False, "max_new_tokens": 96, "stop_strings": ["\n"]},
        "description": "Sums up an English conversation, whose lines begin with #Person1#: and #Person2#:.",
    },
    training={"completion": " {summary}", "epochs": 3.0, "batch_size": 8},
    metric="ROUGE-L",
    baseline=Baseline(f"the first {_LEAD_TURNS} turns", leads),
)
