"""A bundle that can chat, and servers of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from edgelm import Model, load
from tests.conftest import make_chat_bundle
from tests.serve.conftest import app_client


@pytest.fixture(scope="module")
def chat_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a chat template."""
    return make_chat_bundle(tmp_path_factory.mktemp("chat"))


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
