"""A partner to talk with: the Self-dialogue Corpus."""

import json
from pathlib import Path

from edgelm.errors import TrainingError
from edgelm_recipes.recipe import Baseline, Parts, Recipe, Source, Turns, one_line, read_lines

SOURCE = Source(
    name="the Self-dialogue Corpus (Krause et al. 2017)",
    licence="BSD-3-Clause",
    url="https://github.com/jfainberg/self_dialogue_corpus",
    files=("self_dialogue.jsonl",),
)
_DEV_EVERY = 40
"""The corpus has no development part of its own."""


def read(folder: Path) -> Parts:
    """The chats of ``self_dialogue.jsonl``, in a folder or the file itself; every 40th is of the development part."""
    folder, name = (folder.parent, folder.name) if folder.is_file() else (folder, SOURCE.files[0])
    chats: list[Turns] = []
    for number, line in enumerate(read_lines(folder, name, SOURCE), 1):
        if not line.strip():
            continue
        try:
            turns = json.loads(line)["turns"]
            assert isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
        except (ValueError, LookupError, TypeError, AssertionError, RecursionError):
            raise TrainingError(
                f'line {number} of {str(folder / name)!r} must be an object of JSON with a list of texts, "turns"; '
                "correct it"
            ) from None
        chats.append(tuple(one_line(turn) for turn in turns if turn.strip()))
    chats = [chat for chat in chats if len(chat) > 1]
    dev = tuple(chats[::_DEV_EVERY])
    return Parts(tuple(chat for number, chat in enumerate(chats) if number % _DEV_EVERY), dev)


RECIPE = Recipe(
    name="chat",
    does="talks about films, music and sport",
    source=SOURCE,
    read=read,
    inputs=(),
    target="answer",
    task={
        "kind": "chat",
        "generation": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 60},
        "description": "Talks in English about films, music and sport.",
    },
    training={"prompt": "{prompt}", "completion": "{completion}", "epochs": 1.0, "batch_size": 8},
    metric="perplexity",
    baseline=Baseline("the base before tuning", None),
)
