"""The page of an explanation in a browser: with and without JavaScript, on phones, in the dark, by keyboard."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.pictures.explanation_html import html_page
from edgelm.pictures.shares import level_of, percent, visible
from edgelm.scoring.explanation import Explanation
from tests.pictures.explanations import HOSTILE_TEXTS, explanation
from tests.serve.browsers import browser
from tests.serve.test_playground_access import CONTRASTS, UNNAMED

__all__ = ["browser"]  # fixtures

WORDS = ["Once", " upon", " a", " time", ",", " there", " was", " a", " cat"]


class Shown:
    """A page in a window of its own, and what it wrote on the console."""

    def __init__(self, browser: Any, file: Path, found: Explanation, **options: Any) -> None:
        file.write_text(html_page(found, "tiny"), encoding="utf-8")
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page = self.context.new_page()
        self.problems: list[str] = []
        requests: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: requests.append(request.url))
        self.page.goto(file.as_uri())
        assert requests == [file.as_uri()]

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(message.text)


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    opened: list[Shown] = []

    def open_page(found: Explanation, **options: Any) -> Shown:
        opened.append(Shown(browser, tmp_path / f"{len(opened)}.html", found, **options))
        return opened[-1]

    yield open_page
    for one in opened:
        one.context.close()
        assert one.problems == []


def test_tokens_tell_what_else_could_have_come_and_where_they_look(show: Any) -> None:
    found = explanation(WORDS)
    page = show(found).page
    tokens = page.locator(".explained .token")
    assert tokens.all_text_contents() == [*WORDS, " … "]
    tokens.nth(3).hover()
    expected = page.locator("#explained-expected")
    assert "What could have stood at ␣time" in expected.inner_text()
    assert expected.locator(".share-text").all_text_contents() == ["Once", "␣upon", "␣a", "␣time"]
    assert expected.locator(".share-number").last.text_content() == percent(float(np.exp(-0.3)))
    assert "not among the 3 likeliest" in expected.inner_text()
    mean = found.attentions.mean(axis=(0, 1))
    looked = page.locator("#explained-looked .share-row")
    order = np.argsort(-mean[3, :4], kind="stable")
    names = [f"{WORDS[j]} (itself)" if j == 3 else WORDS[j] for j in order.tolist()]
    assert looked.locator(".share-text").all_text_contents() == [visible(name) for name in names]
    shares = [float(text.rstrip("%")) for text in looked.locator(".share-number").all_text_contents()]
    assert shares == pytest.approx((100 * mean[3, order]).tolist(), abs=0.25)
    tokens.nth(0).hover()
    assert "nothing predicts it" in expected.inner_text()
    tokens.nth(9).hover()
    assert "What could come next" in expected.inner_text()
    assert page.locator("#explained-looked").is_hidden()


def test_layers_and_heads(show: Any) -> None:
    found = explanation(WORDS)
    page = show(found).page

    def largest() -> tuple[str, float]:
        row = page.locator("#explained-looked .share-row").first
        number = row.locator(".share-number").text_content() or ""
        return row.locator(".share-text").text_content() or "", float(number.rstrip("%")) / 100

    def expect(row: Any) -> None:
        name, share = largest()
        best = int(row.argmax())
        assert name == visible(f"{WORDS[best]} (itself)" if best == 8 else WORDS[best])
        assert share == pytest.approx(float(row[best]), abs=0.003)

    expect(found.attentions.mean(axis=(0, 1))[8])
    page.select_option("[aria-label=Layer]", "1")
    expect(found.attentions[1].mean(axis=0)[8])
    page.select_option("[aria-label=Head]", "2")
    expect(found.attentions[1, 2, 8])
    thumbnails = page.locator(".explained-heads [role=option]")
    assert thumbnails.count() == 6
    assert thumbnails.nth(5).get_attribute("aria-selected") == "true"
    thumbnails.nth(1).click()
    expect(found.attentions[0, 1, 8])
    assert page.input_value("[aria-label=Layer]") == "0" and page.input_value("[aria-label=Head]") == "1"
    page.get_by_role("button", name="Mean of all").click()
    expect(found.attentions.mean(axis=(0, 1))[8])


def test_the_map_is_drawn_and_tells_its_shares(show: Any) -> None:
    found = explanation(WORDS, layers=1, heads=1)
    page = show(found).page
    canvas = page.locator(".explained-map canvas")
    box = canvas.bounding_box()
    canvas.hover(position={"x": 2.5 * 22, "y": 5.5 * 22})
    share = float(found.attentions[0, 0, 5, 2])
    words = page.locator(".explained-attention .explained-note").inner_text()
    assert words.startswith("␣there looks at ␣a: ")
    assert float(words.rpartition(" ")[2].rstrip("%")) / 100 == pytest.approx(share, abs=0.003)
    assert "What could have stood at ␣there" in page.locator("#explained-expected").inner_text()
    alpha = """(canvas, [x, y]) => {
      const { data } = canvas.getContext("2d").getImageData(x * devicePixelRatio, y * devicePixelRatio, 1, 1);
      return [...data];
    }"""
    strong, weak = (int(found.attentions[0, 0, 8].argmax()), int(found.attentions[0, 0, 8].argmin()))
    page.mouse.move(box["x"] + 600, box["y"] - 60)
    pixels = {j: canvas.evaluate(alpha, [j * 22 + 10, 8 * 22 + 10]) for j in (strong, weak)}
    assert pixels[strong][3] > pixels[weak][3]
    assert canvas.evaluate(alpha, [8 * 22 + 10, 10]) == [0, 0, 0, 0], "nothing looks ahead"


def test_behind_a_prefix(show: Any) -> None:
    found = explanation(WORDS, prefix=4)
    page = show(found).page
    assert "behind a prefix of 4" in page.inner_text("header")
    page.locator(".explained .token").first.hover()
    rows = page.locator("#explained-looked .share-text").all_text_contents()
    assert sorted(rows) == ["Once␣(itself)", "prefix␣(4␣tokens)"]


def test_the_keyboard_is_enough(show: Any) -> None:
    page = show(explanation(WORDS)).page
    keys = page.keyboard
    focused = "document.activeElement.getAttribute('aria-label')"
    keys.press("Tab")
    assert page.evaluate(focused) == "␣cat, 44.9%"
    keys.press("ArrowLeft")
    assert page.evaluate(focused) == "␣a, 49.7%"
    assert page.locator("#explained-expected").inner_text().startswith("What could have stood at ␣a")
    keys.press("Home")
    assert page.evaluate(focused) == "Once, the first token"
    keys.press("End")
    assert page.evaluate(focused) == "What comes next"
    seen = []
    for _ in range(4):
        keys.press("Tab")
        seen.append(page.evaluate(focused) or page.evaluate("document.activeElement.tagName"))
    assert seen == ["Layer", "Head", "Layer 1, head 1", "SUMMARY"]
    page.focus("[aria-label='Layer 1, head 1']")
    keys.press("ArrowDown")
    assert page.evaluate(focused) == "Layer 2, head 1"
    keys.press("ArrowRight")
    assert page.evaluate(focused) == "Layer 2, head 2"
    assert page.input_value("[aria-label=Layer]") == "1"
    ring = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(ring) != "none"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_has_a_name(show: Any, scheme: str) -> None:
    page = show(explanation(WORDS), color_scheme=scheme).page
    page.locator(".explained .token:not(.next)").evaluate_all(
        "all => all.forEach((one, at) => { one.dataset.level = at % 6; })"
    )
    page.locator("summary").click()
    assert page.evaluate(CONTRASTS) == []
    assert page.evaluate(UNNAMED) == []


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_window_scrolls_sideways(show: Any, width: int) -> None:
    page = show(explanation(["x"] * 400, layers=1, heads=1), viewport={"width": width, "height": 800}).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    long = ["a-long-token-of-many-letters" * 3, *WORDS * 5, "\n", "日本語" * 9]
    page = show(explanation(long, layers=3, heads=25), viewport={"width": width, "height": 800}).page
    page.locator(".explained .token").first.hover()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_javascript(show: Any) -> None:
    page = show(explanation(WORDS), java_script_enabled=False).page
    assert page.locator("svg[role=img]").is_visible()
    assert page.locator("tbody tr").count() == len(WORDS) + 1
    assert page.locator("tbody tr").nth(1).is_visible()
    assert page.locator("tbody tr").nth(1).inner_text().split("\t")[:3] == ["2", "␣upon", "90.5%"]


def test_text_is_never_read_as_html(show: Any) -> None:
    page = show(explanation(HOSTILE_TEXTS)).page
    for place in range(len(HOSTILE_TEXTS)):
        page.locator(".explained .token").nth(place).dispatch_event("click")
        shown = page.locator("#explained-expected h3 b").text_content()
        assert shown == visible(HOSTILE_TEXTS[place]), "Python and JavaScript make the same of a text"
    assert page.locator("script").count() == 2


def test_python_and_javascript_have_the_same_rules(show: Any) -> None:
    shares = [1e-9, 9.9e-5, 1.01e-4, 0.00123, 0.011, 0.05, 0.0999, 0.101, 0.4996, 0.899, 0.9994, 0.9999, 0.99996, 1]
    found = explanation(["x"] * (1 + len(shares)))
    tokens = [replace(token, logprob=math.log(p)) for token, p in zip(found.tokens[1:], shares, strict=True)]
    page = show(replace(found, tokens=(found.tokens[0], *tokens))).page
    nodes = page.locator(".explained .token:not(.next)")
    labels = nodes.evaluate_all("all => all.map(one => one.ariaLabel)")
    assert labels[1:] == [f"x, {percent(math.exp(math.log(p)))}" for p in shares]
    levels = nodes.evaluate_all("all => all.map(one => Number(one.dataset.level))")
    assert levels[1:] == [level_of(math.exp(math.log(p))) for p in shares]
