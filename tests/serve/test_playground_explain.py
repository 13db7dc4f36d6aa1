"""The playground's tab that explains texts."""

import json
from typing import Any

import httpx
import pytest

from tests.serve.browsers import CHATTY, PLAIN, Visit, browser, chat_bundle, server, visit
from tests.serve.conftest import Running, wait_until
from tests.serve.test_playground_access import CONTRASTS, UNNAMED

__all__ = ["browser", "chat_bundle", "server", "visit"]  # fixtures

TEXT = "Hello there, my friend"


def explain(visit: Visit, text: str) -> Any:
    """Explain `text`; the tokens that are shown."""
    visit.page.get_by_role("tab", name="Explain").click()
    visit.page.fill("#explain-text", text)
    visit.page.click("#explain-run")
    visit.page.wait_for_selector("#explain-stop", state="hidden")
    visit.page.wait_for_selector("#explanation .explained")
    return visit.page.locator("#explanation .token")


def test_a_text_is_explained(visit: Visit, server: Running) -> None:
    expected = httpx.post(f"{server.url}/v1/explain", json={"text": TEXT, "top": 8}).json()
    page = visit.page
    page.select_option("#model", CHATTY)
    with page.expect_request("**/v1/explain") as sent:
        tokens = explain(visit, TEXT)
    assert json.loads(sent.value.post_data or "") == {"model": CHATTY, "text": TEXT, "top": 8}
    assert tokens.all_text_contents() == [*(token["text"] for token in expected["tokens"]), " … "]
    assert page.locator("aside.options").is_hidden()
    assert page.locator("#compare").is_hidden()
    assert page.inner_text(".explanation-head").startswith(f"{len(expected['tokens'])} tokens · 2 layers of 4 heads")
    assert page.text_content("#status") == f"Done: {len(expected['tokens'])} tokens · 2 layers of 4 heads."
    tokens.nth(2).hover()
    top = page.locator("#explained-expected .share-text").all_text_contents()
    assert top[:8] == [one["text"].replace(" ", "␣") or "(nothing)" for one in expected["tokens"][2]["top"]]
    page.locator(".explained-heads [role=option]").nth(6).click()
    assert page.input_value("[aria-label=Layer]") == "1" and page.input_value("[aria-label=Head]") == "2"
    page.get_by_role("tab", name="Complete").click()
    assert page.locator("aside.options").is_visible()
    visit.open()
    assert page.input_value("#explain-text") == TEXT, "a reload keeps it"


def test_a_result_is_explained(visit: Visit) -> None:
    page = visit.page
    text = visit.run("Hello", max_tokens=5, seed=7)
    page.locator("#results").get_by_role("button", name="Explain").click()
    page.wait_for_selector("#explanation .explained")
    assert page.get_by_role("tab", name="Explain").get_attribute("aria-selected") == "true"
    assert page.input_value("#explain-text") == f"Hello{text}"
    assert page.input_value("#model") == PLAIN


def test_errors_show_where_they_belong(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("tab", name="Explain").click()
    page.fill("#explain-text", "word " * 100)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#explain-error:not([hidden])")
    assert "context" in (page.text_content("#explain-error") or "")
    assert page.get_attribute("#explain-text", "aria-invalid") == "true"
    page.fill("#explain-text", "word")
    assert page.locator("#explain-error").is_hidden()
    page.context.set_offline(True)
    page.click("#explain-run")
    page.wait_for_selector("#explanation [role=alert]")
    page.context.set_offline(False)
    explain(visit, "word")
    assert page.locator("#explanation [role=alert]").count() == 0
    assert len(visit.errors) == 2 and all(error.startswith("Failed to load resource") for error in visit.errors)
    visit.errors.clear()


def test_stop(visit: Visit) -> None:
    page = visit.page
    page.route("**/v1/explain", lambda route: None)  # never answered
    page.get_by_role("tab", name="Explain").click()
    page.fill("#explain-text", TEXT)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#explain-stop:not([hidden])")
    page.keyboard.press("Escape")
    page.wait_for_selector("#explain-stop", state="hidden")
    assert page.locator("#explanation .explained, #explanation [role=alert]").count() == 0


@pytest.mark.parametrize("width, scheme", [(360, "dark"), (1280, "light")])
def test_it_can_be_read_on_phones_and_desktops(visit: Visit, width: int, scheme: Any) -> None:
    page = visit.page
    page.set_viewport_size({"width": width, "height": 780})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.locator(f"html[data-theme={scheme}]").wait_for()
    tokens = explain(visit, f"{TEXT} a-long-word")
    tokens.nth(3).hover()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#explanation .token:not(.next)").evaluate_all(
        "all => all.forEach((one, place) => { one.dataset.level = place % 6; })"
    )
    assert page.evaluate(CONTRASTS) == []
    assert page.evaluate(UNNAMED) == []


def test_the_theme_redraws_the_maps(visit: Visit) -> None:
    page = visit.page
    explain(visit, TEXT)
    pixel = "document.querySelector('.explained-map canvas').getContext('2d').getImageData(5, 5, 1, 1).data.join()"
    light = page.evaluate(pixel)
    page.click("#theme")
    wait_until(lambda: page.evaluate(pixel) != light)
    page.click("#theme")
    wait_until(lambda: page.evaluate(pixel) == light)


def test_the_arrow_keys_move_among_the_tabs(visit: Visit) -> None:
    page = visit.page
    page.focus("#tab-complete")
    for key, tab in (("ArrowLeft", "explain"), ("ArrowRight", "complete"), ("ArrowRight", "chat")):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.id") == f"tab-{tab}"
        assert page.locator(f"#{tab}").is_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.get_attribute(".skip", "href") == "#explain-text"
