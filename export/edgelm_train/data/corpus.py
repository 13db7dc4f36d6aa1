"""From text files to documents: files are read, checked and split at a separator, and some documents are held out."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edgelm.errors import TrainingError
from edgelm_train.data.text_file import read_text_file

Item = TypeVar("Item")

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
"""Its id in the tokenizers that edgelm trains."""
_HELD_OUT_EVERY = 50
"""Unless a number is given, every 50th document is held out (2%)."""
_FEWEST_DOCUMENTS = 20
"""With fewer documents, the last 5% of each document are held out instead of whole documents."""
_HEAD_FRACTION = 0.95


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
        content, text = read_text_file(file)
        digest.update(content)
        text = text.replace("\r\n", "\n")
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
    return _split(read_text_file(file)[1].replace("\r\n", "\n"), separator)


def read_parts(file: Path, held_out: Path | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The documents of `file` to train on, and the held-out ones: those of the file `held_out`, or a part of `file`.

    Raises:
        TrainingError: a file is missing, empty or not UTF-8 text, or no document is left for one of the parts.
    """
    if held_out is None:
        corpus = read_corpus([file])
        return corpus.training, corpus.held_out
    held = tuple(read_documents(held_out))
    if not held:
        raise TrainingError(f"there is nothing but white space in {held_out}: give a file with text")
    known = set(held)
    training = tuple(document for document in read_documents(file) if document not in known)
    if not training:
        raise TrainingError(
            f"every document of {file} is white space or equals a held-out document: there is nothing left to train on"
        )
    return training, held


def without_held_out(
    training: Sequence[Item], held_out: Sequence[Item], noun: str, key: Callable[[Item], object]
) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    """The items of `training` whose `key` no held-out item has, and a note where that leaves out a `noun`."""
    known = {key(item) for item in held_out}
    fresh = tuple(item for item in training if key(item) not in known)
    repeated = len(training) - len(fresh)
    notes = (f"left out {counted(repeated, noun)} because an equal one is held out",) if repeated else ()
    return fresh, notes


def counted(number: int, noun: str) -> str:
    """A number before its noun: "1 document", "2,000 documents"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


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
