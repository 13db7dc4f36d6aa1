"""Reads the chat template of a checkpoint, in each of the places where transformers looks for it."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgelm.bundle.chat_template import CHAT_TEMPLATE_FILE, MAX_CHAT_TEMPLATE_BYTES, ChatTemplate
from edgelm.errors import ExportError
from edgelm_export.source.hub import read_json, read_text

JINJA_FILE = "chat_template.jinja"
_CHAT_FILES = frozenset({JINJA_FILE, "tokenizer_config.json", "special_tokens_map.json"})
_FURTHER = "additional_chat_templates"
_DEFAULT = "default"


def chat_files(names: Iterable[str]) -> set[str]:
    """Those of the files `names` of a checkpoint that `read_source_template` reads."""
    return {name for name in names if name in _CHAT_FILES or re.fullmatch(rf"{_FURTHER}/[^/]+\.jinja", name)}


def read_source_template(folder: Path) -> ChatTemplate | None:
    """The chat template in the checkpoint `folder`; None where it has none.

    A file of its own counts more than the tokenizer's config, as in transformers.

    Raises:
        ExportError: a file cannot be read, or a template is no text.
    """
    config = _optional_json(folder / "tokenizer_config.json")
    templates: dict[str, str] = {}
    if (folder / JINJA_FILE).is_file():
        templates[_DEFAULT] = read_text(folder / JINJA_FILE, "chat template", MAX_CHAT_TEMPLATE_BYTES)
        for path in sorted((folder / _FURTHER).glob("*.jinja")):
            templates[path.stem] = read_text(path, "chat template", MAX_CHAT_TEMPLATE_BYTES)
    else:
        templates = _stated(config.get("chat_template"), folder)
    if not templates:
        return None
    stated = _optional_json(folder / "special_tokens_map.json") | config
    tokens = {name: _text(value) for name, value in stated.items() if name.endswith("_token")}
    return ChatTemplate(templates, {name: text for name, text in tokens.items() if text is not None})


def write_source_template(template: ChatTemplate, folder: Path) -> None:
    """State `template` in the tokenizer_config.json of a checkpoint, where `read_source_template` finds it."""
    path = folder / "tokenizer_config.json"
    named = [{"name": name, "template": text} for name, text in template.templates.items()]
    only = template.templates.get(_DEFAULT) if len(named) == 1 else None
    content = read_json(path) | template.special_tokens | {"chat_template": named if only is None else only}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_chat_template(template: ChatTemplate, folder: Path) -> None:
    """Write the file of a bundle."""
    content = {"templates": template.templates, "special_tokens": template.special_tokens}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / CHAT_TEMPLATE_FILE).write_text(text + "\n", encoding="utf-8", newline="\n")


def _stated(value: Any, folder: Path) -> dict[str, str]:
    """The templates that a tokenizer's config states: a text, or a list of names and texts."""
    if value is None:
        return {}
    entries = [{"name": _DEFAULT, "template": value}] if isinstance(value, str) else value
    try:
        found = {entry["name"]: entry["template"] for entry in entries}
    except (TypeError, KeyError):
        found = {}
    if not found or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise ExportError(f"the chat_template in tokenizer_config.json of {str(folder)!r} is no template: remove it")
    return found


def _text(value: Any) -> str | None:
    """The text of a special token, which is a string or an object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
