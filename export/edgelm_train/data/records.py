"""Files of records: JSON Lines, JSON, TSV and CSV."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import TrainingError
from edgelm_export.source.hub import first_line
from edgelm_train.data.tables import Row, read_table
from edgelm_train.data.text_file import check_file, read_text_file

MAX_FILE_BYTES = 2**31
"""A file of records is read into memory as a whole."""
_TURN_KEYS = (("role", "content"), ("from", "value"))
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


@dataclass(frozen=True)
class Records:
    """The rows of one file. Every row has every column; a value that the file does not give is empty."""

    columns: tuple[str, ...]
    """Columns of text. A column with a list or an object in any row is none of them."""
    rows: tuple[Row, ...]
    places: tuple[str, ...]
    """Where each row stands, for messages: "line 3 of 'a.jsonl'"."""
    nested: Mapping[str, str]
    """What each other column is, and where: "a list in line 1 of 'a.jsonl'"."""
    values: tuple[Mapping[str, object], ...]
    """All values of each row, those of nested columns too, as JSON gives them."""


def is_records_file(path: Path) -> bool:
    """Whether `path` names a file of records; the suffix alone decides."""
    return path.suffix.lower() in SUFFIXES


def read_records(path: Path) -> Records:
    """Read a file of records; its suffix says the format.

    ``.jsonl`` and ``.ndjson`` have a JSON object in each line, ``.json`` has a list of objects. A list of objects in
    the place of a row is taken as its column "messages". Numbers, true and false become their JSON text; null becomes
    the empty string. ``.csv`` (RFC 4180) and ``.tsv`` name the columns in their first line; a quotation mark has no
    meaning in TSV, as in GLUE's files. The encoding is UTF-8. A byte order mark and empty lines are skipped.

    Raises:
        TrainingError: the file cannot be read, is too large, is not UTF-8, breaks its format, or has no rows.
    """
    if not is_records_file(path):
        raise TrainingError(f"{str(path)!r} is not a file of records: its name must end in {', '.join(SUFFIXES)}")
    check_file(path)
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise TrainingError(f"{str(path)!r} has {size:,} bytes, the limit is {MAX_FILE_BYTES:,}; split the file")
    _, text = read_text_file(path)
    suffix, name = path.suffix.lower(), str(path)
    values: Mapping[str, Mapping[str, object]]
    if suffix in (".csv", ".tsv"):
        values = read_table(text, path)
    else:
        items = _json_list(text, name) if suffix == ".json" else _json_lines(text, name)
        values = {where: _named(item, where) for where, item in items.items()}
    if not values:
        raise TrainingError(f"{name!r} has no rows; give a file with examples")
    nested: dict[str, str] = {}
    for where, row in values.items():
        for column, value in row.items():
            if isinstance(value, list | dict):
                nested.setdefault(column, f"{'a list' if isinstance(value, list) else 'an object'} in {where}")
    columns = tuple(dict.fromkeys(column for row in values.values() for column in row if column not in nested))
    rows = tuple({name: _text(row.get(name), where) for name in columns} for where, row in values.items())
    return Records(columns, rows, tuple(values), nested, tuple(values.values()))


def _json_lines(text: str, name: str) -> dict[str, object]:
    items: dict[str, object] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"line {number} of {name!r}"
            try:
                items[where] = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TrainingError(_no_json_line(text, line, where, error)) from None
    return items


def _no_json_line(text: str, line: str, where: str, error: Exception) -> str:
    """Why a line is not JSON, where the cause can be seen."""
    wrong, start = f"{where} is not JSON", line.strip()
    if text.lstrip().startswith("[") and _is_json(text):
        return f"{wrong}: the file is one JSON list over several lines; name it .json"
    if start.endswith(",") and _is_json(start[:-1]):
        return f"{wrong}: a comma follows its object; remove it, because every line stands for itself"
    if start in ("{", "[") or (start.startswith("{") and not start.endswith("}")):
        return f"{wrong}: an object must begin and end in one line"
    if start.startswith("{'") and start.endswith("}"):
        return f"{wrong}: its strings are in single quotation marks, as Python prints them; write it with json.dumps"
    return f"{wrong}: {_reason(error)}"


def _reason(error: Exception) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return first_line(error)
    place = f"at character {error.colno}" + (f" of line {error.lineno}" if "\n" in error.doc else "")
    if error.doc[error.pos : error.pos + 1] in ("]", "}") and error.doc[: error.pos].rstrip().endswith(","):
        return f"a comma stands before the closing bracket {place}; remove it"
    return f"{error.msg} {place}"


def _json_list(text: str, name: str) -> dict[str, object]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and all(_is_json(line) for line in lines[:2]):
            raise TrainingError(
                f"{name!r} is not JSON as a whole: it has one object in each line; name it .jsonl"
            ) from None
        raise TrainingError(f"{name!r} is not JSON: {_reason(error)}") from None
    if isinstance(content, dict):
        inner = [key for key, value in content.items() if isinstance(value, list) and value]
        hint = f"; write the list in {inner[0]!r} alone" if len(inner) == 1 else ""
        raise TrainingError(
            f"{name!r} must contain a list of JSON objects, and is one object{hint}; a file with one object in each "
            "line is named .jsonl"
        )
    if not isinstance(content, list):
        raise TrainingError(f"{name!r} must contain a list of JSON objects")
    return {f"item {number} of {name!r}": item for number, item in enumerate(content, 1)}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _named(item: object, where: str) -> Mapping[str, object]:
    if is_chat(item):
        return {"messages": item}
    if isinstance(item, list):
        raise TrainingError(f"{where} is a list, not a JSON object; a file that is one list of objects is named .json")
    if not isinstance(item, dict):
        raise TrainingError(f'{where} is not a JSON object; every row needs named columns, like {{"text": "..."}}')
    return item


def is_chat(value: object) -> bool:
    """Whether a JSON value is a list of turns, each an object that says who speaks."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and turn_keys(part) for part in value)


def turn_keys(turn: Mapping[str, object]) -> tuple[str, str] | None:
    """The keys of role and content in a turn, as OpenAI or as ShareGPT names them; None where there are none."""
    return next((keys for keys in _TURN_KEYS if keys[0] in turn), None)


def _text(value: object, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        return json.dumps(value)
    check_whole_characters(value, where)
    return value


def check_whole_characters(text: str, where: str) -> None:
    """Raises TrainingError where `text` has half of a character, which JSON can write and no tokenizer reads."""
    if not text.isascii() and any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise TrainingError(f"{where} contains half a character (a lone surrogate like \\ud800); correct it")
