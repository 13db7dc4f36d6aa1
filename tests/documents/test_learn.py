"""docs/learn.md and its Chinese form: what they name and quote is the code, and every formula is computed by a test."""

import ast
import math
import re
import textwrap
from pathlib import Path

import pytest

from edgelm.bundle.folder import Bundle, default_bundle_path
from tests.conftest import ROOT
from tests.documents.pages import Block, Page, page
from tests.documents.test_formulas import FORMULAS

ENGLISH, CHINESE = page("docs/learn.md"), page("docs/learn.zh-CN.md")
QUOTED = "quoted from "
REFERENCE = re.compile(r"\[`([\w.]+)`\]\((\.\./[\w/.-]+\.py)\)")
INLINE = re.compile(r"\$`(.+?)`\$")


def source_of(path: Path, name: str) -> str:
    """The source of the class, function, method, field or constant `name` of a file, without common indentation.

    Raises LookupError if the file has no such name.
    """
    text = path.read_text(encoding="utf-8")
    found: ast.AST = ast.parse(text)
    for part in name.split("."):
        found = next((node for node in getattr(found, "body", ()) if part in _names(node)), None)  # type: ignore[assignment]
        if found is None:
            raise LookupError(f"{path} has no {name}")
    lines = text.splitlines()[found.lineno - 1 : found.end_lineno]  # type: ignore[attr-defined]
    return textwrap.dedent("\n".join(lines))


def _names(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def quotes(of: Page) -> list[Block]:
    return [block for block in of.blocks if (block.not_run or "").startswith(QUOTED)]


def formulas(of: Page) -> list[str]:
    """The displayed formulas of a page, without white space."""
    return ["".join(block.body.split()) for block in of.blocks if block.language == "math"]


@pytest.mark.parametrize("reference", sorted(set(REFERENCE.findall(ENGLISH.text + CHINESE.text))), ids=" in ".join)
def test_names_are_those_of_the_code(reference: tuple[str, str]) -> None:
    name, target = reference
    source_of(ROOT / "docs" / target, name)


def test_there_are_names_and_no_link_to_code_is_without_one() -> None:
    assert len(REFERENCE.findall(ENGLISH.text)) >= 60
    for each in (ENGLISH, CHINESE):
        assert len(re.findall(r"\]\([^)\s]+\.py\)", each.text)) == len(REFERENCE.findall(each.text))


@pytest.mark.parametrize("block", quotes(ENGLISH), ids=str)
def test_quotes_are_the_code(block: Block) -> None:
    assert block.not_run is not None
    path, name = block.not_run.removeprefix(QUOTED).split(", ")
    source, quoted = (re.sub(r"^\s+", "", text, flags=re.M) for text in (source_of(ROOT / path, name), block.body))
    assert quoted.strip() in source


def test_every_formula_is_computed_by_a_test() -> None:
    page_formulas = formulas(ENGLISH)
    assert set(page_formulas) - set(FORMULAS) == set(), "no test computes these formulas of the page"
    assert set(FORMULAS) - set(page_formulas) == set(), "the page lacks these formulas, which tests compute"
    assert len(page_formulas) == len(set(page_formulas)) >= 40


def test_no_formula_uses_what_github_cannot_show() -> None:
    for each in (ENGLISH, CHINESE):
        text = re.sub(r"^```.*?^```$", "", each.text, flags=re.M | re.S)
        assert text.count("$") == 2 * len(INLINE.findall(text)), "a dollar sign outside $`...`$"
        for tex in (*INLINE.findall(text), *(block.body for block in each.blocks if block.language == "math")):
            assert tex.count("{") == tex.count("}"), tex
            assert "<" not in tex and ">" not in tex, tex  # GitHub shows them as entities; write \lt and \gt
            assert len(re.findall(r"\\left\b", tex)) == len(re.findall(r"\\right\b", tex)), tex
        assert not re.findall(r"[^\s(]\$`[^`]+`\$", re.sub(INLINE, lambda found: found[0] + " ", text)), (
            "write a blank before $`"
        )
        for row in re.findall(r"^\|.*$", text, re.M):
            assert not any("|" in tex for tex in INLINE.findall(row)), row  # it would end the cell


def test_both_pages_say_the_same() -> None:
    """The Chinese page has the headings, formulas, names, quotes, programs, tables and links of the English one."""

    def shape(of: Page) -> dict[str, object]:
        programs = [
            (block.not_run is not None, re.sub(r" *#.*", "", block.body), block.expected)
            for block in of.blocks
            if block.language == "python"
        ]
        return {
            "headings": [heading.count("#") for heading in of.headings],
            "formulas": formulas(of),
            "programs": programs,
            "rows": [line.count("|") for line in of.text.splitlines() if line.startswith("|")],
        }

    assert shape(ENGLISH) == shape(CHINESE)
    for found in (REFERENCE, INLINE):
        missing = set(found.findall(ENGLISH.text)) ^ set(found.findall(CHINESE.text))
        assert not missing, missing

    def outward(of: Page) -> set[str]:
        """Links to other pages; headings of this page have other anchors in Chinese."""
        return {link for link in of.links if not link.startswith("#") and "learn" not in link}

    assert outward(ENGLISH) == outward(CHINESE)


def test_numbers_of_the_embedded_model() -> None:
    """What both pages say of the embedded model is what its bundle states."""
    manifest = Bundle.read(default_bundle_path()).manifest
    sizes, certificate = manifest.architecture, manifest.certificate
    assert certificate is not None
    drawn, width, inner = certificate.drawn, sizes.hidden_size, 4 * sizes.hidden_size
    tables = sizes.vocab_size * width, sizes.context_length * width
    layer = 2 * 2 * width + (width + 1) * 3 * width + (width + 1) * width + (width + 1) * inner + (inner + 1) * width
    assert sum(tables) + sizes.num_layers * layer + 2 * width == manifest.source.parameters
    said = [
        *(f"{count:,}" for count in (*tables, layer, manifest.source.parameters, sizes.vocab_size, inner)),
        f"{sizes.num_heads}, {sizes.head_dim} |",
        f"$`2 L H h = {sizes.cache_values_per_token}`$",
        f"{4 * sizes.cache_values_per_token:,}",
        f"$`\\log {sizes.vocab_size} = {math.log(sizes.vocab_size):.2f}`$",
        f"{drawn.perplexity_ratio:.4f}",
        f"{drawn.mean_kl_divergence:.5f}",
        f"{drawn.top1_agreement:.2%}",
    ]
    for each in (ENGLISH, CHINESE):
        assert [number for number in said if number not in each.text] == []
