"""Prompts and completions as token ids; only the completion is learned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgelm.errors import PromptError, TrainingError
from edgelm.text.control_tokens import ControlTokens
from edgelm.text.tokenizer import Tokenizer
from edgelm_train.data.chats import chat_columns, prompts_and_completions, read_chats, roles_of
from edgelm_train.data.corpus import counted
from edgelm_train.data.packing import IGNORED
from edgelm_train.data.records import Records, read_records
from edgelm_train.data.templates import ChatTask, Task


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
class Pairs:
    """The prompts and completions of a file, as text."""

    by_row: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    """Each row's place in the file, for messages, and its pairs: one, or in a chat one for each answer."""
    task: Task | ChatTask
    """The task, with the roles of the data if they are chats."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examples:
    """The usable examples of a file, and notes that count the rows left out."""

    by_row: tuple[tuple[Example, ...], ...]
    """The examples of each row that has some. What is held out is held out by rows."""
    task: Task | ChatTask
    notes: tuple[str, ...]

    @property
    def examples(self) -> tuple[Example, ...]:
        """The examples of all rows."""
        return tuple(example for row in self.by_row for example in row)


def encode_example(tokenizer: Tokenizer, prompt: str, completion: str, eos_token_id: int | None) -> Example:
    """Encode the prompt exactly as the runtime does, then the completion, then the end of text.

    A completion that has the end-of-text token itself ends there, because a generated text would.
    """
    prompt_ids = tokenizer.encode_prompt(prompt)
    completion_ids = tokenizer.encode(completion, add_special_tokens=False)
    if eos_token_id in completion_ids:
        completion_ids = completion_ids[: completion_ids.index(eos_token_id)]
    end = [] if eos_token_id is None else [eos_token_id]
    return Example((*prompt_ids, *completion_ids, *end), len(prompt_ids))


def read_pairs(
    path: Path, task: Task | ChatTask, has_special_token: Callable[[str], bool] = lambda text: False
) -> Pairs:
    """The prompts and completions of a file of records; this needs no tokenizer.

    Args:
        path: the file.
        task: what becomes of a row.
        has_special_token: whether a text spells a special token. Only the template of a turn may write one, so chats
            in which a message does are left out.

    Raises:
        TrainingError: the file cannot be read, lacks a column, or has no chats for the template of a turn.
    """
    records = read_records(path)
    if isinstance(task, ChatTask):
        chats = read_chats(records)
        task = replace(task, roles=roles_of(chats))
        learned = sorted({turn.role for _, chat in chats for turn in chat if turn.learned})
        names = ", ".join(map(repr, learned))
        notes: tuple[str, ...] = (f"learned of each chat: what {names} says, each time after all before it",)
        kept = [(where, chat) for where, chat in chats if not any(has_special_token(turn.content) for turn in chat)]
        if len(kept) < len(chats):
            left_out = f"left out {len(chats) - len(kept):,} of {counted(len(chats), 'chat')}"
            notes += (f"{left_out}: a message spells a special token of the model, which only --turn may write",)
        pairs = tuple((where, tuple(prompts_and_completions(chat, task))) for where, chat in kept)
        return Pairs(pairs, task, notes)
    check_columns(records, path, (*task.prompt.columns, *task.completion.columns))
    rows = ((task.prompt.fill(row), task.completion.fill(row)) for row in records.rows)
    pairs = tuple((where, (pair,)) for where, pair in zip(records.places, rows, strict=True))
    return Pairs(pairs, task)


def read_examples(
    path: Path, task: Task | ChatTask, tokenizer: Tokenizer, *, eos_token_id: int | None, context_length: int
) -> Examples:
    """The examples of a file of records.

    The notes count the examples left out: those with an empty completion, and those that are longer than
    `context_length` tokens or a single token. `eos_token_id` ends every completion, unless it is None.

    Raises:
        TrainingError: the file cannot be read, lacks a column, has a text that the tokenizer cannot encode, or has no
            usable example.
    """
    pairs = read_pairs(path, task, ControlTokens(tokenizer, tokenizer.special_tokens).are_in)
    by_row: list[tuple[Example, ...]] = []
    total = empty = long = single = 0
    for where, row in pairs.by_row:
        usable = []
        total, empty = total + max(1, len(row)), empty + (not row)
        for prompt, completion in row:
            if not completion.strip():
                empty += 1
                continue
            try:
                example = encode_example(tokenizer, prompt, completion, eos_token_id)
            except PromptError as error:
                raise TrainingError(f"{where} cannot be learned: {error}") from None
            # The first token of a text is never predicted. So an example of one token teaches nothing.
            long, single = long + (len(example.ids) > context_length), single + (len(example.ids) < 2)
            if 1 < len(example.ids) <= context_length:
                usable.append(example)
        if usable:
            by_row.append(tuple(usable))
    reasons = [
        (empty, "their completion is empty"),
        (long, f"they are longer than {context_length} tokens"),
        (single, "they are a single token"),
    ]
    notes = tuple(f"left out {n:,} of {counted(total, 'example')}: {why}" for n, why in reasons if n)
    if not by_row:
        raise TrainingError(f"{str(path)!r} has no usable example: {'; '.join(notes)}")
    return Examples(tuple(by_row), pairs.task, pairs.notes + notes)


def check_columns(records: Records, path: Path, names: Sequence[str]) -> None:
    """Raise TrainingError if `records`, which were read from `path`, lack a column of `names`."""
    for name in names:
        if name not in records.columns:
            raise TrainingError(_no_column(name, records, path))


def _no_column(name: str, records: Records, path: Path) -> str:
    """Why a template finds no text in the column `name`, and what to do."""
    if chat_columns(records):
        columns = " and ".join(map(repr, chat_columns(records)))
        return (
            f"{str(path)!r} has chats in {columns}, and no text for the template's {name!r}; "
            r"give --turn '{role}: {content}\n' in place of --prompt and --completion, or your own text of a turn"
        )
    if name in records.nested:
        return f"the column {name!r} cannot fill a template, because it is {records.nested[name]}; make it text first"
    nested = "".join(f"; {column!r} is {what}, which cannot fill a template" for column, what in records.nested.items())
    return (
        f"{str(path)!r} has no column {name!r}, only {', '.join(map(repr, records.columns[:20])) or 'nested ones'}; "
        f"give --prompt and --completion templates that name its columns{nested}"
    )


def pad(examples: Sequence[Example], pad_token_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and labels (B, T) of a batch, padded on the right, where causal attention never looks."""
    longest = max(len(example.ids) for example in examples)
    ids = [[*example.ids, *[pad_token_id] * (longest - len(example.ids))] for example in examples]
    labels = [[*example.labels, *[IGNORED] * (longest - len(example.ids))] for example in examples]
    return ids, labels
