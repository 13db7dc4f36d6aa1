"""Writes the text of the dialogue model: ``python models/self_dialogue_text.py self_dialogue.jsonl chats.txt``.

The input is The Self-dialogue Corpus (Krause et al. 2017, arXiv 1709.09816, BSD-3), a chat in a line of JSON. A chat
becomes a document and a turn a line of it. Chats with unfilled turns (``{}``), with less than half of their turns
distinct or with coarse words are left out.
"""

import json
import re
import sys
from pathlib import Path

SEPARATOR = "\n<|endoftext|>\n"
COARSE = re.compile(r"\b(fuck|shit|bitch|nigg|fag)", re.IGNORECASE)


def chat_text(turns: list[str]) -> str | None:
    """One line a turn, or None for a chat that is left out."""
    lines = [" ".join(turn.split()) for turn in turns]
    text = "\n".join(lines)
    if "{}" in lines or 2 * len(set(lines)) < len(lines) or COARSE.search(text):
        return None
    return text


def main(source: Path, target: Path) -> None:
    """Write the chats of `source` that are kept to `target`."""
    with source.open(encoding="utf-8") as lines:
        texts = [chat_text(json.loads(line)["turns"]) for line in lines]
    kept = [text for text in texts if text is not None]
    target.write_text(SEPARATOR.join(kept) + "\n", encoding="utf-8")
    sys.stderr.write(f"{len(kept):,} chats kept, {len(texts) - len(kept):,} left out\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
