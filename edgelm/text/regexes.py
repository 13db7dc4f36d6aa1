r"""The regular expressions that a tokenizer.json may hold, and how long a text each of them may see.

Rust runs these expressions by backtracking (Oniguruma). An expression like ``(a+)+b`` takes exponential time, and after
ten million steps Rust panics. So an expression is parsed here first. What may repeat is one character, a class of
characters, or a plain row of them; nothing that itself repeats or branches, and nothing that refers back.

What is left takes polynomial time: where k repetitions without an end follow one another, a run of n characters may
take n^(k+1) steps. The expressions of popular tokenizers (`LINEAR`) are known to take linear time.
"""

import re
from dataclasses import dataclass

MAX_CHARACTERS = 4096
_MAX_DEPTH = 8
_MAX_COUNT = 1000
_MAX_CHOICES = 10_000
RUN_CHARACTERS = {1: 16_384, 2: 2_048}
"""The longest run of characters without a blank, or of blanks alone, that an expression may see, by its number of
repetitions that follow one another. Expressions with more of them are refused, unless they are in `LINEAR`."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2, RoBERTa, CodeGen; `ByteLevel` has it built in."""
GPT4, QWEN = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
"""GPT-4 and Llama 3; Qwen."""
LINEAR = frozenset(
    [
        GPT2,
        GPT4,
        QWEN,
        # CLIP
        r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        # GPT-4o and its relatives
        *(
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{end}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{end}|"
            rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
            for digits in (r"\p{N}{1,3}", r"\p{N}")
            for end in (f"{_CONTRACTIONS}?", "")
        ),
        # sentencepiece models as transformers converts them; CLIP; T5
        " {2,}",
        r"\s+",
        r"\s{2,}",
        r"\p{N}+",
        r"\p{N}{1,3}",
    ]
)
"""Expressions of popular tokenizers. `tests/text/test_text_bombs.py` compares the times of texts of 1,000 and 10,000
characters, made to be slow, with five kinds of tokenizers."""

_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_GROUP = re.compile(r"\?(?:[imx]*(?:-[imx]+)?:|>)")
_SWITCH = re.compile(r"\(\?[imx]+(?:-[imx]+)?\)")
_LOOK = re.compile(r"\?<?[=!]")
_HEX = re.compile(r"x[0-9A-Fa-f]{2}|x\{[0-9A-Fa-f]{1,6}\}|u[0-9A-Fa-f]{4}")
_CROSSES = re.compile(r"\.|\(|&&|\\[PDWHN]|\[\^(?!.*\\s)")  # what may hold blanks and other characters
_PROPERTY = re.compile(r"[pP]\{\^?[\w ]{1,40}\}")


class RegexError(ValueError):
    """The expression is not allowed. The message completes the sentence "the expression ..."."""


@dataclass(frozen=True)
class Regex:
    """What is known of an expression."""

    least_characters: int
    """The length of its shortest match."""
    run_characters: int | None
    """The longest run of characters that it may see; None for any length."""
    crosses_blanks: bool = False
    """Whether a run is the whole text, because a repetition may hold blanks and other characters."""


@dataclass(frozen=True)
class _Part:
    """A part of an expression: an atom, a row of atoms, or branches."""

    least: int = 0  # length of the shortest match
    repetitions: int = 0  # those without an end that follow one another
    choices: int = 1  # in how many ways branches and counted repetitions may go on
    is_plain: bool = True  # whether it has neither repetitions nor branches, so that it may repeat


def read_regex(text: str) -> Regex:
    """Check the expression `text`.

    Raises:
        RegexError: the expression is too long or too deep, uses a construct that is not in the list, or could take too
            long.
    """
    if len(text) > MAX_CHARACTERS:
        raise RegexError(f"has {len(text):,} characters, more than {MAX_CHARACTERS:,}")
    parser = _Parser(text)
    whole = parser.whole()
    if whole.choices > _MAX_CHOICES:
        raise RegexError(f"can go on in more than {_MAX_CHOICES:,} ways")
    if text in LINEAR or not whole.repetitions:
        return Regex(whole.least, None)
    if whole.repetitions not in RUN_CHARACTERS:
        raise RegexError(f"has {whole.repetitions} repetitions in a row, more than {max(RUN_CHARACTERS)}")
    return Regex(whole.least, RUN_CHARACTERS[whole.repetitions], parser.crosses_blanks)


class _Parser:
    """Reads an expression once, from left to right."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self.crosses_blanks = False
        """Whether something repeats that may hold blanks and other characters."""

    def whole(self) -> _Part:
        part = self._branches(0)
        if self._at < len(self._text):
            raise RegexError("has a ) without a (")
        return part

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self._text, self._at)
        if match:
            self._at = match.end()
        return match

    def _branches(self, depth: int) -> _Part:
        if depth > _MAX_DEPTH:
            raise RegexError(f"is nested deeper than {_MAX_DEPTH} groups")
        branches = [self._row(depth)]
        while self._next() == "|":
            self._at += 1
            branches.append(self._row(depth))
        if len(branches) == 1:
            return branches[0]
        least, repetitions = min(b.least for b in branches), max(b.repetitions for b in branches)
        return _Part(least, repetitions, sum(b.choices for b in branches), is_plain=False)

    def _row(self, depth: int) -> _Part:
        least, repetitions, choices, is_plain = 0, 0, 1, True
        while self._next() not in ("", "|", ")"):
            start = self._at
            part = self._repeated(self._atom(depth), start)
            least, repetitions = least + part.least, repetitions + part.repetitions
            choices = min(choices * part.choices, _MAX_CHOICES + 1)
            is_plain &= part.is_plain
        return _Part(least, repetitions, choices, is_plain)

    def _repeated(self, part: _Part, start: int) -> _Part:
        """`part`, which began at `start`, with the quantifier that follows it, if there is one."""
        sign, end = self._next(), self._at
        if sign in ("*", "+", "?") and sign:
            self._at += 1
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        elif count := self._take(_COUNT):
            if not (count[1] or count[3]):
                raise RegexError("has a { without a number; write \\{ for the character")
            if len(count[1]) > 4 or len(count[3]) > 4:
                raise RegexError(f"repeats more than {_MAX_COUNT} times")
            low = int(count[1] or 0)
            high = low if not count[2] else int(count[3]) if count[3] else None
        else:
            return part
        if max(low, high or 0) > _MAX_COUNT:
            raise RegexError(f"repeats more than {_MAX_COUNT} times")
        if self._next() in ("?", "+") and self._next() and sign in ("*", "+", "?"):
            self._at += 1  # lazy or possessive
        if self._next() in ("*", "+", "?") and self._next():
            raise RegexError("repeats a repetition")
        if (low, high) == (0, 1):  # a part that may be missing
            return _Part(0, part.repetitions, part.choices + 1, is_plain=False)
        if not part.is_plain:
            raise RegexError("repeats a group that itself repeats or branches")
        if high is None:
            self.crosses_blanks |= _CROSSES.search(self._text, start, end) is not None
            return _Part(part.least * low, 1, is_plain=False)
        return _Part(part.least * low, choices=abs(high - low) + 1, is_plain=low == high)

    def _atom(self, depth: int) -> _Part:
        character = self._next()
        if character == "(":
            return self._group(depth)
        if character == "[":
            self._class(0)
            return _Part(1)
        if character == "\\":
            return self._escape()
        if character in ("*", "+", "?"):
            raise RegexError(f"has a {character} with nothing to repeat")
        self._at += 1
        return _Part(0 if character in ("^", "$") else 1)

    def _group(self, depth: int) -> _Part:
        if self._take(_SWITCH):
            return _Part()
        self._at += 1
        looks = False
        if self._next() == "?" and not self._take(_GROUP):
            looks = self._take(_LOOK) is not None
            if not looks:
                raise RegexError(f"uses {self._text[self._at - 1 : self._at + 3]!r}")
        part = self._branches(depth + 1)
        if self._next() != ")":
            raise RegexError("has a ( without a )")
        self._at += 1
        return _Part(0, part.repetitions, part.choices, is_plain=False) if looks else part

    def _class(self, depth: int) -> None:
        """Skip a class of characters, which may hold classes."""
        if depth > _MAX_DEPTH:
            raise RegexError(f"is nested deeper than {_MAX_DEPTH} classes")
        self._at += 1
        if self._next() == "^":
            self._at += 1
        if self._next() == "]":
            raise RegexError("has an empty class []")
        while self._next() != "]":
            if not self._next():
                raise RegexError("has a [ without a ]")
            if self._next() == "[":
                self._class(depth + 1)
            elif self._next() == "\\":
                self._escape()
            else:
                self._at += 1
        self._at += 1

    def _escape(self) -> _Part:
        self._at += 1
        character = self._next()
        if self._take(_HEX) or self._take(_PROPERTY):
            return _Part(1)
        if not character or (character.isalnum() and character not in "sSdDwWhHnrtfvaebBAzZ"):
            raise RegexError(f"uses \\{character}" if character else "ends with a backslash")
        self._at += 1
        return _Part(0 if character in "bBAzZ" else 1)
