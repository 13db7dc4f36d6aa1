"""What a recipe says, and what its readers share. This file loads without torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgelm.errors import TrainingError
from edgelm_train.data.templates import escaped
from edgelm_train.data.text_file import read_text_file

Row = dict[str, str]
"""An example: a text for each column."""
Turns = tuple[str, ...]
"""A chat: what both sides say in turn. The second side is the assistant."""
Rows = tuple[Row, ...] | tuple[Turns, ...]
MetricName = Literal["accuracy", "BLEU", "ROUGE-L", "Spearman", "perplexity"]


@dataclass(frozen=True)
class Source:
    """Where the data of a recipe come from."""

    name: str
    licence: str
    url: str
    files: tuple[str, ...]
    """The files of the folder that are read, by their names there."""


@dataclass(frozen=True)
class Parts:
    """The examples of a folder. The development part is never trained on."""

    train: Rows
    dev: Rows


@dataclass(frozen=True)
class Baseline:
    """What a bundle has to beat."""

    name: str
    answers: Callable[[Sequence[Row], Sequence[Row]], Sequence[str]] | None
    """Gives an answer to each row of the development part, from the rows to train on and those rows; None where the
    base itself, before it is tuned, is what has to be beaten."""


@dataclass(frozen=True)
class Recipe:
    """All that ``edgelm recipe`` needs to make a measured bundle of a folder."""

    name: str
    does: str
    """What the bundle does, in a few words."""
    source: Source
    read: Callable[[Path], Parts]
    """Reads the folder; raises TrainingError that names what is wrong with it."""
    inputs: tuple[str, ...]
    """The columns of a row that an augmentation may change. Answers are never changed."""
    target: str
    """The column of the right answer."""
    task: Mapping[str, object]
    """The content of the task's file (docs/tasks.md), without a score."""
    training: Mapping[str, object]
    """Fields of `edgelm_train.options.FinetuneOptions` that neither the task states nor their defaults."""
    metric: MetricName
    baseline: Baseline

    @property
    def tuning(self) -> dict[str, object]:
        """Fields of `FinetuneOptions`. The prompts that are learned are those that the task will write."""
        of_task = {"template": "prompt", "second_template": "second"}
        written = {option: escaped(str(self.task[name])) for name, option in of_task.items() if name in self.task}
        pooling = {"pooling": self.task["pooling"]} if "pooling" in self.task else {}
        return {**written, **pooling, **self.training}

    @property
    def is_chat(self) -> bool:
        """Whether the rows are chats."""
        return self.task["kind"] == "chat"

    @property
    def less_is_better(self) -> bool:
        """Whether a lower score is better."""
        return self.metric == "perplexity"


def read_lines(folder: Path, name: str, source: Source) -> list[str]:
    """The lines of the file `name` in `folder`, without their line ends.

    Raises:
        TrainingError: the folder has no such file, or it is not UTF-8 text.
    """
    return read_file(folder, name, source).removesuffix("\n").split("\n")


def read_file(folder: Path, name: str, source: Source) -> str:
    """The text of the file `name` in `folder`, with ``\\n`` at the end of each line; raises as `read_lines`."""
    if not folder.is_dir():
        raise TrainingError(
            f"{str(folder)!r} is no folder; give the one with {' and '.join(source.files)} of {source.name} "
            f"({source.url})"
        )
    if not (folder / name).is_file():
        raise TrainingError(
            f"{str(folder)!r} has no file {name!r}; it must have {' and '.join(source.files)} of {source.name} "
            f"({source.url})"
        )
    _, text = read_text_file(folder / name)
    return text.replace("\r\n", "\n")


def one_line(text: str) -> str:
    """`text` with one blank in the place of line ends and of several blanks."""
    return " ".join(text.split())
