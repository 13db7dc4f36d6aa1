"""``edgelm chat`` in tmux, a terminal by others: what a person sees while typing, going back, stopping, resizing.

`test_chat_terminal.py` reads what is written to a terminal. This reads the screen that it makes.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli.terminal import WAIT_SECONDS
from tests.conftest import TINY_BUNDLE, make_chat_bundle

pytestmark = [
    pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux"),
    pytest.mark.skipif(find_spec("prompt_toolkit") is None, reason="needs prompt_toolkit"),
]

LONG = ("--plain", "labels", "--greedy", "--min-new-tokens", "400", "-n", "400", "--threads", "1")
"""Of the embedded model: an answer that takes a second or longer."""


@dataclass(frozen=True)
class Tmux:
    """A tmux server of our own with one window."""

    socket: Path

    def run(self, *arguments: str) -> str:
        """What a command of tmux prints."""
        command = ["tmux", "-S", str(self.socket), "-f", os.devnull, *arguments]
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8", timeout=WAIT_SECONDS).stdout

    def type(self, text: str) -> None:
        """Type characters as they are."""
        self.run("send-keys", "-l", text)

    def press(self, *keys: str) -> None:
        """Press keys by tmux's names for them."""
        self.run("send-keys", *keys)

    def screen(self, *options: str) -> str:
        """The lines on the screen, without blanks at their ends."""
        return self.run("capture-pane", "-p", *options)

    def wait_until(self, holds: Callable[[str], object]) -> str:
        """Wait for a screen of which `holds` is true, and return it."""
        end = time.monotonic() + WAIT_SECONDS
        while not holds(screen := self.screen()):
            assert time.monotonic() < end, f"never came:\n{screen}"
            time.sleep(0.05)
        return screen

    def wait_for(self, text: str) -> str:
        """Wait until the screen has `text`."""
        return self.wait_until(lambda screen: text in screen)

    def wait_for_prompt(self) -> None:
        """Wait for an empty prompt: what is pressed earlier meets a terminal that reads whole lines."""
        self.wait_until(lambda screen: screen.rstrip().endswith("\n>"))

    def say(self, text: str) -> None:
        """Type a message at an empty prompt."""
        self.wait_for_prompt()
        self.type(text)
        self.press("Enter")


@contextmanager
def in_tmux(socket: Path, *arguments: str) -> Iterator[Tmux]:
    """``edgelm ARGUMENTS`` in a window of 80 columns and 24 lines, which stays when the program ends."""
    tmux = Tmux(socket)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EDGELM_") and k not in ("TMUX", "NO_COLOR")}
    settings = [f"{name}={value}" for name, value in environment.items() if name in ("PATH", "PYTHONPATH", "HOME")]
    program = ["env", *settings, sys.executable, "-m", "edgelm", *arguments]
    shell = 'trap : INT; "$@"; echo "status $?"; sleep 60'  # Ctrl-C is for the program alone
    tmux.run("new-session", "-d", "-x", "80", "-y", "24", "sh", "-c", shell, "sh", *program)
    try:
        yield tmux
    finally:
        tmux.run("kill-server")


@pytest.fixture(scope="module")
def chat_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_bundle(tmp_path_factory.mktemp("chat"))


def test_typing_and_history(chat_bundle: Path, tmp_path: Path) -> None:
    with in_tmux(tmp_path / "socket", "chat", "-m", str(chat_bundle), "-n", "2", "--greedy") as tmux:
        tmux.say("The first message")
        tmux.wait_for("cut after 2 tokens")
        tmux.say("The second")
        tmux.wait_until(lambda screen: screen.count("> The second") == 1 and screen.rstrip().endswith("\n>"))
        tmux.press("Up", "Up")
        tmux.wait_until(lambda screen: screen.rstrip().endswith("> The first message"))
        tmux.press("Home", "Right", "Right", "Right", "BSpace", "BSpace", "BSpace")
        tmux.type("My")
        tmux.wait_until(lambda screen: screen.rstrip().endswith("> My first message"))
        tmux.press("Down")
        tmux.wait_until(lambda screen: screen.rstrip().endswith("> The second"))
        tmux.press("C-c")  # clears the line
        tmux.say("/quit")
        assert tmux.wait_for("status 0").count("> The second") >= 1


def test_an_interrupt_stops_the_answer(tmp_path: Path) -> None:
    with in_tmux(tmp_path / "socket", "chat", *LONG) as tmux:
        tmux.say("Tell me a story")
        tmux.wait_for(" and ")
        tmux.press("C-c")
        tmux.wait_for("edgelm: stopped; the answer so far is kept")
        tmux.say("/stats")
        tmux.wait_for("1 turn; ")
        tmux.wait_for_prompt()
        tmux.press("C-d")
        assert "Traceback" not in tmux.wait_for("status 0")


def test_a_line_that_is_being_typed_survives_another_size(tmp_path: Path) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    with in_tmux(tmp_path / "socket", "chat", "-m", str(TINY_BUNDLE), "-n", "2", "--plain", "lines") as tmux:
        tmux.wait_for_prompt()
        tmux.type(words)
        for columns, lines in (("80", "24"), ("30", "10"), ("120", "40"), ("50", "12")):
            tmux.run("resize-window", "-x", columns, "-y", lines)
            tmux.wait_until(lambda screen: words.replace(" ", "") in "".join(screen.split()))
            assert max(map(len, tmux.screen().split("\n"))) <= int(columns)
        tmux.press("Enter")
        tmux.wait_for("the message takes")  # more tokens than the tiny model's context has
        tmux.say("/quit")
        tmux.wait_for("status 0")


def test_probabilities_are_colours(tmp_path: Path) -> None:
    with in_tmux(tmp_path / "socket", "run", "--seed", "1", "-n", "20", "--show-probs", "Once upon a time") as tmux:
        assert "Once upon a time, there was" in tmux.wait_for("status 0").replace("\n", "")
        colours = tmux.screen("-e")
        assert "\x1b[38;5;33m was" in colours and "Once upon a time\x1b[38;5;37m," in colours
