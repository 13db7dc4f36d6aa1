"""Readers of the public files: rows of hand-made files, and what is wrong with broken ones, in one sentence."""

from pathlib import Path

import pytest

from edgelm.errors import TrainingError
from edgelm_recipes.tasks import RECIPES, sentiment, similarity, summary
from tests.recipes.conftest import DEV, TRAIN, write_data_sets

FOLDERS = {
    "sentiment": "sst2",
    "translation-en-de": "multi30k",
    "translation-en-fr": "multi30k",
    "translation-de-en": "multi30k",
    "translation-fr-en": "multi30k",
    "summary": "dialogsum",
    "similarity": "stsb",
    "chat": "self_dialogue.jsonl",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_is_read(name: str, tmp_path: Path) -> None:
    write_data_sets(tmp_path)
    parts = RECIPES[name].read(tmp_path / FOLDERS[name])
    assert (len(parts.train), len(parts.dev)) == ((87, 3) if name == "chat" else (TRAIN, DEV))
    for row in (*parts.train, *parts.dev):
        if isinstance(row, dict):
            recipe = RECIPES[name]
            assert row[recipe.target] and all(row[column] for column in recipe.inputs)


@pytest.mark.parametrize(
    ("cut", "natural"),
    [
        (
            "they presume their audience wo n't sit still , however",
            "they presume their audience won't sit still, however",
        ),
        ("it 's so ( very ) good !", "it's so (very) good!"),
        ("the men ' club", "the men ' club"),
        ("rock 'n roll", "rock 'n roll"),
    ],
)
def test_sentences_are_written_as_people_write_them(cut: str, natural: str) -> None:
    assert sentiment.natural(cut) == natural


def test_a_row_of_each_kind(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("so dull\t0\na joy\t1\nit 's fine\t1\n", encoding="utf-8")
    (tmp_path / "dev.tsv").write_bytes(b"a\ttab inside\t0\r\n")
    parts = sentiment.read(tmp_path)
    assert parts.train[0] == {"text": "so dull", "label": "negative", "word": "bad"}
    assert parts.dev == ({"text": "a\ttab inside", "label": "negative", "word": "bad"},)
    rows = [row for row in parts.train if isinstance(row, dict)]
    assert sentiment.majority(rows, [{"text": "x"}] * 2) == ["positive", "positive"]
    (tmp_path / "stsb-en-train.csv").write_text('"A man, singing.","He said ""hi"".",3.8\n', encoding="utf-8")
    (tmp_path / "stsb-en-dev.csv").write_text("a,b,0\n\n", encoding="utf-8")
    assert similarity.read(tmp_path).train == ({"first": "A man, singing.", "second": 'He said "hi".', "score": "3.8"},)
    python = "{'dialogue': \"#Person1#: It's  late.\\n#Person2#: Yes.\\n#Person1#: Bye.\", 'summary': 'Late\\n night.'}"
    (tmp_path / "dialogsum.train.jsonl").write_text(python, encoding="utf-8")
    (tmp_path / "dialogsum.dev.jsonl").write_text('{"dialogue": "a: b", "summary": "c"}\n\n', encoding="utf-8")
    read = summary.read(tmp_path)
    turns = "#Person1#: It's late.\n#Person2#: Yes.\n#Person1#: Bye."
    assert read.train == ({"dialogue": turns, "summary": "Late night."},)
    assert read.dev == ({"dialogue": "a: b", "summary": "c"},)
    assert summary.leads([], [{"dialogue": turns}]) == ["#Person1#: It's late. #Person2#: Yes."]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("sentiment", "train.tsv", None, "has no file 'train.tsv'; it must have train.tsv and dev.tsv of SST-2"),
        ("sentiment", "train.tsv", "good\t2\n", "line 1 of .* must be a sentence, a tab, and 0 or 1"),
        ("sentiment", "dev.tsv", "good\t1\n\t0\n", "line 2 of .* must be a sentence"),
        ("sentiment", "dev.tsv", "", "is empty"),
        ("sentiment", "dev.tsv", b"\xff\xfea\0", "is UTF-16"),
        ("translation-en-de", "train.de", "eins\n", "has 40 lines and train.de has 1; line N of one must be"),
        ("translation-en-fr", "val.fr", None, "has no file 'val.fr'"),
        ("summary", "dialogsum.dev.jsonl", "{'dialogue': open('x'), 'summary': ''}", "line 1 of .* correct it"),
        ("summary", "dialogsum.dev.jsonl", "nonsense here", "neither JSON nor a literal of Python"),
        ("summary", "dialogsum.dev.jsonl", '["a"]', 'must be an object with texts "dialogue" and "summary"'),
        ("summary", "dialogsum.dev.jsonl", "(" * 9999, "line 1 of .* neither JSON nor a literal"),
        ("similarity", "stsb-en-dev.csv", "a,b\n", "line 1 of .* must be two sentences and a score from 0 to 5"),
        ("similarity", "stsb-en-dev.csv", "a,b,nan\n", "line 1 of .* a score from 0 to 5"),
        ("similarity", "stsb-en-dev.csv", "a,b,1\na,b,6\n", "line 2 of .* a score from 0 to 5"),
        ("similarity", "stsb-en-dev.csv", 'a,"b"c,1\n', "line 1 of .* is no CSV"),
        ("chat", "", '{"turns": "hi"}\n', 'line 1 of .* with a list of texts, "turns"'),
        ("chat", "", '{"turns": ["hi", 3]}\n', 'line 1 of .* with a list of texts, "turns"'),
    ],
)
def test_broken_folders(name: str, file: str, content: str | bytes | None, message: str, tmp_path: Path) -> None:
    write_data_sets(tmp_path)
    place = tmp_path / FOLDERS[name] / file if file else tmp_path / FOLDERS[name]
    if content is None:
        place.unlink()
    else:
        place.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(TrainingError, match=message) as caught:
        RECIPES[name].read(tmp_path / FOLDERS[name])
    assert "\n" not in str(caught.value)
    with pytest.raises(TrainingError, match=r"no folder|no file"):
        RECIPES[name].read(tmp_path / "nowhere")
