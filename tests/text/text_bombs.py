"""Texts that are made to be slow: a text that is ten times as long takes ten times the work.

    python -m tests.text.text_bombs [KIND ...]                  # machine instructions, 5,000 and 50,000 characters
    python -m tests.text.text_bombs --characters 100000 gpt2    # 100,000 and 1,000,000 characters
    python -m tests.text.text_bombs --times [KIND ...]          # CPU time and memory, 100,000 and 1,000,000 characters

Instructions tell whether the work is linear, whatever the machine does meanwhile; valgrind counts them. Where a text is
not encoded in pieces, times grow faster, because Rust keeps hundreds of bytes for each character, and memory is slower
the more of it is in use. All need Linux.
"""

import argparse
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

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


Measure = tuple[float, int]
"""CPU time in seconds, and peak memory of the process in bytes."""


def seconds(tokenizer: Tokenizer, text: str) -> float:
    """CPU time of encoding `text`."""
    began = time.process_time()
    tokenizer.encode(text)
    return time.process_time() - began


def ratio(tokenizer: Tokenizer, unit: str, characters: int) -> float:
    """How many times longer a text of ten times `characters` takes; 0 where it is refused."""
    short, long = _pair(unit, characters)
    try:
        return seconds(tokenizer, long) / max(min(seconds(tokenizer, short) for _ in range(3)), 2e-4)
    except PromptError as error:
        assert "characters" in str(error)
        return 0.0


def _pair(unit: str, characters: int) -> tuple[str, str]:
    return unit * (characters // len(unit)), unit * (10 * characters // len(unit))


def _refuses(tokenizer: Tokenizer, text: str) -> bool:
    try:
        tokenizer._check_length(text)
    except PromptError:
        return True
    return False


def _in_child(work: Callable[[], object]) -> tuple[int, Measure]:
    """Do `work` in a fork of this process; returns the fork's id, and what it took."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            began = time.process_time()
            work()
            took = time.process_time() - began
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
            os.write(writing, struct.pack("dq", took, int(peak[1]) * 1024 if peak else 0))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        took, peak_bytes = struct.unpack("dq", stream.read())
    os.waitpid(child, 0)
    return child, (took, peak_bytes)


def print_times(kind: str, characters: int) -> None:
    """Print the worst ratio of the times of a kind, and the most memory that a text took."""
    tokenizer = Tokenizer.from_json(text_of(kind))
    _, (_, empty_bytes) = _in_child(lambda: tokenizer.encode(""))
    rows, memory = [], []
    for name, unit in BOMBS.items():
        texts = _pair(unit, characters)
        if not _refuses(tokenizer, texts[1]):
            # Each text is the first of its process, so that long and short alike pay for pages that nobody touched yet.
            short, long = (min(_in_child(partial(tokenizer.encode, text))[1] for _ in range(3)) for text in texts)
            rows.append((long[0] / short[0], name, long[0]))
            memory.append(((long[1] - empty_bytes) / 1e6, name))
    if not rows:
        sys.stdout.write(f"{kind}: all {len(BOMBS)} refused\n")
        return
    (worst, name, took), (most, largest) = max(rows), max(memory)
    sys.stdout.write(
        f"{kind}: {worst:.1f} times as long ({name}, {took:.2f} s), {most:,.0f} MB at most ({largest}), "
        f"{len(BOMBS) - len(rows)} of {len(BOMBS)} refused\n"
    )


def print_instructions(kind: str, characters: int) -> None:
    """Print the worst ratio of the instructions of a kind."""
    with tempfile.TemporaryDirectory() as folder:
        valgrind = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
        command = [*valgrind, f"--log-file={folder}/%p", sys.executable, "-m", "tests.text.text_bombs", kind]
        done = subprocess.run([*command, "--count", f"--characters={characters}"], stdout=subprocess.PIPE, check=True)
        counts = {path.name: _count(path) for path in Path(folder).iterdir()}
    empty, *lines = done.stdout.decode().splitlines()
    ratios = {}
    for line in lines:
        name, short, long = line.split("\t")
        ratios[name] = (counts[long] - counts[empty]) / (counts[short] - counts[empty])
    if not ratios:
        sys.stdout.write(f"{kind}: all {len(BOMBS)} refused\n")
        return
    worst = max(ratios, key=lambda name: ratios[name])
    refused = len(BOMBS) - len(ratios)
    sys.stdout.write(f"{kind}: {ratios[worst]:.2f} times the work ({worst}), {refused} of {len(BOMBS)} refused\n")


def _count(log: Path) -> int:
    """The instructions that valgrind counted in a process."""
    found = re.search(r"I\s+refs:\s+([\d,]+)", log.read_text(encoding="utf-8"))
    assert found is not None, f"valgrind counted nothing in {log.name}"
    return int(found[1].replace(",", ""))


def encode_all(kind: str, characters: int) -> None:
    """Encode each pair of texts, each text in a fork whose id is printed; first a fork that encodes nothing."""
    tokenizer = Tokenizer.from_json(text_of(kind))
    tokenizer.encode("a")
    sys.stdout.write(f"{_in_child(lambda: None)[0]}\n")
    for name, unit in BOMBS.items():
        texts = _pair(unit, characters)
        if not _refuses(tokenizer, texts[1]):
            short, long = (_in_child(partial(tokenizer.encode, text))[0] for text in texts)
            sys.stdout.write(f"{name}\t{short}\t{long}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what ten times the text takes, with every kind of tokenizer.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="default: all")
    parser.add_argument("--times", action="store_true", help="CPU time and memory instead of machine instructions")
    parser.add_argument("--characters", type=int, metavar="N", help="length of the shorter text")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    measure = print_times if options.times else encode_all if options.count else print_instructions
    for kind in options.kinds or KINDS:
        measure(kind, options.characters or (100_000 if options.times else 5_000))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
