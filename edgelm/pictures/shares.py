"""Probabilities and shares as words and colours. ``shares.js`` has the same rules for browsers."""

import re
import unicodedata

_LEVELS = (0.9, 0.5, 0.2, 0.05, 0.01)
"""Probabilities below which the next colour begins."""
_WHITE_SPACE = {"\n": "↵", "\t": "⇥", " ": "␣"}


def level_of(probability: float) -> int:
    """The colour of a probability: 0 for likely to 5 for unlikely."""
    return sum(probability < least for least in _LEVELS)


def percent(share: float) -> str:
    """A share of 1 in percent, of two or three digits."""
    value = share * 100
    if value < 0.01:
        return "< 0.01%"
    if value >= 99.995:
        return "100%"
    return f"{value:#.{3 if value >= 10 else 2}g}%".replace(".%", "%")


def visible(text: str) -> str:
    """A token's text with its white space, and what would steer a text's direction, made visible."""
    return "".join(map(_visible_character, text)) or "(nothing)"


def _visible_character(character: str) -> str:
    if character in _WHITE_SPACE:
        return _WHITE_SPACE[character]
    # Controls, marks of direction, halves of characters, and what Unicode assigns to nothing.
    return f"\\u{{{ord(character):x}}}" if unicodedata.category(character)[0] == "C" else character


def shortened(text: str, width: int) -> str:
    """`text` in at most `width` cells of a fixed-width font, with … where it was cut."""
    if cells(text) <= width:
        return text
    kept = ""
    for character in text:
        if cells(kept + character) >= width:
            break
        kept += character
    return f"{kept}…"


def cells(text: str) -> int:
    """How many cells of a fixed-width font `text` takes: two for a wide character, none for a combining one."""
    if re.fullmatch(r"[ -~]*", text):
        return len(text)
    return sum(_cells_of(character) for character in text)


def _cells_of(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
