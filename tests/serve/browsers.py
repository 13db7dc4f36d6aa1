"""Chromium for tests of the playground, and servers that it visits."""

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("playwright", reason='the browser is driven by playwright: pip install ".[browser]"')

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from edgelm import load
from edgelm.bundle.folder import Bundle
from edgelm.serve.settings import ServeSettings
from edgelm.serve.shelf import Place, ServedModel, Shelf, place_of
from tests.conftest import TINY_BUNDLE
from tests.serve.chat_servers import chat_bundle
from tests.serve.conftest import Running, loaded, running_server

__all__ = ["chat_bundle"]  # fixtures

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PLAIN, CHATTY, SLOW = "tiny-gpt2", "chatty", "slow"
"""The names of the models: the tiny bundle, the same with a chat template, and one that takes its time."""
TOKEN_SECONDS = 0.1
"""The slow model takes so long for a token, so that a text of 40 tokens is surely unfinished after its first one."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser without windows."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )  # root and containers have no sandbox
        yield browser
        browser.close()


def _slowly(ids: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    time.sleep(TOKEN_SECONDS)
    return logits


def _load(place: Place, settings: ServeSettings, base: ServedModel | None) -> ServedModel:
    if place.name != SLOW:
        return loaded(place, base, settings)
    model = load(place.bundle.path, device="cpu", threads=1)
    model.generation_config = model.generation_config.updated({"logits_processor": (_slowly,)})
    return ServedModel(place.name, model, model.scheduler())


@pytest.fixture(scope="module")
def server(chat_bundle: Path) -> Iterator[Running]:
    """A server of three models."""
    settings = ServeSettings(port=0)
    folders = {PLAIN: TINY_BUNDLE, CHATTY: chat_bundle, SLOW: TINY_BUNDLE}
    places = [place_of(Bundle.read(folder), name) for name, folder in folders.items()]
    shelf = Shelf(places, settings, lambda place, base: _load(place, settings, base))
    with running_server(settings, shelf=shelf) as running:
        yield running


@dataclass
class Visit:
    """A tab that shows the playground, and what was seen of it."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)
    """What the page wrote on the console as an error, and exceptions that nothing caught."""
    requests: list[str] = field(default_factory=list)
    """All addresses that it asked for."""

    def __post_init__(self) -> None:
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._request)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _request(self, request: Request) -> None:
        self.requests.append(request.url)

    def open(self) -> None:
        """Load the page, or load it again."""
        self.page.goto(self.url)
        self.page.wait_for_selector("body[data-ready]")

    def set(self, **options: object) -> None:
        """Give options values."""
        for name, value in options.items():
            control = self.page.locator(f"#option-{name}")
            if not control.is_visible():
                self.page.locator("details", has=control).locator("summary").click()
            if control.evaluate("one => one.tagName") == "SELECT":
                control.select_option(str(value))
            else:
                control.fill(str(value))

    def run(self, prompt: str, **options: object) -> str:
        """Complete `prompt`; the text."""
        self.set(**options)
        self.page.fill("#prompt", prompt)
        self.page.click("#run")
        return self.finished()

    def begun(self) -> None:
        """Wait for the first piece of text."""
        self.page.locator("#results .text").filter(has_text=re.compile(r"\S")).wait_for()

    def finished(self, place: str = "#results") -> str:
        """The text of the last result in `place`, once it is complete."""
        result = self.page.locator(f"{place} .result").last
        result.and_(self.page.locator("[aria-busy=false]")).wait_for()
        return result.locator(".text, .tokens").first.text_content() or ""


@pytest.fixture
def visit(browser: Browser, server: Running) -> Iterator[Visit]:
    """The playground in a window of its own. The test fails if anything goes wrong on the console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    visit = Visit(context.new_page(), f"{server.url}/")
    visit.open()
    yield visit
    context.close()
    assert visit.errors == []
    assert {url for url in visit.requests if not url.startswith(visit.url)} == set()
