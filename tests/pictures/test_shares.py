"""Probabilities and shares as words and colours."""

import pytest

from edgelm.pictures.shares import cells, level_of, percent, shortened, visible


@pytest.mark.parametrize(
    "share, words",
    [
        (1, "100%"),
        (0.99995, "100%"),
        (0.9999, "100%"),
        (0.9994, "99.9%"),
        (0.5, "50.0%"),
        (0.1, "10.0%"),
        (0.0999, "10%"),
        (0.0521, "5.2%"),
        (0.00123, "0.12%"),
        (0.0001, "0.010%"),
        (0.00009, "< 0.01%"),
        (0, "< 0.01%"),
    ],
)
def test_percent(share: float, words: str) -> None:
    assert percent(share) == words


def test_levels() -> None:
    assert [level_of(p) for p in (1, 0.9, 0.89, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001, 0)] == [
        0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, shown",
    [
        (" the", "␣the"),
        ("\n\t", "↵⇥"),
        ("", "(nothing)"),
        ("a\x00b\x1b[31m", "a\\u{0}b\\u{1b}[31m"),
        ("\u202egnp", "\\u{202e}gnp"),
        ("\ufeff", "\\u{feff}"),
        ("\ud800", "\\u{d800}"),
        ("日本語é😀", "日本語é😀"),
        ("<b>&amp;", "<b>&amp;"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_widths() -> None:
    assert (cells("abc"), cells("日本"), cells("e\u0301"), cells("😀")) == (3, 4, 1, 2)
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"
    assert shortened("日本語日本語", 6) == "日本…"
    assert cells(shortened("日本語日本語", 6)) <= 6
