"""The page and the picture of an explanation, and the bytes in them."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

import edgelm
from edgelm.pictures.explanation_data import explanation_data, packed_attention
from edgelm.pictures.explanation_html import html_page
from edgelm.pictures.explanation_svg import svg_picture
from edgelm.scoring.explanation import ExplainedToken, Explanation
from tests.pictures.explanations import HOSTILE_TEXTS, explanation

SVG = "{http://www.w3.org/2000/svg}"
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play with her red ball in the park. One day she"
)


class Page(HTMLParser):
    """The elements of a page by their names, with their attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, list[dict[str, str]]] = {}
        self._open: list[dict[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"text": "", **{name: value or "" for name, value in attrs}}
        self.found.setdefault(tag, []).append(element)
        self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._open.clear()

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1]["text"] += data


def test_packed_attention() -> None:
    shares = np.array([[[[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]], [[[1, 0, 0], [0, 1, 0], [0.001, 0.003, 0.996]]]])
    tokens = tuple(ExplainedToken(i, "x", None, ()) for i in range(3))
    found = Explanation(tokens, (), shares.astype(np.float32), 0)
    assert list(packed_attention(found)) == [255, 128, 128, 51, 76, 128, 255, 0, 255, 0, 1, 254]


def test_packed_attention_behind_a_prefix() -> None:
    shares = np.array([[[[0.25, 0.25, 0.5, 0], [0.1, 0.1, 0.2, 0.6]]]], np.float32)
    tokens = tuple(ExplainedToken(i, "x", -1.0, ()) for i in range(2))
    found = Explanation(tokens, (), shares, 2)
    assert list(packed_attention(found)) == [128, 128, 51, 51, 153]
    assert explanation_data(found, "m")["prefix_tokens"] == 2


def test_the_picture() -> None:
    found = explanation(["Once", " upon", " a", " time"])
    root = ElementTree.fromstring(svg_picture(found, "tiny"))
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert texts[0] == "4 tokens read by tiny, with the probability of each"
    assert texts[1:9] == ["Once", "first", "␣upon", "90.5%", "␣a", "81.9%", "␣time", "74.1%"]
    assert texts[9] == "Attention of each token to those before it, averaged over 2 layers of 3 heads, in percent"
    mean = found.attentions.mean(axis=(0, 1))
    numbers = [f"{100 * share:.0f}" for row in mean for share in row if share >= 0.095]
    assert [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "n"] == numbers
    title = root.find(f"{SVG}title")
    assert title is not None and title.text is not None and title.text.startswith("4 tokens read by tiny: the probabil")
    cells = [cell for group in root.iter(f"{SVG}g") if group.get("class") == "a" for cell in group]
    assert len(cells) == 10
    assert [float(cell.get("opacity", "")) for cell in cells] == pytest.approx(
        [float(mean[t, j]) ** 0.5 for t in range(4) for j in range(t + 1)], abs=0.006
    )


def test_a_picture_fits_in_its_frame() -> None:
    for texts in (["word"], ["a-very-long-token-of-strange-letters" * 3] * 30, ["日本語"] * 40, ["x"] * 300):
        root = ElementTree.fromstring(svg_picture(explanation(texts, layers=1, heads=1, prefix=len(texts) % 3), "m"))
        width, height = (float(root.get(name, "")) for name in ("width", "height"))
        for shape in root.iter(f"{SVG}rect"):
            if "x" in shape.attrib:
                assert 0 <= float(shape.attrib["x"]) <= width - float(shape.attrib["width"])
                assert 0 <= float(shape.attrib["y"]) <= height - float(shape.attrib["height"])


def test_the_page() -> None:
    found = explanation(["Once", " upon", " a", " time"])
    page = Page(html_page(found, "tiny"))
    data, script = page.found["script"]
    assert json.loads(data["text"]) == json.loads(json.dumps(explanation_data(found, "tiny")))
    (policy,) = [meta["content"] for meta in page.found["meta"] if meta.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    assert "import " not in script["text"]
    assert len(page.found["tr"]) == 1 + 4 + 1  # the head, the tokens, what comes next
    assert page.found["p"][0]["text"].strip() == "tiny · 4 tokens · 2 layers of 3 heads · perplexity 1.22"
    assert page.found["title"][0]["text"].strip() == "Once upon a time · edgelm explain"


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = html_page(explanation(["a", "b"]), "tiny")
    assert {*re.findall(r"https?://[^\"\s]*", text)} == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe|base|object)\b|@import|url\(", text)
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(", text)


def test_texts_stay_texts() -> None:
    found = explanation(HOSTILE_TEXTS)
    text = html_page(found, "<b>model</b>")
    page = Page(text)
    assert len(page.found["script"]) == 2 and "b" not in page.found
    assert [token["text"] for token in json.loads(page.found["script"][0]["text"])["tokens"]] == HOSTILE_TEXTS
    assert "<script>alert" not in text
    root = ElementTree.fromstring(svg_picture(found, "<b>model</b>"))  # no character that XML forbids
    shown = [one.text for one in root.iter(f"{SVG}text")]
    assert "\\u{202e}" in shown and "<!--" in shown
    assert "\u202e" not in svg_picture(found, "m")


def test_a_page_is_small() -> None:
    with edgelm.load(device="cpu", threads=1) as model:
        found = model.explain(STORY)
    assert len(found.tokens) == 28
    assert len(html_page(found, "stories").encode()) < 150_000
    assert len(svg_picture(found, "stories").encode()) < 60_000
