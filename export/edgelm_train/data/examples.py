"""Prompts and completions as token ids; only the completion is learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import TrainingError
from edgelm.text.tokenizer import Tokenizer
from edgelm_train.data.corpus import counted
from edgelm_train.data.packing import IGNORED
from edgelm_train.data.records import Task, read_records


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt, its completion, and the end-of-text token where the model has one."""

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def labels(self) -> list[int]:
        """The label of each position (T,): -100 in the prompt, the token id in the completion."""
        return [IGNORED] * self.prompt_length + list(self.ids[self.prompt_length :])


@dataclass(frozen=True)
class Examples:
    """The usable examples of a file, and notes that count the rows left out."""

    examples: tuple[Example, ...]
    notes: tuple[str, ...]


def encode_example(tokenizer: Tokenizer, prompt: str, completion: str, eos_token_id: int | None) -> Example:
    """Encode the prompt exactly as the runtime does, then the completion, then the end of text."""
    prompt_ids = tokenizer.encode_prompt(prompt)
    completion_ids = tokenizer.encode(completion, add_special_tokens=False)
    end = [] if eos_token_id is None else [eos_token_id]
    return Example((*prompt_ids, *completion_ids, *end), len(prompt_ids))


def read_examples(
    path: Path, task: Task, tokenizer: Tokenizer, *, eos_token_id: int | None, context_length: int
) -> Examples:
    """The examples of a file of records.

    The notes count the rows left out: those with an empty completion, and those whose example is longer than
    `context_length` tokens or is a single token. `eos_token_id` ends every completion, unless it is None.

    Raises:
        TrainingError: the file cannot be read, lacks a column, or has no usable example.
    """
    records = read_records(path)
    for name in (*task.prompt.columns, *task.completion.columns):
        if name not in records.columns:
            raise TrainingError(
                f"{str(path)!r} has no column {name!r}, only {', '.join(map(repr, records.columns[:20]))}; "
                "give --prompt and --completion templates that name its columns"
            )
    encoded, empty = [], 0
    for row in records.rows:
        prompt, completion = task.prompt.fill(row), task.completion.fill(row)
        if not completion.strip():
            empty += 1
            continue
        encoded.append(encode_example(tokenizer, prompt, completion, eos_token_id))
    fitting = tuple(example for example in encoded if len(example.ids) <= context_length)
    # The first token of a text is never predicted. So an example of one token teaches nothing.
    usable = tuple(example for example in fitting if len(example.ids) > 1)
    total = len(records.rows)
    reasons = [
        (empty, "their completion is empty"),
        (len(encoded) - len(fitting), f"they are longer than {context_length} tokens"),
        (len(fitting) - len(usable), "they are a single token"),
    ]
    notes = tuple(f"left out {n:,} of {counted(total, 'example')}: {why}" for n, why in reasons if n)
    if not usable:
        raise TrainingError(f"{str(path)!r} has no usable example: {'; '.join(notes)}")
    return Examples(usable, notes)


def pad(examples: Sequence[Example], pad_token_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and labels (B, T) of a batch, padded on the right, where causal attention never looks."""
    longest = max(len(example.ids) for example in examples)
    ids = [[*example.ids, *[pad_token_id] * (longest - len(example.ids))] for example in examples]
    labels = [[*example.labels, *[IGNORED] * (longest - len(example.ids))] for example in examples]
    return ids, labels
