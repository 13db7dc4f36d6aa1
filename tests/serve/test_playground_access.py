"""The playground for everybody: on phones, in the dark, without a mouse, and for screen readers."""

from typing import Any

import pytest

from tests.serve.browsers import Visit, browser, chat_bundle, server, visit

__all__ = ["browser", "chat_bundle", "server", "visit"]  # fixtures


def test_a_phone_needs_no_sideways_scrolling(visit: Visit) -> None:
    page = visit.page
    page.set_viewport_size({"width": 360, "height": 740})
    visit.open()
    assert page.locator("#options").is_hidden()
    page.click("#options-toggle")

    def fits() -> bool:
        return bool(page.evaluate("document.documentElement.scrollWidth <= 360"))

    assert fits()
    page.click("#compare")
    page.click("#complete [data-view=tokens]")
    visit.run("a-long-word-" * 5, max_tokens=10)
    assert fits()
    for summary in page.locator("#options summary").all()[1:]:
        summary.click()
    assert fits()
    page.locator("#results .token").last.focus()
    tip = page.locator("#tip").bounding_box()
    assert tip and tip["x"] >= 0 and tip["x"] + tip["width"] <= 360
    page.click("#code-button")
    assert fits()
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Chat").click()
    assert fits()


def test_dark_and_light(visit: Visit) -> None:
    page = visit.page
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    page.locator("html[data-theme=dark]").wait_for()
    assert page.evaluate(background) != light
    page.click("#theme")
    assert page.evaluate(background) == light
    visit.open()
    assert page.evaluate(background) == light
    assert page.get_attribute("#theme", "aria-label") == "Switch to the dark theme"


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => top.slice(0, 3).map((value, i) => value * top[3] + below[i] * (1 - top[3]));
  const background = (node) => {
    const layers = [];
    for (let one = node; one; one = one.parentElement) layers.push(rgba(getComputedStyle(one).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const poor = [];
  const check = (node, color, words) => {
    const below = background(node);
    const pair = [light(over(rgba(color), below)), light(below)].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) poor.push(`${words.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (walker.currentNode.data.trim() && node.checkVisibility() && node.tagName !== "NOSCRIPT") {
      check(node, getComputedStyle(node).color, walker.currentNode.data);
    }
  }
  for (const field of document.querySelectorAll("input[type=text], textarea, select")) {
    if (!field.checkVisibility()) continue;
    check(field, getComputedStyle(field).color, field.id);
    check(field, getComputedStyle(field, "::placeholder").color, `${field.id} (placeholder)`);
  }
  return poor;
}"""
UNNAMED = """() => [...document.querySelectorAll("button, select, textarea, input, [role], dialog, summary")]
  .filter((one) => one.getAttribute("aria-hidden") !== "true" && !["status", "alert", "tooltip"].includes(one.role))
  .filter((one) => {
    const by = (one.getAttribute("aria-labelledby") ?? "").split(" ").map((id) => document.getElementById(id));
    const text = ["BUTTON", "SUMMARY"].includes(one.tagName) || one.role === "option" ? one.textContent : "";
    const label = one.labels?.[0]?.textContent ?? "";
    return !(one.ariaLabel || text.trim() || label.trim() || by.some((other) => other?.textContent));
  }).map((one) => one.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_has_a_name(visit: Visit, scheme: Any) -> None:
    page = visit.page
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.locator(f"html[data-theme={scheme}]").wait_for()
    for summary in page.locator("#options summary").all()[1:]:
        summary.click()
    page.click("#complete [data-view=tokens]")
    visit.run("Hello", n=2, max_tokens=30, min_new_tokens=30, temperature=2, seed=7)
    colours = "all => all.forEach((one, place) => { one.dataset.level = place % 6; })"  # each of them
    page.locator("#results .token").evaluate_all(colours)
    visit.set(top_p="7")
    page.locator("#results .token").nth(4).focus()
    assert page.evaluate(CONTRASTS) == []
    assert page.evaluate(UNNAMED) == []
    page.get_by_role("tab", name="Chat").click()
    page.click("#options-reset")
    visit.set(max_tokens=5)
    page.fill("#message", "Hi")
    page.click("#send")
    visit.finished("#messages")
    assert page.evaluate(CONTRASTS) == []
    assert page.evaluate(UNNAMED) == []
    described = page.locator("[aria-describedby]").evaluate_all(
        "all => all.flatMap(one => one.getAttribute('aria-describedby').split(' '))"
    )
    assert [name for name in described if page.locator(f"[id='{name}']").count() != 1] == []


def test_the_keyboard_is_enough(visit: Visit) -> None:
    page = visit.page
    keys = page.keyboard
    keys.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    keys.press("Enter")
    keys.type("Hello")
    assert page.input_value("#prompt") == "Hello"
    seen = []
    for _ in range(40):
        keys.press("Tab")
        focused = page.evaluate(
            "({id: document.activeElement.id, text: document.activeElement.textContent.trim(), "
            "ring: getComputedStyle(document.activeElement).outlineStyle})"
        )
        seen.append(focused["id"] or focused["text"])
        assert focused["ring"] != "none", focused
        if focused["id"] == "option-max_tokens":
            break
    assert seen[:4] == ["run", "code-button", "Text", "Tokens"]
    assert seen[-1] == "option-max_tokens"
    keys.press("ArrowUp")  # from the default, 128, to the context
    assert page.input_value("#option-max_tokens") == "64"
    keys.press("ArrowDown")
    assert page.input_value("#option-max_tokens") == "63"
    keys.press("Control+A")
    keys.type("4")
    keys.press("Control+Enter")
    assert visit.finished()
    page.focus("#code-button")
    keys.press("Enter")
    assert page.evaluate("document.activeElement.closest('dialog')?.id") == "code-dialog"
    keys.press("Escape")
    assert page.evaluate("document.activeElement.id") == "code-button"
    page.focus("#tab-complete")
    keys.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-chat"
    keys.press("Tab")
    assert page.evaluate("document.activeElement.id") == "theme"
