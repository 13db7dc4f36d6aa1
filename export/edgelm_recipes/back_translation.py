"""Back-translation: texts that have no input get one from a bundle that does the recipe's work the other way round.

Sennrich et al. 2016, arXiv 1511.06709: the answers that a model learns to write stay texts of people, and only its
inputs are a machine's.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.bundle.folder import Bundle
from edgelm.bundle.task import GenerateTask, fields_of, read_task
from edgelm.errors import PromptError, TrainingError
from edgelm.loading import load
from edgelm_recipes.recipe import Recipe, Row, one_line
from edgelm_train.data.corpus import counted
from edgelm_train.data.text_file import read_text_file
from edgelm_train.run.folder import saving


@dataclass(frozen=True)
class BackTranslation:
    """A bundle that turns answers into inputs, and a file with an answer on each line."""

    bundle: Path
    texts: Path

    def check(self, recipe: Recipe) -> None:
        """Raise TrainingError where the recipe, the bundle or the file cannot be used; BundleError where the bundle
        cannot be read."""
        if recipe.task["kind"] != "generate" or len(recipe.inputs) != 1:
            raise TrainingError(
                f"the recipe {recipe.name} does not write a text for one text, so nothing can be translated back; "
                "leave out --back-translate"
            )
        task = read_task(Bundle.read(self.bundle))
        if not isinstance(task, GenerateTask) or len(fields_of(task)) != 1:
            raise TrainingError(
                f"the bundle {self.bundle} has no task that writes a text for one text; give one that turns the "
                f"answers of {recipe.name} into its inputs"
            )
        self.read()

    def read(self) -> list[str]:
        """The texts, each once, in the order of the file. Raises TrainingError where it cannot be read."""
        _, text = read_text_file(self.texts)
        return list(dict.fromkeys(line for line in map(one_line, text.split("\n")) if line))


def back_translated(
    recipe: Recipe,
    asked: BackTranslation,
    known: Sequence[Row],
    file: Path,
    threads: int,
    progress: Callable[[float], None],
) -> tuple[list[Row], tuple[str, ...]]:
    """Rows of the texts that no row of `known` answers with, and notes on the texts that are left out.

    Args:
        known: the rows of all parts. A text of the development part would be trained on otherwise.
        file: rows are written here one by one; those that an earlier call left there are not made again.
        threads: CPU threads of the bundle.
        progress: called with the share of the texts that is done.

    Raises:
        BundleError: the bundle cannot be read.
        TrainingError: the texts cannot be read, none of them gets an input, or `file` cannot be written.
    """
    answers = {row[recipe.target] for row in known}
    texts = asked.read()
    fresh = [text for text in texts if text not in answers]
    done = _kept_rows(file, recipe.target, fresh)
    (column,) = recipe.inputs
    with load(asked.bundle, device="cpu", threads=threads) as model, saving(file.parent), file.open("ab") as lines:
        for number, text in enumerate(fresh):
            if number >= len(done):
                try:
                    made = one_line(str(model.task(text)))
                except PromptError:  # too long for the context
                    made = ""
                done.append({column: made, recipe.target: text})
                lines.write(json.dumps(done[-1], ensure_ascii=False).encode() + b"\n")
            progress((number + 1) / len(fresh))
    rows = [row for row in done if row[column]]
    if not rows:
        raise TrainingError(
            f"{asked.texts} has no line that is new and that {asked.bundle} translates; give other texts, or leave out "
            "--back-translate"
        )
    notes = [f"translated {counted(len(rows), 'text')} of {asked.texts} back with {asked.bundle}"]
    if len(texts) > len(fresh):
        notes.append(f"left out {counted(len(texts) - len(fresh), 'text')} of it that have an example")
    if len(fresh) > len(rows):
        notes.append(f"left out {counted(len(fresh) - len(rows), 'text')} of it that the bundle has no answer to")
    return rows, tuple(notes)


def _kept_rows(file: Path, target: str, texts: Sequence[str]) -> list[Row]:
    """The rows of `file` that answer with the first of `texts`, in this order. What follows them is cut off."""
    if not file.is_file():
        return []
    content = file.read_bytes()
    kept: list[Row] = []
    size = 0
    for line, text in zip(content.splitlines(keepends=True), texts, strict=False):
        if not line.endswith(b"\n") or (row := json.loads(line))[target] != text:
            break
        kept.append(row)
        size += len(line)
    if size < len(content):
        file.write_bytes(content[:size])
    return kept
