"""Files of UTF-8 text, and what is wrong with a file that is none."""

import errno
import os
from pathlib import Path

from edgelm.errors import TrainingError

_COMPRESSED = {
    b"\x1f\x8b": "compressed (gzip); decompress it first",
    b"\xfd7zXZ": "compressed (xz); decompress it first",
    b"PK\x03\x04": "compressed (zip); decompress it first",
    b"BZh": "compressed (bzip2); decompress it first",
    b"(\xb5/\xfd": "compressed (zstd); decompress it first",
}
"""What a file is that begins with these bytes."""
_ENCODINGS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""The encoding of a file that begins with these bytes. The first match counts."""


def read_text_file(file: Path) -> tuple[bytes, str]:
    """The content of a file, and its text without a byte order mark.

    Raises:
        TrainingError: the file is missing, empty, or not UTF-8 text; the message says what it is and what to do.
    """
    check_file(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise TrainingError(f"cannot read {file}: {error.strerror or error}") from None
    if not content:
        raise TrainingError(f"{file} is empty: it has no text and no rows; give a file with content")
    for first_bytes, description in _COMPRESSED.items():
        if content.startswith(first_bytes):
            raise TrainingError(f"{file} is {description}")
    for first_bytes, encoding in _ENCODINGS.items():
        if content.startswith(first_bytes):
            raise TrainingError(f"{file} is {encoding}; {_convert(encoding, file)}")
    if (zero := content.find(b"\0")) >= 0:
        if (guess := _sixteen_bits(content)) is not None:
            raise TrainingError(f"{file} is {guess} without a byte order mark; {_convert(guess, file)}")
        place = f"byte {zero} is zero (NUL), in line {_line_of(content, zero)}"
        raise TrainingError(f"{file} is not text: {place}; give a UTF-8 text file without such bytes")
    try:
        return content, content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrainingError(_not_utf8(content, error, file)) from None


def check_file(file: Path) -> None:
    """Raises TrainingError where `file` is a folder or something else that is no file, or does not exist."""
    if file.is_dir():
        raise TrainingError(f"cannot read {file}: it is a folder; name its text files, for example {file}/*.txt")
    if not file.exists():
        raise TrainingError(f"cannot read {file}: {os.strerror(errno.ENOENT)}")
    if not file.is_file():
        raise TrainingError(f"{file} is no regular file, and data are read twice: write its content into a file first")


def _line_of(content: bytes, place: int) -> int:
    return content.count(b"\n", 0, place) + 1


def _not_utf8(content: bytes, error: UnicodeDecodeError, file: Path) -> str:
    number = content[error.start]
    wrong = f"{file} is not UTF-8: byte {error.start} (line {_line_of(content, error.start)}) is 0x{number:02x}"
    if error.reason == "unexpected end of data":
        return f"{wrong}, the first half of a character, and then the file ends: copy the file again"
    if not content[: error.start].isascii():
        return f"{wrong}, and all before it is UTF-8: correct that line, or drop such bytes with iconv -c -t UTF-8"
    # In Windows' code page these bytes are quotation marks and dashes; in Latin-1 they are nothing.
    return f"{wrong}; {_convert('CP1252' if any(0x80 <= byte < 0xA0 for byte in content) else 'LATIN1', file)}"


def _sixteen_bits(content: bytes) -> str | None:
    """The UTF-16 encoding of a mostly Latin text, by which half of its bytes are zero."""
    start = content[:4096]
    for offset, encoding in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if start[offset::2].count(0) > 0.8 * len(start[offset::2]) and start[1 - offset :: 2].count(0) == 0:
            return encoding
    return None


def _convert(encoding: str, file: Path) -> str:
    return f"convert it first, for example: iconv -f {encoding} -t UTF-8 {file.name} > new-{file.name}"
