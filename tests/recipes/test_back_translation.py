"""Texts that get inputs from a bundle: which ones, and that a stopped translation goes on where it was."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edgelm.errors import PromptError, TrainingError
from edgelm_recipes import back_translation
from edgelm_recipes.back_translation import BackTranslation, back_translated
from edgelm_recipes.recipe import Row
from edgelm_recipes.tasks import RECIPES
from tests.conftest import TINY_BUNDLE

RECIPE = RECIPES["translation-en-de"]


@dataclass
class Translator:
    """A model whose task writes the letters of a text in the other case."""

    asked: list[str] = field(default_factory=list)
    stop_after: int | None = None

    def task(self, text: str) -> str:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(text)
        if len(text) > 20:
            raise PromptError("too long")
        return text.swapcase() if text != "nichts" else " "


def translated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, known: list[Row], translator: Translator
) -> tuple[list[Row], tuple[str, ...]]:
    @contextmanager
    def load(bundle: Path, **options: object) -> Iterator[Translator]:
        yield translator

    monkeypatch.setattr(back_translation, "load", load)
    asked = BackTranslation(folder / "de-en", folder / "de.txt")
    return back_translated(RECIPE, asked, known, folder / "rows.jsonl", 1, lambda share: None)


def test_texts_get_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["ein  Hund", "eine Katze", "", "ein Hund", "ein Haus\r", "nichts", "x" * 21]
    (tmp_path / "de.txt").write_bytes("\n".join(texts).encode())
    known = [{"text": "a cat", "translation": "eine Katze"}]  # of the development part, say
    translator = Translator()
    rows, notes = translated(tmp_path, monkeypatch, known, translator)
    assert rows == [
        {"text": "EIN hUND", "translation": "ein Hund"},
        {"text": "EIN hAUS", "translation": "ein Haus"},
    ]
    assert "eine Katze" not in translator.asked
    assert [note.split(" of ")[0] for note in notes] == ["translated 2 texts", "left out 1 text", "left out 2 texts"]


def test_texts_that_give_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "de.txt").write_text("nichts\neine Katze\n", encoding="utf-8")
    known = [{"text": "a cat", "translation": "eine Katze"}]
    with pytest.raises(TrainingError, match=r"has no line that is new and that .* translates; give other texts"):
        translated(tmp_path, monkeypatch, known, Translator())


def test_a_stopped_translation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["eins", "zwei", "drei", "vier"]
    (tmp_path / "de.txt").write_text("\n".join(texts), encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        translated(tmp_path, monkeypatch, [], Translator(stop_after=2))
    file = tmp_path / "rows.jsonl"
    assert [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()] == ["EINS", "ZWEI"]
    file.write_bytes(file.read_bytes()[:-5])  # as if the machine had fallen
    again = Translator()
    rows, _ = translated(tmp_path, monkeypatch, [], again)
    assert again.asked == ["zwei", "drei", "vier"]
    assert [row["text"] for row in rows] == ["EINS", "ZWEI", "DREI", "VIER"]
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == rows
    (tmp_path / "de.txt").write_text("eins\nfuenf", encoding="utf-8")  # another file by the same name
    other = Translator()
    rows, _ = translated(tmp_path, monkeypatch, [], other)
    assert other.asked == ["fuenf"] and len(file.read_text(encoding="utf-8").splitlines()) == 2


def test_what_cannot_be_translated_back(tmp_path: Path) -> None:
    asked = BackTranslation(TINY_BUNDLE, tmp_path / "de.txt")
    with pytest.raises(TrainingError, match="the recipe similarity does not write a text for one text"):
        asked.check(RECIPES["similarity"])
    with pytest.raises(TrainingError, match=r"has no task that writes a text .* answers of translation-en-de"):
        asked.check(RECIPE)
