"""The chat template of a checkpoint, in each of the places where transformers looks for it."""

import json
from pathlib import Path
from typing import Any

import pytest

from edgelm.bundle.chat_template import ChatTemplate
from edgelm.errors import ExportError
from edgelm_export.source.chat_template import read_source_template

pytestmark = pytest.mark.export

TOKENS: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "add_bos_token": True}


def folder(place: Path, template: Any, **files: str) -> Path:
    place.joinpath("tokenizer_config.json").write_text(json.dumps(TOKENS | {"chat_template": template}))
    for name, text in files.items():
        path = place / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".jinja").write_text(text)
    return place


@pytest.mark.parametrize(
    ("stated", "files", "templates"),
    [
        ("{{ m }}", {}, {"default": "{{ m }}"}),
        (
            [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}],
            {},
            {"default": "a", "tool_use": "b"},
        ),
        ("old", {"chat_template": "new"}, {"default": "new"}),
        (
            None,
            {"chat_template": "a", "additional_chat_templates__rag": "b"},
            {"default": "a", "rag": "b"},
        ),
    ],
    ids=["text", "list", "file", "files"],
)
def test_templates_are_found_where_transformers_finds_them(
    stated: Any, files: dict[str, str], templates: dict[str, str], tmp_path: Path
) -> None:
    assert read_source_template(folder(tmp_path, stated, **files)) == ChatTemplate(
        templates, {"bos_token": "<s>", "eos_token": "</s>"}
    )


def test_a_checkpoint_without_a_template_has_none(tmp_path: Path) -> None:
    assert read_source_template(tmp_path) is None
    assert read_source_template(folder(tmp_path, None)) is None


@pytest.mark.parametrize("stated", [7, [1], [{"name": "x"}], {"name": "x"}, [{"name": "x", "template": 7}], []])
def test_what_is_no_template_is_refused(stated: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="chat_template"):
        read_source_template(folder(tmp_path, stated))
