"""Which rows are trained on, and how inputs are changed; a row of the development part is never trained on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.errors import TrainingError
from edgelm.text.messages import ChatMessage
from edgelm_recipes.augment import augmented
from edgelm_recipes.chats import ChatForm
from edgelm_recipes.data import DEV, HELD_OUT, TRAIN, read_facts, spread, write_data
from edgelm_recipes.recipe import Parts, Row
from edgelm_recipes.tasks import RECIPES


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_parts_do_not_overlap(tmp_path: Path) -> None:
    def row(number: int) -> Row:
        return {"text": f"the {number} word of a row", "label": "positive", "word": "good"}

    parts = Parts(tuple(row(n) for n in range(100)), tuple(row(n) for n in range(95, 105)))
    recipe = replace(RECIPES["sentiment"], read=lambda folder: parts)
    written = write_data(recipe, tmp_path, tmp_path / "data", rows=80, augment=("swap",), seed=0)
    assert written == read_facts(tmp_path / "data")
    train, held, dev = (rows(tmp_path / "data" / name) for name in (TRAIN, HELD_OUT, DEV))
    assert (written.train, written.augmented, written.held_out, written.dev) == (152, 76, 4, 10)
    assert (len(train), len(held), len(dev)) == (152, 4, 10)
    assert dev == list(parts.dev)
    used = [*train[:76], *held]
    assert len({one["text"] for one in used}) == 80 and not [one for one in used if one in dev]
    for before, after in zip(train[:76], train[76:], strict=True):
        assert sorted(before["text"].split()) == sorted(after["text"].split()) and before != after
        assert before["label"] == after["label"]
    assert any("5 examples whose input is in the development part" in note for note in written.notes)
    assert any("80 of 95 examples" in note for note in written.notes)
    write_data(recipe, tmp_path, tmp_path / "again", rows=80, augment=("swap",), seed=0)
    assert rows(tmp_path / "again" / TRAIN) == train
    with pytest.raises(TrainingError, match="has 1 example to train on and 10 to measure on"):
        few = replace(recipe, read=lambda folder: replace(parts, train=parts.train[:1]))
        write_data(few, tmp_path, tmp_path / "few", rows=None, augment=(), seed=0)
    assert not (tmp_path / "few").exists()


def test_chats_become_a_row_for_each_answer(tmp_path: Path) -> None:
    def prompt(messages: object) -> str:
        return "".join(f"{one['role'][0]}:{one['content']}|" for one in cast("list[ChatMessage]", messages))

    form = ChatForm("labels", prompt, " ", "\n")
    assert form.written(("a b", "c", "d", "e", "f")) == [
        {"prompt": "u:a b|", "completion": " c\n", "answer": " c", "message": "a b"},
        {"prompt": "u:a b|a:c|u:d|", "completion": " e\n", "answer": " e", "message": "d"},
    ]
    chats = tuple((f"one {n} two", f"answer {n}") for n in range(30))
    recipe = replace(RECIPES["chat"], read=lambda folder: Parts(chats, (("x", "y"),)))
    facts = write_data(recipe, tmp_path, tmp_path / "data", rows=None, augment=("swap",), seed=0, form=form)
    assert (facts.form, facts.train, facts.augmented, facts.held_out, facts.dev) == ("labels", 58, 29, 1, 1)
    train = rows(tmp_path / "data" / TRAIN)
    assert [one["answer"] for one in train[:29]] == [one["answer"] for one in train[29:]]
    assert all(before["prompt"] != after["prompt"] for before, after in zip(train[:29], train[29:], strict=True))


@given(st.text(), st.text())
def test_augmentation(text: str, seed: str) -> None:
    swapped, dropped = augmented(text, "swap", seed), augmented(text, "drop", seed)
    assert swapped == augmented(text, "swap", seed)
    assert sorted(swapped.split()) == sorted(text.split())
    assert swapped.count("\n") == dropped.count("\n") == text.count("\n")
    left = iter(text.split())
    assert all(word in left for word in dropped.split())  # in the order of the text
    assert bool(dropped.split()) == bool(text.split())


def test_how_many_words_change() -> None:
    words = [str(n) for n in range(1000)]
    swapped = augmented(" ".join(words), "swap", "0").split()
    assert 150 < sum(a != b for a, b in zip(words, swapped, strict=True)) <= 200  # 100 exchanges
    assert 860 < len(augmented(" ".join(words), "drop", "0").split()) < 940


@given(st.lists(st.integers(), max_size=30), st.integers(1, 40))
def test_spread(items: list[int], count: int) -> None:
    chosen = spread(items, count)
    assert len(chosen) == min(count, len(items))
    assert spread(items, None) == items
    places = spread(range(len(items)), count)
    assert places == sorted(set(places))
