"""From text files to documents: files are read, checked and split at a separator, and some documents are held out."""

import errno
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import TrainingError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
"""Its id in the tokenizers that edgelm trains."""
_HELD_OUT_EVERY = 50
"""Unless a number is given, every 50th document is held out (2%)."""
_FEWEST_DOCUMENTS = 20
"""With fewer documents, the last 5% of each document are held out instead of whole documents."""
_HEAD_FRACTION = 0.95
_NOT_UTF8 = {
    b"\x1f\x8b": "compressed (gzip); decompress it first",
    b"\xfd7zXZ": "compressed (xz); decompress it first",
    b"PK\x03\x04": "compressed (zip); decompress it first",
    b"BZh": "compressed (bzip2); decompress it first",
    b"(\xb5/\xfd": "compressed (zstd); decompress it first",
    b"\xff\xfe\0\0": "UTF-32; convert it first: iconv -f UTF-32 -t UTF-8 {}",
    b"\0\0\xfe\xff": "UTF-32; convert it first: iconv -f UTF-32 -t UTF-8 {}",
    b"\xff\xfe": "UTF-16; convert it first: iconv -f UTF-16 -t UTF-8 {}",
    b"\xfe\xff": "UTF-16; convert it first: iconv -f UTF-16 -t UTF-8 {}",
}
"""What a file is that begins with these bytes. The first match counts."""


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and held-out documents; no document is in both parts."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]
    sha256: str
    """Hash (hex) of the bytes of all files, in order."""
    repeated: int
    """Number of documents that were left out of `training` because an equal one is in `held_out`."""


def read_corpus(files: Sequence[Path], *, separator: str = END_OF_TEXT, held_out: int | None = None) -> Corpus:
    """Read UTF-8 text files as documents.

    Each file is split at every `separator` and at every ``<|endoftext|>``; a file without them is one document. White
    space around a document is removed, and an empty document is dropped. Line ends become "\\n"; a byte order mark is
    removed.

    Args:
        files: the files, in order.
        separator: text between two documents. Only ``<|endoftext|>`` may be missing from all files.
        held_out: number of documents to hold out, from the first. None holds out every 50th document; with fewer than
            20 documents, it holds out the last 5% of each.

    Raises:
        TrainingError: a file is missing, empty or not UTF-8 text, `separator` is in none of the files, or no document
            is left to train on.
    """
    if not separator:
        raise TrainingError("the separator of documents is empty; give a text such as '<|endoftext|>'")
    digest, separator_seen, documents = hashlib.sha256(), False, list[str]()
    for file in files:
        content = _read(file)
        digest.update(content)
        text = _decode(content, file)
        separator_seen |= separator in text
        documents += _split(text, separator)
    if not (separator_seen or separator == END_OF_TEXT):
        raise TrainingError(f"the separator {separator!r} is nowhere in {_names(files)}")
    if not documents:
        raise TrainingError(f"there is nothing but white space in {_names(files)}: give files with text")
    training, held = _hold_out(documents, held_out)
    known = set(held)
    fresh = tuple(document for document in training if document not in known)
    if not fresh:
        raise TrainingError(f"every document of {_names(files)} is equal to a held-out one: nothing left to train on")
    return Corpus(fresh, held, digest.hexdigest(), repeated=len(training) - len(fresh))


def read_documents(file: Path, *, separator: str = END_OF_TEXT) -> list[str]:
    """The documents of one UTF-8 file, as `read_corpus` reads them.

    Raises:
        TrainingError: the file is missing, empty or not UTF-8 text.
    """
    return _split(_decode(_read(file), file), separator)


def check_file(file: Path) -> None:
    """Raises TrainingError where `file` is a folder, or does not exist."""
    if file.is_dir():
        raise TrainingError(f"{file} is a folder; name its text files, for example {file}/*.txt")
    if not file.exists():
        raise TrainingError(f"cannot read {file}: {os.strerror(errno.ENOENT)}")


def counted(number: int, noun: str) -> str:
    """A number before its noun: "1 document", "2,000 documents"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _read(file: Path) -> bytes:
    check_file(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise TrainingError(f"cannot read {file}: {error.strerror or error}") from None
    if not content:
        raise TrainingError(f"{file} is empty; give a file with text")
    return content


def _decode(content: bytes, file: Path) -> str:
    for first_bytes, description in _NOT_UTF8.items():
        if content.startswith(first_bytes):
            raise TrainingError(f"{file} is {description.format(file.name)}")
    zero = content.find(b"\0")
    if zero >= 0:
        raise TrainingError(f"{file} is not text: byte {zero} is zero; give a UTF-8 text file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TrainingError(
            f"{file} is not UTF-8: byte {error.start} (line {line}) is 0x{content[error.start]:02x}; convert it first, "
            f"for example: iconv -f LATIN1 -t UTF-8 {file.name}"
        ) from None
    return text.replace("\r\n", "\n")


def _split(text: str, separator: str) -> list[str]:
    parts = re.split("|".join(map(re.escape, {separator, END_OF_TEXT})), text)
    return [stripped for part in parts if (stripped := part.strip())]


def _hold_out(documents: Sequence[str], held_out: int | None) -> tuple[list[str], tuple[str, ...]]:
    if held_out is not None:
        if not 1 <= held_out < len(documents):
            message = f"cannot hold out {held_out} of {counted(len(documents), 'document')}"
            raise TrainingError(f"{message}: hold out at least 1 and leave at least 1 to train on")
        return list(documents[held_out:]), tuple(documents[:held_out])
    if len(documents) >= _FEWEST_DOCUMENTS:
        training = [document for i, document in enumerate(documents) if i % _HELD_OUT_EVERY]
        return training, tuple(documents[::_HELD_OUT_EVERY])
    heads, tails = zip(*map(_cut, documents), strict=True)
    held = tuple(tail for tail in tails if tail)
    if not held:
        raise TrainingError("the documents are too short: a held-out part of them would be empty; give more text")
    return list(heads), held


def _cut(document: str) -> tuple[str, str]:
    """Head and tail of `document`, cut at the first white space after 95% of it."""
    end = int(len(document) * _HEAD_FRACTION)
    space = re.compile(r"\s").search(document, end)
    end = space.start() if space else end
    return document[:end].strip(), document[end:].strip()


def _names(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
