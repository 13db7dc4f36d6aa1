"""``edgelm chat`` at a terminal: typing, history, Ctrl-C, Ctrl-D, another size; with prompt_toolkit and without."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli.terminal import Terminal, at_terminal
from tests.conftest import TINY_BUNDLE, make_chat_bundle

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a pseudoterminal")

EDITED = pytest.param(
    {}, id="edited", marks=pytest.mark.skipif(find_spec("prompt_toolkit") is None, reason="needs prompt_toolkit")
)
PLAIN = pytest.param({"TERM": "dumb"}, id="plain")
LONG = ("--plain", "labels", "--greedy", "--min-new-tokens", "400", "-n", "400", "--threads", "1")
"""Of the embedded model: an answer that takes a second or longer."""


@pytest.fixture(scope="module")
def chat_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_bundle(tmp_path_factory.mktemp("chat"))


def wait_for_prompt(terminal: Terminal, *, next_line: bool = False) -> None:
    """Wait for the prompt, behind which an editor moves the cursor in ways of its own."""
    terminal.wait_for_match("\\.[ \b]" if next_line else ">[ \b]")


def say(terminal: Terminal, text: str) -> None:
    """Type a message when the prompt is there."""
    wait_for_prompt(terminal)
    terminal.type(text + "\r")


@pytest.mark.parametrize("env", [EDITED, PLAIN])
def test_a_conversation(env: dict[str, str], chat_bundle: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    with at_terminal("chat", "-m", str(chat_bundle), "-n", "2", env=env) as terminal:
        terminal.wait_for("context 64: /help lists the commands, Ctrl-D ends")
        say(terminal, "Hi")
        terminal.wait_for("edgelm: the answer was cut after 2 tokens: /set max_new_tokens allows more")
        say(terminal, "/stat")
        terminal.wait_for("did you mean /stats?")
        say(terminal, "/set max_new_tokens 3")
        terminal.wait_for("max_new_tokens is 3")
        say(terminal, "/retry")
        terminal.wait_for("/set do_sample true")
        terminal.wait_for("cut after 3 tokens")
        say(terminal, '"""')
        wait_for_prompt(terminal, next_line=True)
        terminal.type("one\r")
        wait_for_prompt(terminal, next_line=True)
        terminal.type('two"""\r')
        terminal.wait_for("cut after 3 tokens")
        say(terminal, f"/save {saved}")
        terminal.wait_for("saved 2 turns")
        say(terminal, "/quit")
        assert terminal.status() == 0
    assert '"user": "one\\ntwo"' in saved.read_text(encoding="utf-8")


@pytest.mark.parametrize("env", [EDITED, PLAIN])
def test_ctrl_c_stops_the_answer_and_not_the_program(env: dict[str, str]) -> None:
    with at_terminal("chat", *LONG, env=env) as terminal:
        say(terminal, "Tell me a story")
        terminal.wait_for("and ")
        terminal.type("\x03")
        terminal.wait_for("edgelm: stopped; the answer so far is kept")
        say(terminal, "/stats")
        stats = terminal.wait_for("1 turn; ")
        new_tokens = int(stats.split(" tok, ")[0].rpartition(" ")[2])
        assert 1 <= new_tokens < 400
        wait_for_prompt(terminal)
        terminal.type("\x04")
        assert terminal.status() == 0


@pytest.mark.parametrize("env", [EDITED, PLAIN])
def test_ctrl_c_twice_at_an_empty_line_ends(env: dict[str, str]) -> None:
    with at_terminal("chat", "-m", str(TINY_BUNDLE), "-n", "1", env=env) as terminal:
        wait_for_prompt(terminal)
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C again, or Ctrl-D, ends")
        say(terminal, "Hi")  # so the next one is the first again
        terminal.wait_for("cut after 1 tokens")
        wait_for_prompt(terminal)
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C again, or Ctrl-D, ends")
        wait_for_prompt(terminal)
        terminal.type("\x03")
        assert terminal.status() == 130
        assert "Traceback" not in terminal.shown


@pytest.mark.skipif(find_spec("prompt_toolkit") is None, reason="needs prompt_toolkit")
def test_lines_can_be_edited(chat_bundle: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    with at_terminal("chat", "-m", str(chat_bundle), "-n", "2") as terminal:
        say(terminal, "abd\x1b[Dc")  # the cursor one to the left
        terminal.wait_for("cut after")
        wait_for_prompt(terminal)
        terminal.resize(10, 30)
        terminal.type("\x1b[Ae\r")  # the line before, with one more letter
        terminal.wait_for("cut after")
        say(terminal, "one\x1b\rtwo")  # Alt-Enter
        terminal.wait_for("cut after")
        terminal.resize(40, 200)
        wait_for_prompt(terminal)
        terminal.type("gone\x03")  # clears the line, and is no first Ctrl-C
        wait_for_prompt(terminal)
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C again")
        wait_for_prompt(terminal)
        terminal.type("/sav\t")
        terminal.wait_for_match("/sav.*e")
        terminal.type(f" {saved}\r")
        terminal.wait_for("saved 3 turns")
        wait_for_prompt(terminal)
        terminal.type("\x04")
        assert terminal.status() == 0
    content = saved.read_text(encoding="utf-8")
    assert [f'"user": "{text}"' in content for text in ("abcd", "abcde", r"one\ntwo")] == [True] * 3


def test_without_prompt_toolkit(chat_bundle: Path) -> None:
    code = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'prompt_toolkit' else find(name, *rest)\n"
        "sys.argv[0] = 'edgelm'\n"
        "from edgelm.cli import main; main()\n"
    )
    program = (sys.executable, "-c", code)
    with at_terminal("chat", "-m", str(chat_bundle), "-n", "2", program=program) as terminal:
        say(terminal, "Hi")
        terminal.wait_for("cut after 2 tokens")
        wait_for_prompt(terminal)
        terminal.type("\x04")
        assert terminal.status() == 0


def test_answers_alone_go_to_standard_output(chat_bundle: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.txt"
    program = ("sh", "-c", f"exec '{sys.executable}' -m edgelm \"$@\" > '{answers}'", "sh")
    with at_terminal("chat", "-m", str(chat_bundle), "-n", "2", program=program) as terminal:
        say(terminal, "Hi")
        terminal.wait_for("cut after 2 tokens")
        say(terminal, "/help")
        terminal.wait_for("ends the program")
        say(terminal, "Ho")
        terminal.wait_for("cut after 2 tokens")
        wait_for_prompt(terminal)
        terminal.type("\x04")
        assert terminal.status() == 0
    assert len(answers.read_text(encoding="utf-8").split("\n\n")) == 2
    assert not {"> ", "help", "\x1b"} & set(answers.read_text(encoding="utf-8"))
