"""A hub with the tiny bundle, and commands that ask it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TINY_BUNDLE, CommandResult, RunCommand
from tests.hub.stand_in import Hub, serving


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub whose model owner/tiny is the tiny bundle, with two files that are none of its."""
    files = {path.name: path.read_bytes() for path in TINY_BUNDLE.iterdir()}
    hub = Hub({"owner/tiny": files | {".gitattributes": b"x", "run.py": b"never to be fetched"}})
    with serving(hub):
        yield hub


class Commands:
    """Runs ``edgelm`` against the hub, with caches in a folder of the test."""

    def __init__(self, hub: Hub, folder: Path, run: RunCommand) -> None:
        self.hub, self.cache, self._run = hub, folder / "cache", run
        self.variables = hub.variables(folder)

    def __call__(self, *arguments: str, **variables: str) -> CommandResult:
        return self._run(*arguments, env=self.variables | variables)

    def bundles(self) -> list[Path]:
        """The folders of bundles that a program can see in the cache."""
        return [path for path in self.cache.glob("models/*/*") if len(path.name) == 40]


@pytest.fixture
def edgelm(hub: Hub, tmp_path: Path, edgelm_command: RunCommand) -> Commands:
    return Commands(hub, tmp_path, edgelm_command)
