"""Tables (CSV and TSV) as rows with named columns, and what is wrong with a table that cannot be read."""

import csv
import io
from pathlib import Path

from edgelm.errors import TrainingError

Row = dict[str, str]
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}


class _Tsv(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def read_table(text: str, path: Path) -> dict[str, Row]:
    """The rows of a table by their places, such as "line 3 of 'a.csv'".

    ``.csv`` is RFC 4180. In ``.tsv`` a quotation mark has no meaning. The first line names the columns, blanks around
    a name do not count, and empty lines are skipped.

    Raises:
        TrainingError: a line breaks the format; the message says in which line the cause is, and what to do.
    """
    is_csv = path.suffix.lower() == ".csv"
    dialect: type[csv.Dialect] = csv.excel if is_csv else _Tsv
    name = repr(str(path))
    # The limit is one of the whole process, so it is never lowered.
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    reader = csv.reader(io.StringIO(text, newline=""), dialect, strict=True)
    rows: dict[str, Row] = {}
    first, header = 1, list[str]()
    try:
        for values in reader:
            here, first = first, reader.line_num + 1
            if not values or (len(values) == 1 and not values[0].strip()):
                continue
            if not header:
                header = _header(values, here, name, dialect.delimiter)
                continue
            if not any(values[len(header) :]):
                values = values[: len(header)]  # a spreadsheet may end each line with separators of empty columns
            if len(values) != len(header):
                raise TrainingError(_ragged(values, header, here, reader.line_num, name, dialect))
            rows[f"line {here} of {name}"] = dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise TrainingError(_broken(error, first, reader.line_num, name)) from None
    return rows


def _header(values: list[str], line: int, name: str, delimiter: str) -> list[str]:
    header = [value.strip() for value in values]
    while len(header) > 1 and not header[-1]:
        header.pop()  # an empty column of a spreadsheet; a value under it is found as one too many
    if len(header) == 1 and (found := _other_delimiter(header[0], delimiter)):
        remedy = "write it with commas (in a spreadsheet: save as CSV, separated by commas)"
        if {found, delimiter} == {",", "\t"}:
            remedy = f"name the file .{'tsv' if found == '	' else 'csv'}"
        usual = _DELIMITERS[delimiter]
        raise TrainingError(f"line {line} of {name} separates columns by {_DELIMITERS[found]}, not {usual}; {remedy}")
    twice = next((column for column in header if header.count(column) > 1), None)
    if "" in header:
        message = f"line {line} of {name} must name every column once, but column {header.index('') + 1} has no name"
        raise TrainingError(f"{message}: give it one, or remove it")
    if twice is not None:
        raise TrainingError(f"line {line} of {name} must name every column once, but has {twice!r} twice: rename one")
    return header


def _other_delimiter(header: str, delimiter: str) -> str | None:
    """The character that seems to stand between the columns of a header; None where there is only one column."""
    found = [mark for mark in _DELIMITERS if mark != delimiter and mark in header]
    return max(found, key=header.count) if found else None


def _ragged(values: list[str], header: list[str], line: int, last: int, name: str, dialect: type[csv.Dialect]) -> str:
    place = f"line {line} of {name}" if last == line else f"the row in lines {line} to {last} of {name}"
    counted = f"{place} has {len(values)} columns, not {len(header)}"
    if len(values) > len(header):
        if dialect.delimiter == "\t":
            return f"{counted}: a value in TSV cannot contain a tab; remove it"
        if any(value.lstrip().startswith('"') for value in values):
            return f"{counted}: a quotation mark after a blank opens no value; remove the blank after the comma"
        return f'{counted}: put a value that contains a comma into quotation marks, "like, this"'
    if last > line:
        return (
            f'{counted}: a quotation mark in line {line} seems not to be closed; close it, or write "" inside a value'
        )
    found = _other_delimiter(values[0], dialect.delimiter) if len(values) == 1 else None
    if found:
        return f"{counted}: write {_DELIMITERS[dialect.delimiter]} between them, as in the first line"
    return f"{counted}: add what is missing, or the separators of empty values"


def _broken(error: csv.Error, first: int, last: int, name: str) -> str:
    if "unexpected end" in str(error) or ("expected after" in str(error) and last > first):
        message = f"line {first} of {name} breaks the format: a quotation mark in it is never closed"
        return f'{message}; close it, or write "" for a mark inside a quoted value'
    message = f"line {last} of {name} breaks the format"
    if "expected after" in str(error):
        return f'{message}: text stands after a closing quotation mark; write "" for a mark inside a quoted value'
    if "new-line" in str(error):
        return f"{message}: it has a carriage return inside a value; put the value into quotation marks"
    return f"{message}: {error}"
