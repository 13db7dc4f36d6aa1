"""Writes the training text of the dialogue model.

    python -m benchmarks.data self_dialogue
    python models/self_dialogue_text.py data/self_dialogue.jsonl chats.txt

The input is The Self-dialogue Corpus (Krause et al. 2017, arXiv 1709.09816, BSD-3-Clause), one chat as a JSON object on
each line. A chat becomes a document, and each of its turns a line. Three kinds of chats are left out: those with
unfilled turns (``{}``), those with less than half of their turns distinct, and those with coarse words.
"""

import argparse
import json
import re
import sys
from pathlib import Path

SEPARATOR = "\n<|endoftext|>\n"
COARSE = re.compile(r"\b(fuck|shit|bitch|nigg|fag)", re.IGNORECASE)


def chat_text(turns: list[str]) -> str | None:
    """The text of a chat, one line for each turn; None for a chat that is left out."""
    lines = [" ".join(turn.split()) for turn in turns]
    text = "\n".join(lines)
    if "{}" in lines or 2 * len(set(lines)) < len(lines) or COARSE.search(text):
        return None
    return text


def main() -> None:
    """Write the chats that are kept."""
    parser = argparse.ArgumentParser(description="Write the training text of the dialogue model.")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="self_dialogue.jsonl, as benchmarks.data makes it")
    parser.add_argument("target", type=Path, metavar="TARGET", help="text file to write")
    options = parser.parse_args()
    with options.source.open(encoding="utf-8") as lines:
        texts = [chat_text(json.loads(line)["turns"]) for line in lines]
    kept = [text for text in texts if text is not None]
    options.target.write_text(SEPARATOR.join(kept) + "\n", encoding="utf-8")
    sys.stderr.write(f"{len(kept):,} chats kept, {len(texts) - len(kept):,} left out\n")


if __name__ == "__main__":
    main()
