"""Lines in and lines out: a bad line is told, and the next one can be read."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.batch.lines import LineError, complaint, json_line, line_text, next_line
from edgelm.errors import PromptError


@given(st.lists(st.binary(max_size=12).map(lambda part: part.replace(b"\n", b"")), max_size=8), st.booleans())
def test_every_line_comes_once(parts: list[bytes], ends: bool) -> None:
    """Lines are those of Python; longer ones come cut, to be refused, and cost the next lines nothing."""
    content = b"\n".join(parts) + (b"\n" if ends else b"")
    expected = content.splitlines(keepends=True) if b"\r" not in content else list(io.BytesIO(content))
    stream = io.BytesIO(content)
    for line in expected:
        read = next_line(stream, 6)
        assert read == line[:7]
        if len(line) > 6:
            with pytest.raises(LineError, match="more than 6 bytes"):
                line_text(read, 6)
    assert next_line(stream, 6) is None


def test_the_end_of_a_line_is_no_text() -> None:
    assert [line_text(line) for line in (b"a b\r\n", b"a b\n", b"a b", b"\n")] == ["a b", "a b", "a b", ""]
    with pytest.raises(LineError, match="byte 1"):
        line_text(b"a\xff\n")


def test_a_complaint_is_one_sentence() -> None:
    assert complaint("line 3", LineError("is empty")) == "line 3 is empty"
    assert complaint("line 3", PromptError("the prompt is empty")) == "line 3: the prompt is empty"


@given(st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.floats(allow_nan=False), max_size=3))
def test_json_is_one_line_that_says_the_same(content: dict[str, object]) -> None:
    line = json_line(content)
    assert len(line.splitlines()) == 1
    line.encode()  # no half of a character
    finite = {key: None if value in (float("inf"), -float("inf")) else value for key, value in content.items()}
    assert json.loads(line) == finite
