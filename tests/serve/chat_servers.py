"""A bundle that can chat, and servers of it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from edgelm import Model, load
from edgelm.bundle.chat_template import CHAT_TEMPLATE_FILE
from tests.conftest import TINY_BUNDLE, replace_file
from tests.serve.conftest import app_client

# Short, because the context of the tiny bundle is 64 tokens.
TEMPLATE = """{% for m in messages -%}
{% if m.content == 'refuse' %}{{ raise_exception('not that') }}{% endif -%}
{{ m.role[0] }}:{{ m.content }}{{ eos_token }}
{%- endfor %}a:"""


@pytest.fixture(scope="module")
def chat_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a chat template."""
    bundle = Path(shutil.copytree(TINY_BUNDLE, tmp_path_factory.mktemp("chat") / "tiny"))
    content = {"templates": {"default": TEMPLATE}, "special_tokens": {"eos_token": "<|endoftext|>"}}
    replace_file(bundle, CHAT_TEMPLATE_FILE, json.dumps(content).encode())
    return bundle


@pytest.fixture(scope="module")
def chat_client(chat_bundle: Path) -> Iterator[TestClient]:
    """A client of an app whose model can chat."""
    with app_client(bundle=chat_bundle) as client:
        yield client


@pytest.fixture(scope="module")
def chat_model(chat_bundle: Path) -> Iterator[Model]:
    """The model that the servers have."""
    with load(chat_bundle, device="cpu", threads=1) as model:
        yield model
