"""``edgelm explain`` as users see it."""

import json
import os
import re
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import edgelm
from edgelm.pictures.explanation_html import html_page
from edgelm.pictures.explanation_svg import svg_picture
from edgelm.pictures.shares import percent
from tests.conftest import ROOT, TINY_BUNDLE, RunCommand

TINY = ("-m", str(TINY_BUNDLE))
TEXT = "The cat sat"
SHOWN = ROOT / "docs" / "explanation.svg"


@pytest.fixture(scope="module")
def model() -> edgelm.Model:
    return edgelm.load(TINY_BUNDLE, device="cpu")


def test_a_table(edgelm_command: RunCommand, model: edgelm.Model) -> None:
    found = model.explain(TEXT, top=2)
    result = edgelm_command("explain", *TINY, TEXT, "--top", "2")
    assert (result.status, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert re.split(r"  +", lines[0]) == ["token", "probability", "likeliest in its place"]
    assert len(lines) == 1 + len(found.tokens) + 1
    assert lines[1].strip() == found.tokens[0].text
    for line, token in zip(lines[2:-1], found.tokens[1:], strict=True):
        assert token.logprob is not None
        assert line.startswith(token.text.replace(" ", "␣"))
        assert percent(float(np.exp(token.logprob))) in line
        assert len(re.findall(r"%", line)) == 3
    assert lines[-1].startswith("(what comes next)")


def test_standard_input(edgelm_command: RunCommand) -> None:
    shown = edgelm_command("explain", *TINY, TEXT).stdout
    assert edgelm_command("explain", *TINY, stdin=TEXT.encode()).stdout == shown
    assert edgelm_command("explain", *TINY, "-", stdin=f"{TEXT}\n".encode()).stdout == shown


def test_json(edgelm_command: RunCommand, model: edgelm.Model) -> None:
    found = model.explain(TEXT, top=3)
    result = edgelm_command("explain", *TINY, TEXT, "--top", "3", "--json")
    content = json.loads(result.stdout)
    assert list(content) == ["model", "tokens", "following", "prefix_tokens", "attentions"]
    assert content["model"] == str(TINY_BUNDLE)
    assert content["tokens"][0] == {"token_id": found.tokens[0].token_id, "text": "The", "logprob": None, "top": []} | {
        "text": found.tokens[0].text
    }
    for token, expected in zip(content["tokens"][1:], found.tokens[1:], strict=True):
        assert token["logprob"] == pytest.approx(expected.logprob, abs=1e-5)
        assert [one["token_id"] for one in token["top"]] == [one.token_id for one in expected.top]
    assert [one["token_id"] for one in content["following"]] == [one.token_id for one in found.following]
    for layer, layer_found in zip(content["attentions"], found.attentions, strict=True):
        for head, head_found in zip(layer, layer_found, strict=True):
            for t, row in enumerate(head):
                assert row == pytest.approx(head_found[t, : t + 1].tolist(), abs=2e-6)


def test_a_page_and_a_picture(edgelm_command: RunCommand, model: edgelm.Model, tmp_path: Path) -> None:
    found = model.explain(TEXT)
    for name, draw in (("page.html", html_page), ("page.SVG", svg_picture)):
        (tmp_path / name).write_text("older", encoding="utf-8")
        result = edgelm_command("explain", *TINY, TEXT, "-o", name)
        assert (result.status, result.stdout) == (0, "")
        assert re.fullmatch(rf"{name}: \d+ kB\n", result.stderr)
        written = (tmp_path / name).read_text(encoding="utf-8")
        assert without_numbers(written) == without_numbers(draw(found, TINY_BUNDLE.name))
    ElementTree.parse(tmp_path / "page.SVG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.SVG", "page.html"]


def without_numbers(text: str) -> str:
    """Processors differ in the last bits, which may round a number up or down."""
    return re.sub(r"\"attentions\":\"[^\"]*\"|[\d.]+", "_", text)


def test_the_picture_of_the_document_is_up_to_date(edgelm_command: RunCommand, tmp_path: Path) -> None:
    """docs/explain.md says with which command it was made."""
    (command,) = re.findall(r"<!-- made by: edgelm (explain .*) -->", (ROOT / "docs/explain.md").read_text("utf-8"))
    arguments = shlex.split(command)
    arguments[-1] = "made.svg"
    assert edgelm_command(*arguments).status == 0

    def words(picture: Path) -> list[str]:
        texts = ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")
        return [without_numbers(text.text or "") for text in texts if text.get("class") != "n"]  # the map's numbers

    assert words(tmp_path / "made.svg") == words(SHOWN)


def test_a_page_and_json_together(edgelm_command: RunCommand, tmp_path: Path) -> None:
    result = edgelm_command("explain", *TINY, TEXT, "-o", "page.svg", "--json")
    assert json.loads(result.stdout)["prefix_tokens"] == 0
    assert (tmp_path / "page.svg").is_file()


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (("x", "-o", "page.png"), 2, "-o 'page.png' must end in .html or .svg"),
        (("x", "-o", "-"), 2, "-o '-' must end in .html or .svg"),
        (("x", "-o", "nowhere/page.svg"), 1, "there is no folder 'nowhere'"),
        (("x", "--top", "2000"), 2, "top must be a whole number from 0 to 1024, got 2000"),
        (("x", "--top", "many"), 2, "'many' is not a valid integer"),
        (("one", "two"), 2, "put each text in quotes"),
        (("",), 1, "the text is empty"),
        (("a " * 100, "-o", "page.html"), 1, "this model's context holds 64: shorten the text"),
    ],
)
def test_errors(
    edgelm_command: RunCommand, tmp_path: Path, arguments: tuple[str, ...], status: int, words: str
) -> None:
    result = edgelm_command("explain", *TINY, *arguments)
    assert result.status == status
    assert words in result.one_line()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_and_bytes_that_are_no_text(edgelm_command: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "page.svg").mkdir()
    assert "it is a folder; give a file" in edgelm_command("explain", *TINY, "x", "-o", "page.svg").one_line()
    assert "standard input is not UTF-8 text (byte 1)" in edgelm_command("explain", *TINY, stdin=b"a\xff").one_line()


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write(edgelm_command: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "is not writable" in edgelm_command("explain", *TINY, "x", "-o", "locked/page.svg").one_line()


def test_texts_that_would_steer_a_terminal(edgelm_command: RunCommand, tmp_path: Path) -> None:
    hostile = "a\x1b[2J\u202eb\n</script>"
    shown = edgelm_command("explain", *TINY, hostile).stdout
    assert "\x1b" not in shown and "\u202e" not in shown
    assert edgelm_command("explain", *TINY, hostile, "-o", "page.html").status == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("</script>") == 2
