"""Files of records (JSON Lines, JSON, TSV, CSV), and templates that turn a row into a prompt and a completion."""

import csv
import io
import json
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgelm.errors import ConfigError, TrainingError
from edgelm_export.source.hub import first_line

MAX_FILE_BYTES = 2**31
"""A file of records is read into memory as a whole."""
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}

Row = dict[str, str]


@dataclass(frozen=True)
class Records:
    """The rows of one file. Every row has every column; a value that the file does not give is empty."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def is_records_file(path: Path) -> bool:
    """Whether `path` names a file of records; the suffix alone decides."""
    return path.suffix.lower() in _PARSERS


def read_records(path: Path) -> Records:
    """Read a file of records; its suffix says the format.

    ``.jsonl`` and ``.ndjson`` have a JSON object in each line, ``.json`` has a list of objects. Numbers, true and false
    become their JSON text; null becomes the empty string. ``.csv`` (RFC 4180) and ``.tsv`` name the columns in their
    first line; a quotation mark has no meaning in TSV, as in GLUE's files. The encoding is UTF-8. A byte order mark and
    empty lines are skipped.

    Raises:
        TrainingError: the file cannot be read, is too large, is not UTF-8, breaks its format, or has no rows.
    """
    if not is_records_file(path):
        raise TrainingError(f"{str(path)!r} is not a file of records: its name must end in {', '.join(_PARSERS)}")
    parse = _PARSERS[path.suffix.lower()]
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TrainingError(f"{str(path)!r} has {size:,} bytes, the limit is {MAX_FILE_BYTES:,}; split the file")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{str(path)!r} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise TrainingError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    if "\0" in text:
        raise TrainingError(f"{str(path)!r} contains NUL bytes: it is not a text file")
    rows = parse(text, str(path))
    if not rows:
        raise TrainingError(f"{str(path)!r} has no rows; give a file with examples")
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return Records(columns, tuple({name: row.get(name, "") for name in columns} for row in rows))


@dataclass(frozen=True)
class Template:
    """Text with column names in braces, as in Python's ``str.format``; ``{{`` and ``}}`` stand for braces."""

    parts: tuple[tuple[str, str | None], ...]
    """Pairs of a text and the column whose value follows it; None where no column follows."""

    @classmethod
    def parse(cls, text: str) -> "Template":
        r"""Read a template as it is typed in a shell, where ``\n`` is a new line, ``\t`` a tab and ``\\`` a backslash.

        Raises:
            ConfigError: a brace has no partner, or encloses something other than the name of a column.
        """
        try:
            parts = list(string.Formatter().parse(unescaped(text)))
        except ValueError as error:
            raise ConfigError(f"the template {text!r} cannot be read: {error}; write {{{{ for a brace") from None
        for _, name, spec, conversion in parts:
            if name == "" or spec or conversion:
                raise ConfigError(f"the template {text!r} must have names of columns in its braces, like {{text}}")
        return cls(tuple((literal, name) for literal, name, _, _ in parts))

    @property
    def columns(self) -> tuple[str, ...]:
        """The column names, each once."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    def fill(self, row: Mapping[str, str]) -> str:
        """The text for one row, which must have all `columns`."""
        return "".join(literal + ("" if name is None else row[name]) for literal, name in self.parts)

    def shown(self) -> str:
        """The text with each column as its name in braces."""
        return self.fill({name: f"{{{name}}}" for name in self.columns})


@dataclass(frozen=True)
class Task:
    """Templates that turn a row into a prompt and a completion.

    The space between the two belongs to the completion, because a byte-level vocabulary joins a space to the word after
    it, and the runtime encodes the prompt alone.
    """

    prompt: Template
    completion: Template

    @classmethod
    def parse(cls, prompt: str | None, completion: str | None) -> "Task":
        """Read both templates; if both are None, the columns ``prompt`` and ``completion`` are taken as they are.

        Raises:
            ConfigError: only one template is given, a template cannot be read, or the completion names no column.
        """
        if (prompt is None) != (completion is None):
            raise ConfigError("a template for the prompt needs one for the completion, and the other way round")
        if prompt is None or completion is None:
            prompt, completion = "{prompt}", "{completion}"
        task = cls(Template.parse(prompt), Template.parse(completion))
        if not task.completion.columns:
            raise ConfigError(f"the completion template {completion!r} names no column: there is nothing to learn")
        return task


def unescaped(text: str) -> str:
    r"""`text` as it is typed in a shell, with ``\n`` made a new line, ``\t`` a tab, and ``\\`` one backslash."""
    return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match[0]], text)


def _json_lines(text: str, name: str) -> list[Row]:
    lines = {f"line {number} of {name!r}": line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    return [_json_row(_json(line, where), where) for where, line in lines.items()]


def _json_list(text: str, name: str) -> list[Row]:
    content = _json(text, repr(name))
    if not isinstance(content, list):
        raise TrainingError(
            f"{name!r} must contain a list of JSON objects; a file with one object in each line is named .jsonl"
        )
    return [_json_row(item, f"item {number} of {name!r}") for number, item in enumerate(content, 1)]


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{where} is not JSON: {first_line(error)}") from None


def _json_row(item: object, where: str) -> Row:
    if not isinstance(item, dict):
        raise TrainingError(f"{where} is not a JSON object; every row needs named columns")
    row = {}
    for key, value in item.items():
        if isinstance(value, str):
            if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
                raise TrainingError(f"{where} contains half a character (a lone surrogate like \\ud800); correct it")
            row[key] = value
        elif value is None:
            row[key] = ""
        elif isinstance(value, bool | int | float):
            row[key] = json.dumps(value)
        # Lists and objects have no text form here; a template that names such a column finds it missing.
    return row


class _Tsv(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def _table(text: str, name: str, dialect: type[csv.Dialect] = csv.excel) -> list[Row]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # of the whole process, so it is never lowered
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
    ".csv": _table,
    ".tsv": partial(_table, dialect=_Tsv),
}
