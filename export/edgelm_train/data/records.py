"""Files of records: JSON Lines, JSON, TSV and CSV become rows of text by the names of their columns."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import TrainingError
from edgelm_export.source.hub import first_line

MAX_FILE_BYTES = 2**31
"""A file of records is read whole."""

Row = dict[str, str]


@dataclass(frozen=True)
class Records:
    """The rows of one file; every row has every column, empty where the file says nothing."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def is_records_file(path: Path) -> bool:
    """Whether a file is one of records, by the end of its name."""
    return path.suffix.lower() in _PARSERS


def read_records(path: Path) -> Records:
    """Read a file of records by the end of its name.

    ``.jsonl`` and ``.ndjson`` hold a JSON object a line, ``.json`` a list of them; numbers and true and false become
    their JSON text, null the empty string. ``.csv`` (RFC 4180) and ``.tsv`` name their columns in the first line; in
    TSV a quotation mark is a character like any other, as in GLUE's files. The encoding is UTF-8, a byte order mark
    is skipped, empty lines too.

    Raises:
        TrainingError: the file cannot be read, is too large, is not UTF-8, or breaks its format; or has no rows.
    """
    if not is_records_file(path):
        raise TrainingError(f"{str(path)!r} is no file of records: its name must end in {', '.join(_PARSERS)}")
    parse = _PARSERS[path.suffix.lower()]
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TrainingError(f"{str(path)!r} has {size:,} bytes, more than {MAX_FILE_BYTES:,}; split it")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{str(path)!r} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise TrainingError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    if "\0" in text:
        raise TrainingError(f"{str(path)!r} holds NUL bytes: it is no text")
    rows = parse(text, str(path))
    if not rows:
        raise TrainingError(f"{str(path)!r} has no rows: there is nothing to learn")
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return Records(columns, tuple({name: row.get(name, "") for name in columns} for row in rows))


def _json_lines(text: str, name: str) -> list[Row]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [
        _json_row(_json(line, f"line {number} of {name!r}"), f"line {number} of {name!r}") for number, line in lines
    ]


def _json_list(text: str, name: str) -> list[Row]:
    content = _json(text, repr(name))
    if not isinstance(content, list):
        raise TrainingError(f"{name!r} must hold a list of JSON objects, or be .jsonl with an object a line")
    return [_json_row(item, f"item {number} of {name!r}") for number, item in enumerate(content, 1)]


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{where} is not JSON: {first_line(error)}") from None


def _json_row(item: object, where: str) -> Row:
    if not isinstance(item, dict):
        raise TrainingError(f"{where} is no JSON object; every row needs named columns")
    row = {}
    for key, value in item.items():
        if isinstance(value, str):
            row[key] = _without_surrogates(value, where)
        elif value is None:
            row[key] = ""
        elif isinstance(value, bool | int | float):
            row[key] = json.dumps(value)
        # Lists and objects are no text; a template that names their column finds it missing.
    return row


def _without_surrogates(value: str, where: str) -> str:
    if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise TrainingError(f"{where} holds half a character (a lone surrogate like \\ud800); mend it first")
    return value


def _csv(text: str, name: str) -> list[Row]:
    return _table(text, name, csv.excel)


def _tsv(text: str, name: str) -> list[Row]:
    return _table(text, name, _Tsv)


class _Tsv(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def _table(text: str, name: str, dialect: type[csv.Dialect]) -> list[Row]:
    csv.field_size_limit(max(len(text), 1))  # Python's own limit is 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""), dialect, strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or "" in header:
            raise TrainingError(f"the first line of {name!r} must name every column once, got {header[:8]}")
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise TrainingError(f"line {reader.line_num} of {name!r} has {len(values)} columns, not {len(header)}")
            rows.append(dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise TrainingError(f"line {reader.line_num} of {name!r} breaks the format: {first_line(error)}") from None
    return rows


_PARSERS: dict[str, Callable[[str, str], list[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".tsv": _tsv,
}
