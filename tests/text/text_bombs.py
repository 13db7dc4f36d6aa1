"""Texts that are made to be slow: ten times the text should take at most thirteen times as long.

``python -m tests.text.text_bombs`` measures all kinds of tokenizers with texts of 100,000 and 1,000,000 characters.
"""

import sys
import time

from edgelm.errors import PromptError
from edgelm.text.tokenizer import Tokenizer
from tests.text.tokenizer_kinds import KINDS, text_of

BOMBS = {
    "one letter": "a",
    "one capital": "A",
    "blanks": " ",
    "line ends": "\n",
    "no-break blanks": "\u00a0",
    "combining marks": "\u0301",
    "marks out of order": "\u0301\u0327",
    "letters with marks": "e\u0301",
    "Chinese": "今",
    "Hebrew": "א",
    "digits": "1",
    "marks of punctuation": "!",
    "quotes": "'",
    "apostrophes and letters": "'s",
    "NUL": "\0",
    "emoji": "🎉",
    "joiners": "\u200d",
    "a ligature of 18 characters": "ﷺ",
    "Hangul in parts": "\u1100\u1161",
    "added tokens": "<|endoftext|>",
    "added tokens between blanks": "  <mask>  ",
    "special tokens": "</s>",
}


def seconds(tokenizer: Tokenizer, text: str) -> float:
    """CPU time of encoding `text`."""
    began = time.process_time()
    tokenizer.encode(text)
    return time.process_time() - began


def ratio(tokenizer: Tokenizer, unit: str, characters: int) -> float:
    """How many times longer a text of ten times `characters` takes; 0 where it is refused."""
    short, long = (unit * (count // len(unit)) for count in (characters, 10 * characters))
    try:
        return seconds(tokenizer, long) / max(min(seconds(tokenizer, short) for _ in range(3)), 2e-4)
    except PromptError as error:
        assert "characters" in str(error)
        return 0.0


def main() -> None:
    """Print the worst ratio of every kind."""
    for kind in sys.argv[1:] or KINDS:
        tokenizer = Tokenizer.from_json(text_of(kind))
        ratios = {name: min(ratio(tokenizer, unit, 100_000) for _ in range(2)) for name, unit in BOMBS.items()}
        worst = max(ratios, key=lambda name: ratios[name])
        refused = sum(not factor for factor in ratios.values())
        sys.stdout.write(f"{kind}: {ratios[worst]:.1f} ({worst}), {refused} of {len(ratios)} refused\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
