"""Prompts with completions as token ids, of which only the completion is learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import ConfigError, TrainingError
from edgelm.text.tokenizer import Tokenizer
from edgelm_train.data.packing import IGNORED
from edgelm_train.data.records import Records, read_records
from edgelm_train.data.template import Template


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its completion, which ends with the end-of-text token where the model has one."""

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def labels(self) -> list[int]:
        """What each position is to be: -100 in the prompt, the id itself in the completion, (T,)."""
        return [IGNORED] * self.prompt_length + list(self.ids[self.prompt_length :])


@dataclass(frozen=True)
class Examples:
    """The usable examples of a file, and what was left out."""

    examples: tuple[Example, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """How rows become prompts and completions.

    A completion's text begins with the space that stands between it and the prompt: a byte-level vocabulary joins
    that space to the word after it, and the runtime encodes the prompt alone.
    """

    prompt: Template
    completion: Template

    @classmethod
    def parse(cls, prompt: str | None, completion: str | None) -> "Task":
        """Both templates; where neither is given, the columns ``prompt`` and ``completion`` as they are.

        Raises:
            ConfigError: one is missing or cannot be read, or the completion names no column.
        """
        if (prompt is None) != (completion is None):
            raise ConfigError("a template for the prompt needs one for the completion, and the other way round")
        task = cls(
            Template.parse("{prompt}" if prompt is None else prompt),
            Template.parse("{completion}" if completion is None else completion),
        )
        if not task.completion.columns:
            raise ConfigError(f"the completion template {completion!r} names no column: there is nothing to learn")
        return task


def encode_example(tokenizer: Tokenizer, prompt: str, completion: str, eos_token_id: int | None) -> Example:
    """Encode one example: the prompt exactly as the runtime does, then the completion, then the end of text."""
    start = tokenizer.encode_prompt(prompt)
    end = tokenizer.encode(completion, add_special_tokens=False)
    return Example((*start, *end, *([] if eos_token_id is None else [eos_token_id])), len(start))


def read_examples(
    path: Path, task: Task, tokenizer: Tokenizer, *, eos_token_id: int | None, context_length: int
) -> Examples:
    """The examples of a file of records.

    Left out, and counted in the notes: rows whose completion is empty, and examples longer than `context_length`.

    Raises:
        TrainingError: the file cannot be read, lacks a column, or has no usable example.
    """
    records = read_records(path)
    _check_columns(path, records, task)
    encoded, empty = [], 0
    for row in records.rows:
        prompt, completion = task.prompt.fill(row), task.completion.fill(row)
        if not completion.strip():
            empty += 1
            continue
        encoded.append(encode_example(tokenizer, prompt, completion, eos_token_id))
    fitting = tuple(example for example in encoded if len(example.ids) <= context_length)
    # The first token of a text is given, never predicted: without a prompt, one token alone teaches nothing.
    usable = tuple(example for example in fitting if len(example.ids) > 1)
    total = len(records.rows)
    reasons = [
        (empty, "their completion is empty"),
        (len(encoded) - len(fitting), f"they are longer than {context_length} tokens"),
        (len(fitting) - len(usable), "they are a single token"),
    ]
    notes = tuple(f"left out {n:,} of {total:,} examples: {why}" for n, why in reasons if n)
    if not usable:
        raise TrainingError(f"{str(path)!r} has no usable example: {'; '.join(notes)}")
    return Examples(usable, notes)


def pad(examples: Sequence[Example], pad_token_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and labels (B, T) of a batch, padded on the right, where causal attention never looks."""
    longest = max(len(example.ids) for example in examples)
    ids = [[*example.ids, *[pad_token_id] * (longest - len(example.ids))] for example in examples]
    labels = [[*example.labels, *[IGNORED] * (longest - len(example.ids))] for example in examples]
    return ids, labels


def _check_columns(path: Path, records: Records, task: Task) -> None:
    for name in (*task.prompt.columns, *task.completion.columns):
        if name not in records.columns:
            raise TrainingError(
                f"{str(path)!r} has no column {name!r}, only {', '.join(map(repr, records.columns[:20]))}; "
                "give --prompt and --completion templates that name its columns"
            )
