"""Which tokens a prompt loses, and which may spell them again, with tokenizers of every kind."""

import random

import pytest

from edgelm.errors import ConfigError
from edgelm.text.token_healing import TextTakenBack, TokenHealer
from edgelm.text.tokenizer import Tokenizer
from tests.conftest import DATA
from tests.text.tokenizer_kinds import KINDS, LETTERS, text_of

REFUSED = {"clip", "bert", "words", "speech"}
"""Their tokens depend on the tokens beside them."""
FINISHED = sorted((DATA / "tokenizers" / "finished").glob("*.json"))
TEXTS = ["the theme", "aa a  aaa    the", "今天 é\u0301 😀 the", "def\t\ta  b", "1234 theth e", " a", "\n\n a\n"]


def texts(seed: int) -> list[str]:
    """Texts to cut, some of them random."""
    drawn = random.Random(seed)
    letters = [*LETTERS, " ", " ", "the", "😀", "1", "\n"]
    return [*TEXTS, *("".join(drawn.choices(letters, k=drawn.randrange(1, 30))) for _ in range(40))]


@pytest.mark.parametrize("kind", KINDS)
def test_of_every_kind_of_tokenizer(kind: str) -> None:
    tokenizer = Tokenizer.from_json(text_of(kind))
    if kind in REFUSED:
        with pytest.raises(ConfigError, match="token_healing does not work with this model: the text of this"):
            TokenHealer(tokenizer)
        return
    assert _heals(tokenizer) >= (0 if kind in ("t5", "albert") else 5)  # those have no text of which a token is longer


@pytest.mark.parametrize("path", FINISHED, ids=lambda path: path.stem)
def test_of_every_finished_tokenizer(path: object) -> None:
    tokenizer = Tokenizer.from_json(path.read_text(encoding="utf-8"))  # type: ignore[attr-defined]
    try:
        TokenHealer(tokenizer)
    except ConfigError:
        assert path.stem in REFUSED_FILES  # type: ignore[attr-defined]
        return
    assert path.stem not in REFUSED_FILES  # type: ignore[attr-defined]
    _heals(tokenizer)


REFUSED_FILES = {"bpe-json-clean-up"} | {p.stem for p in FINISHED if "chinese" in p.stem}


def _heals(tokenizer: Tokenizer) -> int:
    """Cut texts anywhere; whatever tokens are chosen, the text goes on behind the cut. Returns how many were healed."""
    healer, healed, drawn = TokenHealer(tokenizer), 0, random.Random(0)
    for text in texts(1):
        for end in {len(text), drawn.randrange(1, len(text) + 1)}:
            ids = tokenizer.encode_prompt(text[:end])
            if not ids:
                continue
            prompt = healer.heal(ids, 0, tokenizer.encode_prompt(""))
            if prompt.matcher is None:
                assert (prompt.ids, prompt.characters) == (ids, 0)
                continue
            healed += 1
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            for _ in range(5):
                new = _drawn(prompt.matcher, drawn)
                spelled = tokenizer.decode([*prompt.ids, *new], skip_special_tokens=True)
                stream = tokenizer.stream(prompt.ids, skip_special_tokens=True)
                stream.leave_out(prompt.characters)
                shown = "".join(map(stream.push, new)) + stream.flush()
                assert spelled == whole + shown, (text[:end], prompt.ids, new)
    return healed


def _drawn(matcher: TextTakenBack, drawn: random.Random) -> list[int]:
    """Tokens that the matcher allows, until the text that was taken back is spelled."""
    matcher, tokens = matcher.copy(), []
    while (mask := matcher.mask()) is not None:
        assert not matcher.accepts
        tokens.append(drawn.choice(mask.nonzero()[0].tolist()))
        matcher.take(tokens[-1])
    assert matcher.accepts and not matcher.is_finished and matcher.forced() == []
    return tokens


def test_allowed_is_what_spells_the_text_by_brute_force() -> None:
    tokenizer = Tokenizer.from_json(text_of("gpt2"))
    spellings, healer = tokenizer.spellings(), TokenHealer(tokenizer)
    prompt = healer.heal(tokenizer.encode(" aa the th"), 0, [])
    assert prompt.matcher is not None
    taken = b"th"
    assert tokenizer.decode(prompt.ids) == " aa the " and prompt.characters == 2
    for start in range(len(taken)):
        matcher = prompt.matcher.copy()
        for byte in taken[:start]:  # one token a byte
            matcher.take(spellings.index(bytes([byte])))
        rest, mask = taken[start:], matcher.mask()
        assert mask is not None
        allowed = [bool(s) and (s.startswith(rest) or rest.startswith(s)) for s in spellings]
        assert mask.tolist() == allowed


def test_what_is_taken_back() -> None:
    """The vocabulary has "a", "aa", " a", "  ", "    ", "th", "the" beside the bytes."""
    tokenizer = Tokenizer.from_json(text_of("gpt2"))
    healer = TokenHealer(tokenizer)

    def left(text: str) -> str:
        return tokenizer.decode(healer.heal(tokenizer.encode(text), 0, []).ids)

    assert left("b the") == "b the"  # no token is longer
    assert left("b th") == "b "
    assert left("b ") == "b"  # " a"
    assert left("ba") == "b"  # "aa"
    assert left("baa") == "b"  # "aa" covers the last "a", which may begin another "aa"
    assert left("b   ") == "b"  # three blanks begin four
    assert left("é") == "é" and left("b\N{GRINNING FACE}") == "b\N{GRINNING FACE}"
    assert left("t") == "t"  # the first token stays where the model cannot begin with nothing
    end = tokenizer.token_id("<|endoftext|>")
    assert end is not None
    assert healer.heal(tokenizer.encode("t"), 0, [end]).ids == [end]


def test_special_tokens_and_a_prefix_stay() -> None:
    tokenizer = Tokenizer.from_json(text_of("gpt2"))
    healer, end = TokenHealer(tokenizer), tokenizer.token_id("<|endoftext|>")
    assert end is not None
    t, h = tokenizer.encode("t"), tokenizer.encode("h")
    assert healer.heal([*t, end], 0, [end]).ids == [*t, end]
    assert healer.heal([end, *t], 0, [end]).ids == [end]
    assert healer.heal([*t, *h], 1, [end]).ids == [*t, *h]  # "h" alone begins no token
    assert healer.heal([*t, *h], 0, [end]).ids == [end]  # "th" does


def test_ways_that_lead_nowhere_are_left_out() -> None:
    """With tokens "ab", "b", "c", "bcd" and "a", but no token for "d": "a" may not begin "abcd" by "bc"."""

    class Few(Tokenizer):
        def __init__(self) -> None:
            self._size = 5

        def spellings(self) -> list[bytes]:
            return [b"ab", b"ac", b"a", b"cd", b"abcde"]

        def decode(self, ids: object, *, skip_special_tokens: bool = False) -> str:
            return b"".join(self.spellings()[i] for i in ids).decode()  # type: ignore[attr-defined]

    prompt = TokenHealer(Few()).heal([2, 0, 3], 0, [])
    assert (prompt.ids, prompt.characters) == ([2], 4)
    assert prompt.matcher is not None
    mask = prompt.matcher.mask()
    assert mask is not None and mask.nonzero()[0].tolist() == [0, 4]  # not "a", because no token begins with "b"
