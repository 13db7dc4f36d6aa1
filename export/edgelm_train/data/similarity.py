"""Pairs of texts with a score that says how similar they are."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from edgelm.errors import ConfigError, PromptError, TrainingError
from edgelm.text.tokenizer import Tokenizer
from edgelm_train.data.corpus import counted
from edgelm_train.data.examples import check_columns
from edgelm_train.data.records import read_records
from edgelm_train.data.templates import Template

Pooling = Literal["mean", "last"]
"""How the hidden states of a text become one vector, as in `edgelm.Model.embed`."""


@dataclass(frozen=True)
class SimilarityTask:
    """Templates that turn a row into two texts, and the column of their score."""

    prompt: Template
    second: Template
    score: str
    pooling: Pooling = "mean"

    @classmethod
    def parse(
        cls, prompt: str | None, second: str | None, score: str | None, pooling: Pooling | None
    ) -> "SimilarityTask":
        """Read both templates.

        Raises:
            ConfigError: one of the three is missing, or a template cannot be read or names no column.
        """
        if prompt is None or second is None or score is None:
            raise ConfigError("similarity needs all of --prompt, --second and --similarity: two texts and their score")
        task = cls(Template.parse(prompt), Template.parse(second), score, pooling or get_args(Pooling)[0])
        for flag, template, text in (("prompt", task.prompt, prompt), ("second", task.second, second)):
            if not template.columns:
                raise ConfigError(f"--{flag} {text!r} names no column: every row would have the same text")
        return task


@dataclass(frozen=True)
class TextPair:
    """Token ids of two texts, and their score: higher for texts that are more alike, on any scale."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class TextPairs:
    """The usable pairs of a file, and notes that count the rows left out."""

    pairs: tuple[TextPair, ...]
    notes: tuple[str, ...]


def read_scored_texts(path: Path, task: SimilarityTask) -> list[tuple[str, str, str, float]]:
    """Place, first text, second text and score of every row of a file of records; this needs no tokenizer.

    Raises:
        TrainingError: the file cannot be read or lacks a column, or a score is no number.
    """
    records = read_records(path)
    check_columns(records, path, (*task.prompt.columns, *task.second.columns, task.score))
    rows = []
    for where, row in zip(records.places, records.rows, strict=True):
        try:
            score = float(row[task.score])
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise TrainingError(f"{where} has {row[task.score]!r:.60} where a number belongs: the score {task.score!r}")
        rows.append((where, task.prompt.fill(row), task.second.fill(row), score))
    return rows


def read_text_pairs(path: Path, task: SimilarityTask, tokenizer: Tokenizer, context_length: int) -> TextPairs:
    """The pairs of a file of records, encoded as the runtime encodes a text that it embeds.

    The notes count the pairs left out: those with an empty text, and those longer than `context_length` tokens.

    Raises:
        TrainingError: as for `read_scored_texts`; or a text cannot be encoded, or no two scores differ.
    """
    rows = read_scored_texts(path, task)
    pairs: list[TextPair] = []
    empty = long = 0
    for where, first, second, score in rows:
        try:
            pair = TextPair(tuple(tokenizer.encode_prompt(first)), tuple(tokenizer.encode_prompt(second)), score)
        except PromptError as error:
            raise TrainingError(f"{where} cannot be learned: {error}") from None
        lengths = len(pair.first), len(pair.second)
        if not (first.strip() and second.strip() and min(lengths)):
            empty += 1
        elif max(lengths) > context_length:
            long += 1
        else:
            pairs.append(pair)
    reasons = ((empty, "one of their texts is empty"), (long, f"a text is longer than {context_length} tokens"))
    notes = tuple(f"left out {n:,} of {counted(len(rows), 'pair')}: {why}" for n, why in reasons if n)
    if len({pair.score for pair in pairs}) < 2:
        raise TrainingError(f"{str(path)!r} has no two usable pairs with different scores: there is nothing to rank")
    return TextPairs(tuple(pairs), notes)
