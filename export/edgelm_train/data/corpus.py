"""Text files become documents: read, checked, split at their separator, and a part held out."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import TrainingError

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_EVERY = 50
"""Without a number given, every 50th document is held out, 2%."""
_FEWEST_DOCUMENTS = 20
"""Of fewer documents none is spared whole: the last part of each is held out instead."""
_TAIL_FRACTION = 0.05

_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"(\xb5/\xfd": "zstd",
}


@dataclass(frozen=True)
class Corpus:
    """What a model is trained on and what it is measured on; no held-out document is also a training document."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]
    size_bytes: int
    """Of all files together."""
    sha256: str
    """Of all files' bytes, one after another."""
    repeated: int
    """Documents left out of the training part because the held-out part has the same text."""

    @property
    def training_characters(self) -> int:
        """Characters to train on."""
        return sum(map(len, self.training))

    @property
    def held_out_characters(self) -> int:
        """Characters to measure on."""
        return sum(map(len, self.held_out))


def read_corpus(files: Sequence[Path], *, separator: str = END_OF_TEXT, held_out: int | None = None) -> Corpus:
    """Read UTF-8 text files as documents.

    A file is split at every `separator`; one without any is one document. Documents are stripped, and dropped where
    nothing is left. Line ends become "\\n", a byte order mark goes.

    Args:
        separator: what stands between documents; "<|endoftext|>" is taken out of them in any case, and may be missing.
        held_out: hold out the first so many documents; None: every 50th, or where there are fewer than 20 documents,
            the last 5% of each.

    Raises:
        TrainingError: a file is missing, empty or no UTF-8 text, or no document is left to train on; another
            `separator` is in none of them.
    """
    if not separator:
        raise TrainingError("the separator of documents is empty; give a text such as '<|endoftext|>'")
    digest, size_bytes, separated, documents = hashlib.sha256(), 0, False, list[str]()
    for file in files:
        content = _read(file)
        digest.update(content)
        size_bytes += len(content)
        text = _decode(content, file)
        separated |= separator in text
        documents += _split(text, separator)
    if not (separated or separator == END_OF_TEXT):
        raise TrainingError(f"the separator {separator!r} is nowhere in {_names(files)}")
    if not documents:
        raise TrainingError(f"nothing but white space in {_names(files)}: there is no text to train on")
    training, spared = _hold_out(documents, held_out)
    known = set(spared)
    fresh = tuple(document for document in training if document not in known)
    if not fresh:
        raise TrainingError(
            f"every document of {_names(files)} is the same as a held-out one: there is nothing left to train on"
        )
    return Corpus(fresh, spared, size_bytes, digest.hexdigest(), repeated=len(training) - len(fresh))


def read_documents(file: Path, *, separator: str = END_OF_TEXT) -> list[str]:
    """The documents of one UTF-8 file, as `read_corpus` reads them.

    Raises:
        TrainingError: the file is missing, empty or no UTF-8 text.
    """
    return _split(_decode(_read(file), file), separator)


def _read(file: Path) -> bytes:
    if file.is_dir():
        raise TrainingError(f"{file} is a folder; name its text files, for example {file}/*.txt")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise TrainingError(f"cannot read {file}: {error.strerror or error}") from None
    if not content:
        raise TrainingError(f"{file} is empty: there is no text to train on")
    return content


def _decode(content: bytes, file: Path) -> str:
    for magic, name in _PACKED.items():
        if content.startswith(magic):
            raise TrainingError(f"{file} is compressed ({name}); unpack it first")
    if content.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise TrainingError(f"{file} is UTF-32; convert it first: iconv -f UTF-32 -t UTF-8 {file.name}")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TrainingError(f"{file} is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8 {file.name}")
    zero = content.find(b"\0")
    if zero >= 0:
        raise TrainingError(f"{file} is no text: byte {zero} is zero; training takes UTF-8 text files")
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
            raise TrainingError(
                f"cannot hold out {held_out} of {len(documents)} documents: at least 1, and 1 must be left to train on"
            )
        return list(documents[held_out:]), tuple(documents[:held_out])
    if len(documents) >= _FEWEST_DOCUMENTS:
        training = [document for i, document in enumerate(documents) if i % HELD_OUT_EVERY]
        return training, tuple(documents[::HELD_OUT_EVERY])
    heads, tails = zip(*map(_cut, documents), strict=True)
    spared = tuple(tail for tail in tails if tail)
    if not spared:
        raise TrainingError("the documents are too short to hold a part of them out; give more text")
    return list(heads), spared


def _cut(document: str) -> tuple[str, str]:
    """`document` in two, at the first white space after 95% of it."""
    space = re.compile(r"\s").search(document, int(len(document) * (1 - _TAIL_FRACTION)))
    at = space.start() if space else int(len(document) * (1 - _TAIL_FRACTION))
    return document[:at].strip(), document[at:].strip()


def _names(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
