"""Files become documents, or are refused in one sentence that gives the reason."""

from pathlib import Path

import pytest

from edgelm.errors import TrainingError
from edgelm_train.data.corpus import read_corpus, read_documents

pytestmark = pytest.mark.export

SEPARATOR = "<|endoftext|>"


def _file(folder: Path, content: bytes | str, name: str = "data.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_documents_stand_between_separators(tmp_path: Path) -> None:
    path = _file(tmp_path, f"\ufeffone\r\n two {SEPARATOR}\n\n{SEPARATOR} three{SEPARATOR}")

    assert read_documents(path) == ["one\n two", "three"]


def test_a_file_without_a_separator_is_one_document(tmp_path: Path) -> None:
    assert read_documents(_file(tmp_path, "a\n\nb\n")) == ["a\n\nb"]


def test_another_separator_goes_beside_the_usual_one(tmp_path: Path) -> None:
    path = _file(tmp_path, f"a\n\nb{SEPARATOR}c")

    assert read_documents(path, separator="\n\n") == ["a", "b", "c"]


def test_the_first_documents_are_held_out_over_all_files(tmp_path: Path) -> None:
    files = [_file(tmp_path, f"a{SEPARATOR}b", "1"), _file(tmp_path, f"c{SEPARATOR}d", "2")]

    corpus = read_corpus(files, held_out=3)

    assert corpus.held_out == ("a", "b", "c")
    assert corpus.training == ("d",)


def test_every_fiftieth_document_is_held_out_by_default(tmp_path: Path) -> None:
    corpus = read_corpus([_file(tmp_path, SEPARATOR.join(str(i) for i in range(101)))])

    assert corpus.held_out == ("0", "50", "100")
    assert len(corpus.training) == 98


def test_the_end_of_a_single_book_is_held_out(tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(1000))

    corpus = read_corpus([_file(tmp_path, text)])

    assert " ".join([*corpus.training, *corpus.held_out]) == text
    assert 0.03 < sum(map(len, corpus.held_out)) / len(text) < 0.06


def test_no_held_out_document_is_trained_on(tmp_path: Path) -> None:
    corpus = read_corpus([_file(tmp_path, SEPARATOR.join(["same", "other", "same", "more"]))], held_out=1)

    assert corpus.training == ("other", "more")
    assert corpus.repeated == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "nothing but white space"),
        (b"text\0more", "byte 4 is zero"),
        (b"\xff\xfet\0e\0x\0t\0", "is UTF-16"),
        (b"one\nna\xefve", "not UTF-8: byte 6 (line 2) is 0xef"),
        (b"\x1f\x8b\x08rest", "is compressed (gzip)"),
        (b"\xfd7zXZ\0", "is compressed (xz)"),
        (b"PK\x03\x04", "is compressed (zip)"),
    ],
    ids=["empty", "blank", "binary", "utf16", "latin1", "gzip", "xz", "zip"],
)
def test_files_that_are_not_text_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(TrainingError) as caught:
        read_corpus([_file(tmp_path, content)])

    assert reason in str(caught.value)
    assert "data.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No such file"):
        read_corpus([tmp_path / "missing.txt"])
    with pytest.raises(TrainingError, match="is a folder"):
        read_corpus([tmp_path])


@pytest.mark.parametrize("count", [0, 2, 9])
def test_something_must_be_left_to_train_on(tmp_path: Path, count: int) -> None:
    with pytest.raises(TrainingError, match=f"cannot hold out {count} of 2"):
        read_corpus([_file(tmp_path, f"a{SEPARATOR}b")], held_out=count)


def test_equal_documents_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing left to train on"):
        read_corpus([_file(tmp_path, SEPARATOR.join(["a"] * 5))], held_out=1)
