"""A file that is no UTF-8 text is named for what it is, with the line and the command that helps."""

import gzip
from pathlib import Path

import pytest

from edgelm.errors import TrainingError
from edgelm_train.data.text_file import read_text_file

pytestmark = pytest.mark.export


@pytest.mark.parametrize("content", [b"one\ntwo", "\ufeffone\ntwo".encode()], ids=["plain", "byte order mark"])
def test_text_comes_without_a_byte_order_mark(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert read_text_file(tmp_path / "a.txt") == (content, "one\ntwo")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (gzip.compress(b"text", mtime=0), ["compressed (gzip)", "decompress it first"]),
        ("q,a\n1,2\n".encode("utf-16"), ["is UTF-16;", "iconv -f UTF-16 -t UTF-8 a.csv > new-a.csv"]),
        ("q,a\n1,2\n".encode("utf-16-le"), ["is UTF-16LE without a byte order mark", "iconv -f UTF-16LE"]),
        ("q,a\n1,2\n".encode("utf-16-be"), ["is UTF-16BE without a byte order mark", "iconv -f UTF-16BE"]),
        ("q,a\n".encode("utf-32"), ["is UTF-32;", "iconv -f UTF-32"]),
        ("q,a\n1,é\n".encode("latin-1"), ["byte 6 (line 2) is 0xe9", "iconv -f LATIN1 -t UTF-8"]),
        ("q,a\n1,“so”\n".encode("cp1252"), ["byte 6 (line 2) is 0x93", "iconv -f CP1252 -t UTF-8"]),
        ("q,a\né,b\n".encode() + b"c,\xff\n", ["(line 3) is 0xff, and all before it is UTF-8", "correct that line"]),
        ("q,a\n1,é".encode()[:-1], ["the first half of a character, and then the file ends", "copy the file again"]),
        (b"q,a\n1,2\0\n", ["byte 7 is zero (NUL), in line 2"]),
    ],
)
def test_what_a_file_is_instead(content: bytes, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(TrainingError) as caught:
        read_text_file(tmp_path / "a.csv")
    assert all(word in str(caught.value) for word in [*words, str(tmp_path / "a.csv")]), str(caught.value)
    assert "\n" not in str(caught.value)
