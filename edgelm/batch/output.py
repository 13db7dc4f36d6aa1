"""The output of a run: a file of answers that grows, beside a small file that says how the run was begun.

A killed run leaves whole lines and perhaps a torn one. The next one with the same command drops that one, and goes on.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Annotated

from edgelm.batch.answers import Answer
from edgelm.bundle.small_files import SmallFileError, open_regular_file, read_small_file, status_of
from edgelm.bundle.strict_json import Between, StrictJsonError, from_json, parse_json
from edgelm.bundle.whole_file import lock, write_whole_file
from edgelm.errors import EdgelmError, pass_interrupts_on

RECORD_SUFFIX = ".run"
FORMAT = 1
MAX_RECORD_BYTES = 2**24
_LOCKED_BYTE = 2**40
"""Windows locks bytes, and nobody else may read these: one far behind the answers."""


class OutputError(EdgelmError):
    """A run's output cannot be written or continued."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """How a run was begun: all that decides what is in its output."""

    input_sha256: str
    bundle: str
    """Digest of the bundle."""
    prefix: str
    """SHA-256 of the prefix; empty without one."""
    task: str
    """SHA-256 of the task; empty where the run does none."""
    kind: str
    """What is done with each row; "task" for the task."""
    context: int
    """In tokens."""
    device: str
    order: str
    """Either "input", or "finished" where answers stand in the order in which they came."""
    options: dict[str, str]
    """Every generation option that differs from its default, but the seed."""
    seed: Annotated[int, Between(0, 2**64 - 1)] | None
    """None where the command names none; the first run then draws one, and the record has it."""
    started: str
    """When the run was begun, as ISO 8601 without a time zone."""
    edgelm: str
    """Version."""
    format: int = FORMAT

    def difference(self, earlier: "RunRecord") -> str | None:
        """What of this run is not as in an `earlier` one; None where it goes on with that."""
        names = {
            "format": "version of edgelm",
            "edgelm": "version of edgelm",
            "input_sha256": "input",
            "bundle": "bundle",
            "prefix": "prefix",
            "task": "task",
            "kind": "--as",
            "context": "--context",
            "device": "device",
            "order": "order of answers (--unordered)",
        }
        for name, words in names.items():
            if getattr(self, name) != getattr(earlier, name):
                return words
        for name in sorted(self.options.keys() | earlier.options.keys()):
            if self.options.get(name) != earlier.options.get(name):
                return f"value of {name}"
        return "seed" if self.seed not in (None, earlier.seed) else None


class LineSet:
    """Numbers of lines, from 1. It takes memory for those only that come out of order."""

    def __init__(self) -> None:
        self._first_missing, self._beyond = 1, set[int]()

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and (0 < number < self._first_missing or number in self._beyond)

    def __len__(self) -> int:
        return self._first_missing - 1 + len(self._beyond)

    def add(self, number: int) -> None:
        """Add a number, 1 or more."""
        self._beyond.add(number)
        while self._first_missing in self._beyond:
            self._beyond.remove(self._first_missing)
            self._first_missing += 1


@dataclass(slots=True)
class Written:
    """What a file of answers has."""

    lines: LineSet = field(default_factory=LineSet)
    """The lines of the input that are answered."""
    size_bytes: int = 0
    failed: int = 0
    """Answers with "error"."""
    cut: int = 0
    """Texts that did not end by themselves."""

    def add(self, line: bytes) -> None:
        """Count an answer. Raises StrictJsonError if the line is not an answer."""
        try:
            row = json.loads(line)  # `parse_json` is several times slower, and edgelm wrote the line
        except (ValueError, RecursionError) as error:
            pass_interrupts_on(error)
            row = None
        number = row.get("line") if isinstance(row, dict) else None
        if not isinstance(row, dict) or type(number) is not int or number < 1 or number in self.lines:
            raise StrictJsonError("is no answer of this run")
        self.lines.add(number)
        self.size_bytes += len(line)
        self.failed += "error" in row
        self.cut += row.get("finish_reason") not in (None, "eos", "stop")


def read_written(stream: IO[bytes], *, ordered: bool) -> Written:
    """What a file of answers has in its whole lines; what comes after the last line end is torn, and not counted.

    Raises StrictJsonError if a whole line is no answer, or is out of order in a file that is `ordered`. The message
    completes a sentence that begins with the file's name.
    """
    written = Written()
    for place, line in enumerate(stream, 1):
        if not line.endswith(b"\n"):
            break
        try:
            written.add(line)
            if ordered and place not in written.lines:
                raise StrictJsonError("is out of order")
        except StrictJsonError as error:
            raise StrictJsonError(f"was changed: its line {place} {error}") from None
    return written


class Output:
    """A file of answers, open for writing, which no other run writes meanwhile.

    Attributes:
        record: how the run was begun.
        written: what the file has.
        found: how many answers were there before.
    """

    def __init__(self, path: Path, file: IO[bytes], record: RunRecord, written: Written) -> None:
        """Join finished parts; `opened_output` finds them."""
        self._path, self._file = path, file
        self.record, self.written, self.found = record, written, len(written.lines)

    def write(self, answer: Answer) -> None:
        """Add an answer. Raises OutputError if there is no room for it; none of it is then left."""
        line = f"{answer.line}\n".encode()
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            pass_interrupts_on(error)
            reason = _reason(error)
            try:
                self._file.truncate(self.written.size_bytes)
            except OSError as second:  # then the next run drops what is torn
                pass_interrupts_on(second)
            raise OutputError(
                f"cannot write {str(self._path)!r}: {reason}; give the same command again once that is mended, and it "
                f"goes on"
            ) from None
        self.written.add(line)


@contextmanager
def opened_output(path: Path, record: RunRecord) -> Iterator[Output]:
    """Yield the file `path`, open for the answers that are missing; a new run writes its record first.

    Args:
        path: the file of answers. Its record lies beside it, with RECORD_SUFFIX at its name's end.
        record: how this command begins a run. An earlier run's seed and start take the place of its own.

    Raises OutputError if the file cannot be written, belongs to another run or to none, or is written now.
    """
    place = path.with_name(path.name + RECORD_SUFFIX)
    is_new = status_of(path) is None
    with _locked(path) as file:
        try:
            begun = _begun(path, place, record, is_empty=os.fstat(file.fileno()).st_size == 0)
        except OutputError:
            if is_new:
                path.unlink(missing_ok=True)
            raise
        try:
            with open_regular_file(path) as stream:
                written = read_written(stream, ordered=record.order == "input")
        except StrictJsonError as error:
            raise OutputError(f"{str(path)!r} {error}; give another output file") from None
        file.truncate(written.size_bytes)
        file.seek(written.size_bytes)
        yield Output(path, file, begun, written)
        os.fsync(file.fileno())


def _locked(path: Path) -> IO[bytes]:
    try:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        file = open(os.open(path, flags, 0o666), "r+b", buffering=0)  # noqa: PTH123, SIM115 (no mode of open does this)
    except OSError as error:
        pass_interrupts_on(error)
        raise OutputError(f"cannot write {str(path)!r}: {_reason(error)}") from None
    try:
        file.seek(_LOCKED_BYTE)
        lock(file)
    except OSError as error:
        pass_interrupts_on(error)
        if isinstance(error, BlockingIOError) or sys.platform == "win32":
            file.close()
            raise OutputError(f"another run writes {str(path)!r} now: wait for it, or give another file") from None
    # Elsewhere the file system has no locks.
    return file


def _begun(path: Path, place: Path, record: RunRecord, *, is_empty: bool) -> RunRecord:
    """The record of the run that the answers at `path` belong to: an earlier one's, or `record`, which is written."""
    earlier = _read_record(place)
    if not is_empty:
        if earlier is None:
            raise OutputError(
                f"{str(path)!r} exists, and {place.name!r}, which would say how it was made, does not: give another "
                "output file, or remove it"
            )
        difference = record.difference(earlier)
        if difference is not None:
            raise OutputError(
                f"{str(path)!r} was begun with another {difference}: give what it was begun with to go on, or another "
                "output file"
            )
        return earlier
    if earlier is not None and record.difference(earlier) is None:
        return earlier
    if record.seed is None:
        import secrets

        record = replace(record, seed=secrets.randbits(63))
    try:
        write_whole_file(place, f"{json.dumps(asdict(record), indent=2)}\n".encode())
    except OSError as error:
        pass_interrupts_on(error)
        raise OutputError(f"cannot write {str(place)!r}: {_reason(error)}") from None
    return record


def _read_record(place: Path) -> RunRecord | None:
    if status_of(place) is None:
        return None
    try:
        return from_json(RunRecord, parse_json(read_small_file(place, MAX_RECORD_BYTES)))
    except (SmallFileError, StrictJsonError) as error:
        raise OutputError(f"{str(place)!r} {error}: remove it and the output, or give another output file") from None
    except OSError as error:
        pass_interrupts_on(error)
        raise OutputError(f"cannot read {str(place)!r}: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
