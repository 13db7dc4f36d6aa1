"""Every format of records against rows written by hand; a wrong file is refused in one sentence."""

from pathlib import Path

import pytest

from edgelm.errors import TrainingError
from edgelm_train.data.records import is_records_file, read_records
from edgelm_train.data.tables import Row

pytestmark = pytest.mark.export

EXPECTED: list[Row] = [{"text": 'a "b"', "label": "1"}, {"text": "c,\td\u00e9", "label": ""}]
FILES = {
    "lines.jsonl": '{"text": "a \\"b\\"", "label": 1, "spans": [1]}\n\n{"text": "c,\\td\u00e9", "label": null}\n',
    "lines.ndjson": '{"text": "a \\"b\\"", "label": 1}\r\n{"text": "c,\\td\u00e9"}',
    "list.json": '[{"label": 1, "text": "a \\"b\\""}, {"text": "c,\\td\u00e9"}]',
    "table.csv": '\ufefftext,label\r\n"a ""b""",1\r\n\r\n"c,\td\u00e9",\r\n',
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name].encode())
    assert list(read_records(tmp_path / name).rows) == EXPECTED
    assert is_records_file(tmp_path / name)
    assert not is_records_file(tmp_path / "story.txt")


def test_quotation_marks_of_tsv_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.TSV").write_text('sentence\tlabel\n"no way" he said\t0\n"\t1\n', encoding="utf-8")
    records = read_records(tmp_path / "a.TSV")
    assert records.columns == ("sentence", "label")
    assert [row["sentence"] for row in records.rows] == ['"no way" he said', '"']


def test_numbers_and_booleans_become_their_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 0.5, "b": true, "c": -3}', encoding="utf-8")
    assert read_records(tmp_path / "a.jsonl").rows == ({"a": "0.5", "b": "true", "c": "-3"},)


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n" + "x" * 200_000 + ",y\n", encoding="utf-8")
    assert len(read_records(tmp_path / "a.csv").rows[0]["a"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", ["no rows"]),
        ("a.csv", b"", ["no rows"]),
        ("a.csv", b"a,b\n", ["no rows"]),
        ("a.json", b"[]", ["no rows"]),
        ("a.json", b'{"a": 1}', ["list of JSON objects"]),
        ("a.json", b"[" * 100_000, ["not JSON"]),
        ("a.jsonl", b'{"a": "b"}\n{"a": \n', ["line 2", "not JSON"]),
        ("a.jsonl", b'{"a": "b"}\n[1]\n', ["line 2", "not a JSON object"]),
        ("a.jsonl", b'{"a": "\\ud800"}\n', ["line 1", "surrogate"]),
        ("a.jsonl", b'{"a": "\xff"}', ["not UTF-8", "byte 7"]),
        ("a.csv", b"a,b\nc\0,d\n", ["NUL"]),
        ("a.jsonl", b'[\n{"a": 1},\n{"a": 2}\n]', ["line 1", "one JSON list", "name it .json"]),
        ("a.jsonl", b'[{"a": 1}]', ["line 1", "is a list", "named .json"]),
        ("a.jsonl", b'{"a": 1}\n{"a": 2},\n', ["line 2", "a comma follows its object"]),
        ("a.jsonl", b'{\n"a": 1\n}\n', ["line 1", "must begin and end in one line"]),
        ("a.jsonl", b"{'a': 1}\n", ["line 1", "single quotation marks"]),
        ("a.jsonl", b'{"a": 1 "b": 2}\n', ["line 1", "delimiter at character 9"]),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', ["one object in each line", "name it .jsonl"]),
        ("a.json", b'{"data": [{"a": 1}]}', ["list of JSON objects", "the list in 'data'"]),
        ("a.json", b'[{"a": 1},\n]', ["not JSON", "comma"]),
        ("a.csv", b"a,b\nc\n", ["line 2", "1 columns, not 2"]),
        ("a.csv", b"a,a\nc,d\n", ["name every column once"]),
        ("a.csv", b'a,b\n"c,d\n', ["breaks the format"]),
        ("a.tsv", b"a\tb\nc\td\te\n", ["line 2", "3 columns, not 2"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:20],
)
def test_bad_files_are_refused(name: str, content: bytes, words: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError) as caught:
        read_records(tmp_path / name)
    message = str(caught.value)
    assert repr(str(tmp_path / name))[1:-1] in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot read"):
        read_records(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(TrainingError, match="cannot read"):
        read_records(tmp_path / "folder.csv")
