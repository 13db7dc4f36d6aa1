"""Short descriptions of pictures, between English and German or French: Multi30k."""

from collections.abc import Sequence
from pathlib import Path

from edgelm.errors import TrainingError
from edgelm_recipes.recipe import Baseline, Parts, Recipe, Row, Source, one_line, read_lines

_LANGUAGES = {"en": "English", "de": "German", "fr": "French"}


def _read(folder: Path, languages: tuple[str, str], source: Source) -> Parts:
    """The pairs of lines in the ``train`` and ``val`` files of both languages."""
    train, dev = (_rows(folder, part, languages, source) for part in ("train", "val"))
    return Parts(train, dev)


def _rows(folder: Path, part: str, languages: tuple[str, str], source: Source) -> tuple[Row, ...]:
    names = [f"{part}.{language}" for language in languages]
    texts, translations = (read_lines(folder, name, source) for name in names)
    if len(texts) != len(translations):
        raise TrainingError(
            f"{str(folder / names[0])!r} has {len(texts):,} lines and {names[1]} has {len(translations):,}; "
            "line N of one must be the translation of line N of the other"
        )
    pairs = zip(texts, translations, strict=True)
    return tuple({"text": one_line(a), "translation": one_line(b)} for a, b in pairs if a.strip() and b.strip())


def copied(train: Sequence[Row], dev: Sequence[Row]) -> list[str]:
    """The source itself as the translation."""
    return [row["text"] for row in dev]


def _recipe(spoken: str, wanted: str) -> Recipe:
    """The recipe that translates out of the language `spoken` into the language `wanted`, by their codes."""
    source = Source(
        name="Multi30k (Elliott et al. 2016)",
        licence="for research only, as its pictures from Flickr",
        url="https://github.com/multi30k/dataset",
        files=(f"train.{spoken}", f"train.{wanted}", f"val.{spoken}", f"val.{wanted}"),
    )
    language = _LANGUAGES[wanted]
    return Recipe(
        name=f"translation-{spoken}-{wanted}",
        does=f"translates short {_LANGUAGES[spoken]} sentences into {language}",
        source=source,
        read=lambda folder: _read(folder, (spoken, wanted), source),
        inputs=("text",),
        target="translation",
        task={
            "kind": "generate",
            "template": f"{_LANGUAGES[spoken]}: {{text}}\n{language}:",
            "generation": {"do_sample": False, "max_new_tokens": 96, "stop_strings": ["\n"]},
            "description": f"Translates a short {_LANGUAGES[spoken]} description into {language}.",
        },
        training={
            "completion": " {translation}",
            "epochs": 3.0,
            "batch_size": 16,
        },
        metric="BLEU",
        baseline=Baseline("copying the source", copied),
    )


RECIPES = tuple(_recipe(*pair) for pair in (("en", "de"), ("en", "fr"), ("de", "en"), ("fr", "en")))
