"""The chat template in a bundle is data: read strictly, never run."""

import json
from pathlib import Path

import pytest

from edgelm.bundle.chat_template import (
    CHAT_TEMPLATE_FILE,
    MAX_CHAT_TEMPLATE_BYTES,
    MAX_TEMPLATE_CHARACTERS,
    ChatTemplate,
    read_chat_template,
)
from edgelm.bundle.folder import Bundle
from edgelm.errors import BundleError
from tests.conftest import replace_file

TEMPLATE = ChatTemplate({"default": "{{ messages }}"}, {"eos_token": "<|end|>"})


def with_template(bundle: Path, content: bytes) -> Bundle:
    replace_file(bundle, CHAT_TEMPLATE_FILE, content)
    return Bundle.read(bundle)


def test_a_template_is_read_as_it_was_written(tiny_copy: Path) -> None:
    assert read_chat_template(Bundle.read(tiny_copy)) is None
    content = {"templates": TEMPLATE.templates, "special_tokens": TEMPLATE.special_tokens}
    assert read_chat_template(with_template(tiny_copy, json.dumps(content).encode())) == TEMPLATE


def test_a_template_may_be_as_long_as_the_renderer_takes(tiny_copy: Path) -> None:
    template = ChatTemplate({"default": "x" * MAX_TEMPLATE_CHARACTERS}, {})
    content = {"templates": template.templates, "special_tokens": {}}
    assert read_chat_template(with_template(tiny_copy, json.dumps(content).encode())) == template
    content["templates"]["default"] += "x"
    with pytest.raises(BundleError, match=r"templates.default is longer than 65536 characters"):
        read_chat_template(with_template(tiny_copy, json.dumps(content).encode()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "must be an object"),
        (b"{", "not valid JSON"),
        (b'{"templates": {"default": 7}, "special_tokens": {}}', "templates.default"),
        (b'{"templates": {}, "special_tokens": {}, "code": ""}', "code"),
        (b" " * (MAX_CHAT_TEMPLATE_BYTES + 1), "1,048,577 bytes"),
    ],
    ids=["list", "damaged", "number", "unknown", "large"],
)
def test_damaged_templates_are_refused_by_name(content: bytes, message: str, tiny_copy: Path) -> None:
    bundle = with_template(tiny_copy, content)
    with pytest.raises(BundleError, match=message) as caught:
        read_chat_template(bundle)
    assert CHAT_TEMPLATE_FILE in str(caught.value)
