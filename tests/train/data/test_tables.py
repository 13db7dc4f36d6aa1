"""A table that cannot be read is refused by its cause, the line of the cause, and what to do."""

from pathlib import Path

import pytest

from edgelm.errors import TrainingError
from edgelm_train.data.records import read_records

pytestmark = pytest.mark.export


def read(folder: Path, name: str, content: str) -> list[dict[str, str]]:
    (folder / name).write_text(content, encoding="utf-8", newline="")
    return list(read_records(folder / name).rows)


def test_blanks_around_names_and_empty_columns_at_the_end_do_not_count(tmp_path: Path) -> None:
    """Spreadsheets end every line with the separators of their empty columns."""
    assert read(tmp_path, "a.csv", "q , a,,\n1, 2,,\n\n  \n3,4\n") == [{"q": "1", "a": " 2"}, {"q": "3", "a": "4"}]


def test_a_value_may_have_several_lines(tmp_path: Path) -> None:
    assert read(tmp_path, "a.csv", 'q,a\r\n"one\r\ntwo",3\r\n4,5\r\n') == [
        {"q": "one\r\ntwo", "a": "3"},
        {"q": "4", "a": "5"},
    ]


def test_one_column_needs_no_separator(tmp_path: Path) -> None:
    assert read(tmp_path, "a.csv", "text\nHi; you|there\n") == [{"text": "Hi; you|there"}]


@pytest.mark.parametrize(
    ("name", "content", "line", "cause", "advice"),
    [
        ("a.csv", "q;a\n1;2\n", 1, "separates columns by semicolons, not commas", "save as CSV"),
        ("a.csv", "q|a\n1|2\n", 1, "by vertical bars, not commas", "write it with commas"),
        ("a.csv", "q\ta\n1\t2\n", 1, "by tabs, not commas", "name the file .tsv"),
        ("a.tsv", "q,a\n1,2\n", 1, "by commas, not tabs", "name the file .csv"),
        ("a.csv", "q,a\n1,2\n3;4\n", 3, "1 columns, not 2", "write commas"),
        ("a.csv", 'q,a\n1,2\n3,"4\n5,6\n7,8\n', 3, "a quotation mark in it is never closed", "close it"),
        ("a.csv", 'q,a\n1,2\n3,"4\n5,6\n7,"eight"\n', 3, "a quotation mark in it is never closed", "close it"),
        ("a.csv", 'q,a\n1,"say \\"hi\\" now"\n', 2, "text stands after a closing quotation mark", 'write ""'),
        ("a.csv", "q,a\n1,2,3\n", 2, "3 columns, not 2", "put a value that contains a comma into quotation marks"),
        ("a.csv", 'q,a\n1, "2, 3"\n', 2, "a quotation mark after a blank opens no value", "remove the blank"),
        ("a.csv", "q,a\n1\n", 2, "1 columns, not 2", "add what is missing"),
        ("a.tsv", "q\ta\n1\t2\t3\n", 2, "3 columns, not 2", "cannot contain a tab"),
        ("a.csv", "q,a,q\n1,2,3\n", 1, "has 'q' twice", "rename one"),
        ("a.csv", "q, q\n1,2\n", 1, "has 'q' twice", "rename one"),
        ("a.csv", "q,,a\n1,2,3\n", 1, "column 2 has no name", "give it one"),
    ],
)
def test_a_broken_table_is_refused(name: str, content: str, line: int, cause: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        read(tmp_path, name, content)
    message = str(caught.value)
    assert f"line {line} of {str(tmp_path / name)!r}" in message
    assert cause in message and advice in message and "\n" not in message
