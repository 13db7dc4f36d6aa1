"""Stop strings across any token border, and tokens handed out with the text they complete."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.text.stop_strings import TextStream


class Pieces:
    """A decoder in which token i stands for the text `texts[i]`; an empty text is half a character."""

    def __init__(self, texts: list[str], rest: str = "") -> None:
        self._texts, self._rest = texts, rest

    def push(self, token_id: int) -> str:
        return self._texts[token_id]

    def flush(self) -> str:
        return self._rest


def run(texts: list[str], stops: list[str], rest: str = "") -> tuple[str, list[int], bool]:
    stream = TextStream(Pieces(texts, rest), stops)
    text, tokens = "", list[int]()
    for token in range(len(texts)):
        piece = stream.push(token)
        text, tokens = text + piece.text, tokens + list(piece.token_ids)
        if stream.stopped:
            return text, tokens, True
    piece = stream.finish()
    return text + piece.text, tokens + list(piece.token_ids), stream.stopped


@pytest.mark.parametrize(
    ("texts", "stops", "text", "tokens", "stopped"),
    [
        (["ab", "cd"], [], "abcd", [0, 1], False),
        (["ab", "cd", "ef"], ["cd"], "ab", [0], True),
        (["ab", "cd", "ef"], ["de"], "abc", [0], True),  # begins inside a token: that token is not in the result
        (["ab", "cd", "ef"], ["bcde"], "a", [], True),
        (["ab", "cd", "ef"], ["ab"], "", [], True),
        (["x", "E", "N", "D"], ["END"], "x", [0], True),
        (["x", "E", "N", "X"], ["END"], "xENX", [0, 1, 2, 3], False),  # held back, then let go
        (["aE", "NEND"], ["END"], "aEN", [0], True),
        (["ab", "", "c", "d"], ["cd"], "ab", [0], True),  # half a character belongs to what follows
        (["ab", "cd"], ["d", "cd"], "ab", [0], True),  # the one that begins first wins
        (["the en", "d"], ["\n"], "the end", [0, 1], False),
    ],
)
def test_stop_strings(texts: list[str], stops: list[str], text: str, tokens: list[int], stopped: bool) -> None:
    assert run(texts, stops) == (text, tokens, stopped)


def test_text_is_held_back_only_while_it_may_be_a_stop() -> None:
    stream = TextStream(Pieces(["aE", "N", "x"]), ["END"])
    assert [stream.push(token).text for token in range(3)] == ["a", "", "ENx"]


def test_an_unfinished_character_may_complete_a_stop() -> None:
    assert run(["ab", ""], ["\ufffd"], rest="\ufffd") == ("ab", [0], True)


def test_the_rest_is_handed_out_at_the_end() -> None:
    assert run(["ab", ""], ["zz"], rest="\ufffd") == ("ab\ufffd", [0, 1], False)


@given(st.lists(st.text("abE", max_size=3), max_size=12), st.lists(st.text("abE", min_size=1, max_size=4), max_size=3))
def test_any_cut_gives_the_same_text(texts: list[str], stops: list[str]) -> None:
    whole = "".join(texts)
    ends = [at for at in (whole.find(stop) for stop in stops) if at >= 0]
    text, tokens, stopped = run(texts, stops)
    # A longer stop may begin earlier but be complete later than the one that ended the stream.
    assert stopped == bool(ends)
    if not stopped:
        assert (text, tokens) == (whole, list(range(len(texts))))
    else:
        assert whole.startswith(text)
        assert "".join(texts[token] for token in tokens) == text[: len("".join(texts[t] for t in tokens))]
        assert not any(stop in text for stop in stops)
