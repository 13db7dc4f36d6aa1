"""Short descriptions of pictures, from English into German or French: Multi30k."""

from collections.abc import Sequence
from pathlib import Path

from edgelm.errors import TrainingError
from edgelm_recipes.recipe import Baseline, Parts, Recipe, Row, Source, one_line, read_lines


def _read(folder: Path, language: str, source: Source) -> Parts:
    """The pairs of lines in ``train.en``, ``val.en`` and the files of the other language."""
    train, dev = (_rows(folder, part, language, source) for part in ("train", "val"))
    return Parts(train, dev)


def _rows(folder: Path, part: str, language: str, source: Source) -> tuple[Row, ...]:
    english, other = (read_lines(folder, f"{part}.{name}", source) for name in ("en", language))
    if len(english) != len(other):
        raise TrainingError(
            f"{str(folder / f'{part}.en')!r} has {len(english):,} lines and {part}.{language} has {len(other):,}; "
            "line N of one must be the translation of line N of the other"
        )
    pairs = zip(english, other, strict=True)
    return tuple({"text": one_line(a), "translation": one_line(b)} for a, b in pairs if a.strip() and b.strip())


def copied(train: Sequence[Row], dev: Sequence[Row]) -> list[str]:
    """The source itself as the translation."""
    return [row["text"] for row in dev]


def _recipe(code: str, language: str) -> Recipe:
    source = Source(
        name="Multi30k (Elliott et al. 2016)",
        licence="for research only, as its pictures from Flickr",
        url="https://github.com/multi30k/dataset",
        files=("train.en", f"train.{code}", "val.en", f"val.{code}"),
    )
    return Recipe(
        name=f"translation-en-{code}",
        does=f"translates short English sentences into {language}",
        source=source,
        read=lambda folder: _read(folder, code, source),
        inputs=("text",),
        target="translation",
        task={
            "kind": "generate",
            "template": f"English: {{text}}\n{language}:",
            "generation": {"do_sample": False, "max_new_tokens": 96, "stop_strings": ["\n"]},
            "description": f"Translates a short English description into {language}.",
        },
        training={
            "completion": " {translation}",
            "epochs": 3.0,
            "batch_size": 16,
        },
        metric="BLEU",
        baseline=Baseline("copying the source", copied),
    )


GERMAN = _recipe("de", "German")
FRENCH = _recipe("fr", "French")
