"""``edgelm run --show-probs``: which piece gets which colour, and what is printed where there are no colours."""

import math
import os
import re
import sys

import pytest

from edgelm import load
from edgelm.cli.probability_colours import BOUNDS, COLOURS, MEANINGS, ProbabilityPainter
from edgelm.generation.results import Chunk
from edgelm.scoring.results import TokenLogprobs
from tests.cli.terminal import at_terminal
from tests.conftest import TINY_BUNDLE, RunCommand

RED, ORANGE, OCHRE, CYAN, BLUE = (f"\x1b[38;5;{number}m" for _, number in COLOURS)
PLAIN = "\x1b[39m"
NEEDS_TERMINAL = pytest.mark.skipif(os.name == "nt", reason="needs a pseudoterminal")


def chunk(text: str, *tokens: tuple[str, float], ends: bool = False) -> Chunk:
    """A chunk of tokens with their own texts and probabilities."""
    logprobs = tuple(TokenLogprobs(1, token, math.log(probability), ()) for token, probability in tokens)
    return Chunk(text, (1,) * len(tokens), 0, "length" if ends else None, logprobs=logprobs)


def painted(*chunks: Chunk) -> list[str]:
    painter = ProbabilityPainter()
    return [painter.painted(piece) for piece in chunks]


def test_there_is_a_colour_and_a_meaning_for_each_interval() -> None:
    assert len(COLOURS) == len(MEANINGS) == len(BOUNDS) + 1
    probabilities = [1e-9, 0.0099, 0.0101, 0.0999, 0.1001, 0.4999, 0.5001, 0.8999, 0.9001, 1.0]
    expected = [RED, RED, ORANGE, ORANGE, OCHRE, OCHRE, CYAN, CYAN, BLUE, BLUE]
    assert painted(*(chunk("a", ("a", p)) for p in probabilities)) == [f"{colour}a{PLAIN}" for colour in expected]


def test_tokens_of_one_chunk_have_their_own_colours() -> None:
    assert painted(chunk("ab c", ("ab", 0.95), (" c", 0.2))) == [f"{BLUE}ab{PLAIN}{OCHRE} c{PLAIN}"]


def test_tokens_of_one_character_have_its_probability() -> None:
    """0.3 · 0.3 = 0.09; a token alone decodes to U+FFFD."""
    assert painted(chunk("é", ("\ufffd", 0.3), ("\ufffd", 0.3))) == [f"{ORANGE}é{PLAIN}"]


def test_text_before_a_possible_stop_string_waits_for_its_token() -> None:
    """With the stop string "zz", "fuz" gives "fu" at first, without its token."""
    assert painted(chunk("fu"), chunk("ze!", ("fuz", 0.95), ("e!", 0.2))) == [
        "",
        f"{BLUE}fuz{PLAIN}{OCHRE}e!{PLAIN}",
    ]
    assert painted(chunk("fu"), chunk("zea", ("fuz", 0.95)), chunk("", ends=True)) == ["", f"{BLUE}fuz{PLAIN}", "ea"]


def test_line_ends_are_not_coloured_and_controls_are_escaped() -> None:
    assert painted(chunk("a\n\nb", ("a\n\nb", 0.6))) == [f"{CYAN}a{PLAIN}\n\n{CYAN}b{PLAIN}"]
    assert painted(chunk("\x1b[2J", ("\x1b[2J", 0.6))) == [f"{CYAN}\\x1b[2J{PLAIN}"]


@NEEDS_TERMINAL
@pytest.mark.parametrize("more", [[], ["--num-return-sequences", "2", "--do-sample", "--seed", "5"]])
def test_at_a_terminal(more: list[str]) -> None:
    """What is shown, without its colours, is the text; the tiny model writes characters in several tokens."""
    model = load(TINY_BUNDLE, threads=1, device="cpu")
    options = {"num_return_sequences": 2, "do_sample": True, "seed": 5} if more else {}
    done = model.generate("Hello", max_new_tokens=60, logprobs=0, **options)  # type: ignore[arg-type]
    with at_terminal("run", "-m", str(TINY_BUNDLE), "Hello", "-n", "60", "--show-probs", *more) as terminal:
        assert terminal.status() == 0
        shown = terminal.shown.replace("\r\n", "\n")
    legend, _, text = shown.partition("\n")
    assert re.sub(r"\x1b\[[0-9;]*m", "", legend).startswith("edgelm: probabilities: red below 1 %, orange 1 to 10 %,")
    assert all(f"\x1b[38;5;{number}m{name} " in legend for name, number in COLOURS)
    assert f"Hello{painted_choice(done.choices[0].text[:1], done.choices[0].logprobs)}" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert visible(plain) == visible("\n".join(f"Hello{choice.text}\n" for choice in done.choices))


def painted_choice(first: str, logprobs: tuple[TokenLogprobs, ...] | None) -> str:
    """The colour with which a text begins, and its first character."""
    assert logprobs is not None
    return ProbabilityPainter().painted(Chunk(first, (1,), 0, logprobs=logprobs[:1])).removesuffix(PLAIN)


def visible(text: str) -> str:
    """`text` as far as a terminal's way of writing controls does not matter."""
    return re.sub(r"\\x..|[^ -~]", "", text)


@NEEDS_TERMINAL
@pytest.mark.parametrize(
    ("env", "reason"), [({"NO_COLOR": "1"}, "NO_COLOR is set"), ({"TERM": "dumb"}, "this terminal has none")]
)
def test_a_terminal_without_colours(env: dict[str, str], reason: str) -> None:
    command = ("run", "-m", str(TINY_BUNDLE), "Hello", "-n", "3", "--show-probs")
    with at_terminal(*command, env=env) as terminal:
        assert terminal.status() == 0
        assert f"edgelm: no colours, because {reason}" in terminal.shown
        assert "\x1b" not in terminal.shown
        assert "Hello" in terminal.shown
    with at_terminal(*command, env={"NO_COLOR": ""}) as terminal:  # an empty one counts as not set
        assert terminal.status() == 0
        assert RED.encode() in terminal.shown.encode()


@NEEDS_TERMINAL
def test_the_legend_is_plain_in_a_file() -> None:
    program = ("sh", "-c", f"exec '{sys.executable}' -m edgelm \"$@\" 2>&1 >/dev/tty | cat", "sh")
    with at_terminal("run", "-m", str(TINY_BUNDLE), "Hello", "-n", "2", "--show-probs", program=program) as terminal:
        assert terminal.status() == 0
        assert "edgelm: probabilities: red below 1 %, orange 1 to 10 %" in terminal.shown
        # The two streams reach the terminal by two ways, in any order.
        assert "Hello" in terminal.shown and "\x1b[38;5;" in terminal.shown


def test_a_pipe_gets_the_text_without_colours(edgelm_command: RunCommand) -> None:
    plain = edgelm_command("run", "-m", str(TINY_BUNDLE), "Hello", "-n", "5")
    result = edgelm_command("run", "-m", str(TINY_BUNDLE), "Hello", "-n", "5", "--show-probs")
    assert (result.status, result.stdout) == (0, plain.stdout)
    assert result.stderr == (
        "edgelm: no colours, because standard output is no terminal: --json --logprobs 0 has the probabilities as "
        "numbers\n"
    )


def test_contradictions_are_refused(edgelm_command: RunCommand) -> None:
    for more, words in (
        (["--json"], "--show-probs colours text, and --json has none: give --logprobs 0 with it"),
        (["--num-beams", "2"], "--show-probs works with greedy decoding and sampling only"),
        (["--penalty-alpha", "0.6", "--top-k", "4"], "--show-probs works with greedy decoding and sampling only"),
        (["--logprobs", "0"], "--logprobs needs --json"),
    ):
        result = edgelm_command("run", "-m", str(TINY_BUNDLE), "Hello", "--show-probs", *more)
        assert (result.status, result.stdout) == (2, "")
        assert words in result.one_line()
