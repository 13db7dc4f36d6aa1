"""A recipe's files of examples: rows to train on, rows held out of them, and rows to measure on."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from edgelm.errors import TrainingError
from edgelm_recipes.augment import Augmentation, augmented
from edgelm_recipes.chats import ChatForm
from edgelm_recipes.recipe import Recipe, Row, Turns
from edgelm_train.data.corpus import counted
from edgelm_train.run.folder import saving, write_json

TRAIN, HELD_OUT, DEV, FACTS = "train.jsonl", "held_out.jsonl", "dev.jsonl", "data.json"
_HELD_OUT_SHARE, _HELD_OUT_MOST = 20, 500
"""A twentieth of the rows to train on is held out of them, and at most 500 rows, because measuring takes time."""
Item = TypeVar("Item")
Example = Row | Turns
BackTranslate = Callable[[Sequence[Row]], tuple[list[Row], tuple[str, ...]]]


@dataclass(frozen=True)
class DataFacts:
    """What the files of examples contain; a chat has a row for each answer."""

    train: int
    """Rows to train on, with those that were augmented and translated back."""
    augmented: int
    """Examples, or chats, that were added with changed inputs."""
    held_out: int
    dev: int
    form: str | None
    """How chats are written; None where the rows are not chats."""
    notes: tuple[str, ...]
    back_translated: int = 0
    """Rows whose inputs a bundle wrote."""


def write_data(
    recipe: Recipe,
    folder: Path,
    out: Path,
    *,
    rows: int | None,
    augment: Sequence[Augmentation],
    seed: int,
    form: ChatForm | None = None,
    back_translate: BackTranslate | None = None,
) -> DataFacts:
    """Write the folder `out` with the examples that `recipe` reads out of `folder`.

    Args:
        rows: train on this many examples, spread evenly over the training part; None for all.
        augment: for each, an example with changed inputs is added to each one that is trained on.
        seed: of the changes.
        form: how chats are written, where the recipe is one of chats.
        back_translate: called with the rows of all parts; gives more rows to train on, and notes on them.

    Raises:
        TrainingError: the folder cannot be read, has too few examples, or `out` cannot be written.
    """
    parts = recipe.read(folder)
    known = {_inputs(row, recipe) for row in parts.dev}
    fresh = [row for row in parts.train if _inputs(row, recipe) not in known]
    if len(fresh) < 2 or not parts.dev:
        raise TrainingError(
            f"{str(folder)!r} has {counted(len(fresh), 'example')} to train on and {len(parts.dev):,} to measure on; "
            "at least 2 and 1 are needed"
        )
    notes: tuple[str, ...] = ()
    if repeated := len(parts.train) - len(fresh):
        notes = (f"left out {counted(repeated, 'example')} whose input is in the development part",)
    if rows is not None and rows < len(fresh):
        notes += (f"trained on {rows:,} of {len(fresh):,} examples, the held-out ones included",)
        fresh = spread(fresh, rows)
    count = max(1, min(_HELD_OUT_MOST, len(fresh) // _HELD_OUT_SHARE))
    held_places = set(spread(range(len(fresh)), count))
    held = [row for place, row in enumerate(fresh) if place in held_places]
    train = [row for place, row in enumerate(fresh) if place not in held_places]
    more = [
        changed
        for how in augment
        for place, row in enumerate(train)
        if (changed := _changed(row, recipe, how, f"{seed} {how} {place}")) != row
    ]
    made: list[Row] = []
    if back_translate is not None:
        made, remarks = back_translate([row for row in (*train, *held, *parts.dev) if isinstance(row, dict)])
        notes += remarks
    written = {
        name: [row for item in part for row in _written(item, form)]
        for name, part in {TRAIN: [*train, *more, *made], HELD_OUT: held, DEV: parts.dev}.items()
    }
    counts = {name: len(part) for name, part in written.items()}
    facts = DataFacts(
        train=counts[TRAIN],
        augmented=len(more),
        held_out=counts[HELD_OUT],
        dev=counts[DEV],
        form=None if form is None else form.name,
        notes=notes,
        back_translated=len(made),
    )
    draft = out.with_name(f"{out.name}.part")
    with saving(out.parent):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for name, part in written.items():
            lines = (json.dumps(row, ensure_ascii=False) for row in part)
            (draft / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        write_json(draft / FACTS, asdict(facts))
        draft.rename(out)
    return facts


def read_facts(folder: Path) -> DataFacts:
    """What `write_data` returned."""
    content = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return DataFacts(**{**content, "notes": tuple(content["notes"])})


def spread(items: Sequence[Item], count: int | None) -> list[Item]:
    """`count` of the items, at even distances; all of them for None or a larger count."""
    if count is None or count >= len(items):
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]


def _inputs(row: Example, recipe: Recipe) -> tuple[str, ...]:
    return row if isinstance(row, tuple) else tuple(row[name] for name in recipe.inputs)


def _changed(row: Example, recipe: Recipe, how: Augmentation, seed: str) -> Example:
    if isinstance(row, tuple):  # of a chat, what the assistant answers to
        return tuple(
            turn if number % 2 else augmented(turn, how, f"{seed} {number}") for number, turn in enumerate(row)
        )
    return {**row, **{name: augmented(row[name], how, f"{seed} {name}") for name in recipe.inputs}}


def _written(item: Example, form: ChatForm | None) -> list[Row]:
    if isinstance(item, tuple):
        assert form is not None, "chats need a form"
        return form.written(item)
    return [item]
