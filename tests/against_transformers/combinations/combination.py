"""One random checkpoint: everything about it follows from a seed and a number."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from tests.against_transformers.combinations import layouts, models, settings, tokenizer_kinds
from tests.against_transformers.combinations.draft import TOKENIZER, Draft, Oddity, some

TEXTS = ["the", "The miller", "river", "n't", "'s", " ", "  ", "\n", "A: ", ".", "!", "42", "é", "e\u0301", "今天"]
TEXTS += ["日本", "한국", "Привет", "مرحبا", "🎉", "👩\u200d👧", "<|endoftext|>", "<s>", "[PAD]", "[SEP]", "<tool>"]
TEXTS += ["\u00a0", "\ufeff", "##s", "▁", "</w>", "ﬁ", "Straße", "\x00", "\r\n", "x" * 20]
"""Pieces of prompts."""

Prompt = str | list[int]


@dataclass(frozen=True)
class Combination:
    """A checkpoint on the disk, and another one for transformers where it cannot load the first."""

    seed: int
    number: int
    facts: tuple[str, ...]
    """What is odd about it."""
    source: Path
    reference: Path
    vocab_size: int
    refused: tuple[str, ...]
    """Parts of the sentences with which edgelm may refuse it though transformers loads it."""

    @property
    def recipe(self) -> str:
        """How to make it again, and what it is."""
        return f"--seed {self.seed} --only {self.number}: {'; '.join(self.facts)}"

    def prompts(self) -> list[Prompt]:
        """Texts, and lists of ids that may end inside a character; some are empty, some longer than the context."""
        rng = random.Random(f"prompts {self.seed} {self.number}")
        texts = ["".join(rng.choices(TEXTS, k=rng.randint(1, 6))) for _ in range(3)]
        ids = [rng.randrange(self.vocab_size) for _ in range(rng.randint(1, 7))]
        others: list[Prompt] = ["", " ", "\n\n", "the river " * 40, [0] * 70, [self.vocab_size], "Hello"]
        return [*texts, ids, rng.choice(others)]


def make(seed: int, number: int, folder: Path) -> Combination:
    """The combination `number` of `seed`, written into the new folder `folder`."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice(list(tokenizer_kinds.KINDS))
    files = Draft({}, {})
    tokenizer_kinds.KINDS[kind](files, rng)
    files_of_reference = files.copy()
    oddities = some(rng, tokenizer_kinds.TOKENIZER_ODDITIES, 0, 2)
    for oddity in oddities:
        _change(oddity, files, files_of_reference, rng)
    more = rng.choice([0, 0, 0, 0, 3, 50, -1, -2])
    vocab_size = max(2, _tokens(files) + more)
    draft, design = models.draw_model(rng, vocab_size)
    draft.other_files = files.other_files
    facts = [kind, *(oddity.name for oddity in oddities), f"{more:+} rows", *design]
    facts += settings.add_settings(draft, rng)
    reference = draft.copy()
    draft.json_files |= files.json_files
    reference.json_files |= files_of_reference.json_files
    later = some(rng, models.CONFIGS, 0, 2) + some(rng, models.WEIGHTS, 0, 1)
    if rng.random() < 0.07:
        later.append(rng.choice(models.BROKEN))
    for oddity in later:
        _change(oddity, draft, reference, rng)
    _name_class(reference)
    layout = layouts.draw_layout(rng)
    facts += [oddity.name for oddity in later] + [f"{name}: {value}" for name, value in layout.items()]
    source = layouts.write(draft, folder / "source", layout)
    same = _same(draft, reference)
    return Combination(
        seed,
        number,
        tuple(facts),
        source,
        source if same else layouts.write(reference, folder / "reference", layout),
        vocab_size,
        tuple(oddity.refused for oddity in (*oddities, *later) if oddity.refused),
    )


def remove(folder: Path) -> None:
    """Remove a folder of combinations, some of which nobody may write to."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)


def _change(oddity: Oddity, draft: Draft, reference: Draft, rng: random.Random) -> None:
    """Add an oddity to a draft, and the same to the draft for transformers unless only edgelm can load it."""
    state = rng.getstate()
    oddity.change(draft, rng)
    if not oddity.only_edgelm:
        rng.setstate(state)
        oddity.change(reference, rng)


def _name_class(reference: Draft) -> None:
    """Name the tokenizer class that docs/compatibility.md says edgelm takes, where transformers would take another."""
    config = reference.json_files.get(TOKENIZER, {})
    if not config.get("tokenizer_class") and "vocab.txt" in reference.other_files:
        reference.json_files[TOKENIZER] = config | {"tokenizer_class": "BertTokenizer"}


def _tokens(draft: Draft) -> int:
    """The highest id that the tokenizer's files have, plus one."""
    if (content := draft.json_files.get("tokenizer.json")) is not None:
        try:
            ids = list(Tokenizer.from_str(json.dumps(content)).get_vocab(with_added_tokens=True).values())
        except Exception:  # a decoder or normalizer that does not fit: a draft of a broken file
            ids = [299]
        return int(max(ids, default=0)) + 1
    known = tokenizer_kinds.vocabulary(draft)
    added = draft.json_files.get("added_tokens.json", {})
    return max([2, *map(int, known.values()), *map(int, added.values())]) + 1


def _same(one: Draft, other: Draft) -> bool:
    weights = one.weights.keys() == other.weights.keys()
    weights = weights and all(one.weights[key].equal(other.weights[key]) for key in one.weights)
    return weights and (one.config, one.json_files) == (other.config, other.json_files)
