"""Make docs/terminal.svg: commands and what they print, word by word (`python docs/site/make_terminal.py`).

The pace is a fixed one, so that a busy machine makes the same picture.
"""

import os
import pty
import re
import sys
from html import escape
from pathlib import Path

COMMANDS = [
    ["run", "--greedy", "-n", "48", "Once upon a time"],
    ["choose", "She was sad and began to", "-o", " cry", "-o", " laugh"],
    ["run", "-m", "models/dialogue-6m-int8", "--seed", "9", "-n", "24", "Do you like music?"],
]
COLUMNS = 76
LINE_HEIGHT, CHARACTER_WIDTH = 19, 8.43
SECONDS_PER_WORD = 0.05
STYLE = """
text { font: 14px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #d8dee9; white-space: pre; }
.typed { fill: #8fd3c1; }
tspan { animation: appear 0.01s both; }
@keyframes appear { from { opacity: 0; } }
@media (prefers-reduced-motion: reduce) { tspan { animation: none; } }
"""


def printed(command: list[str]) -> str:
    """What edgelm prints at a terminal."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ["COLUMNS"] = str(COLUMNS)
        os.execv(sys.executable, [sys.executable, "-m", "edgelm", *command])
    printed_bytes = b""
    try:
        while data := os.read(terminal, 4096):
            printed_bytes += data
    except OSError:  # Linux reports the end of a terminal like this
        pass
    if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        sys.exit(printed_bytes.decode())
    return printed_bytes.decode().replace("\r\n", "\n")


def lines() -> list[list[tuple[str, str]]]:
    """The lines of the picture, each in words with their classes; long lines are cut at blanks."""
    screen: list[list[tuple[str, str]]] = [[]]
    for command in COMMANDS:
        words = " ".join(f'"{word}"' if " " in word else word for word in command)
        for kind, text in [("typed", f"$ edgelm {words}\n"), ("", printed(command)), ("", "\n")]:
            for index, part in enumerate(text.split("\n")):
                if index:
                    screen.append([])
                for word in re.findall(r" *[^ ]+| +$", part):
                    if sum(len(each) for _, each in screen[-1]) + len(word) > COLUMNS:
                        screen.append([])
                        word = word.lstrip()
                    screen[-1].append((kind, word))
    return screen


def picture(screen: list[list[tuple[str, str]]]) -> str:
    """The lines as SVG."""
    texts, shown = [], 0
    for number, line in enumerate(screen, 1):
        spans = []
        for kind, text in line:
            shown += 1
            style = f'class="{kind}" style="animation-delay:{shown * SECONDS_PER_WORD:.2f}s"'
            spans.append(f"<tspan {style}>{escape(text)}</tspan>")
        texts.append(f'<text x="16" y="{number * LINE_HEIGHT + 8}" xml:space="preserve">{"".join(spans)}</text>')
    width, height = round(COLUMNS * CHARACTER_WIDTH) + 32, len(screen) * LINE_HEIGHT + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" rx="8" fill="#1b2028"/>{"".join(texts)}</svg>\n'
    )


if __name__ == "__main__":
    shown_lines = lines()
    while not shown_lines[-1]:
        shown_lines.pop()
    Path(__file__).parents[1].joinpath("terminal.svg").write_text(picture(shown_lines), encoding="utf-8")
