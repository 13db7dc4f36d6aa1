"""Scores of a bundle's task on labelled data, by the packages that the field measures with."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from edgelm.bundle.task import ChatTask, ChooseTask, EmbedTask, GenerateTask, Measured, Task
from edgelm.errors import ConfigError, PromptError, TrainingError, install_hint
from edgelm.generation.task_format import TaskLabel, TaskResult, TaskText
from edgelm.model import Model
from edgelm_train.data.records import Records

_PACKAGES = {"text": ("sacrebleu", "rouge_score"), "similarity": ("scipy",)}

Answer = str | float | None
"""A label, a text or a similarity, as the task's kind is; None where an input could not be answered."""


@dataclass(frozen=True)
class Evaluation:
    """What a task scored, one entry for each metric, and the inputs that it could not answer."""

    measured: tuple[Measured, ...]
    unanswered: tuple[str, ...]
    """Where each of these inputs stands, and why. They count as wrong, or as empty texts."""


def check_packages(task: Task) -> None:
    """Raise TrainingError if a package that measures `task` is missing, ConfigError if nothing can be compared."""
    if isinstance(task, EmbedTask) and task.second_template is None:
        raise ConfigError("the task makes vectors, and there is nothing to compare: give it a second_template")
    kind = "text" if _writes_text(task) else "similarity" if isinstance(task, EmbedTask) else ""
    if missing := [name for name in _PACKAGES.get(kind, ()) if find_spec(name) is None]:
        raise TrainingError(f"evaluate needs {', '.join(missing)}; {install_hint('cpu,evaluate')}")


def evaluate(
    model: Model,
    records: Records,
    target: str,
    columns: Mapping[str, str],
    data: str,
    progress: Callable[[float], None] = lambda share: None,
) -> Evaluation:
    """Do the model's task with every row of `records`, and compare the results with the column `target`.

    Labels give the accuracy; texts corpus BLEU (sacrebleu's defaults) and the mean ROUGE-L (F1, with stemming, from 0
    to 100); similarities Spearman's rank correlation with the numbers in `target`.

    Args:
        model: has a task.
        records: the examples.
        target: the column of the right label, text or number.
        columns: the column of each of the task's fields; a field that is not in it has a column of its own name.
        data: what the result calls the data.
        progress: called with the share of the rows that is done.

    Raises:
        ConfigError: a column is missing, a label is none of the task's, or a number is none.
        TrainingError: a package that measures is missing.
    """
    task_format = model.task_format
    if task_format is None:
        raise ConfigError("the bundle has no task, nor a prefix with one: give one with --task")
    check_packages(task_format.task)
    sources = {field: columns.get(field, field) for field in task_format.fields}
    for column in (*sources.values(), target):
        if column not in records.columns:
            raise ConfigError(f"the data has no column {column!r}, but {', '.join(map(repr, records.columns))}")
    right = [row[target] for row in records.rows]
    measure = _measure_of(task_format.task, right, records.places)
    answers: list[Answer] = []
    unanswered: list[str] = []
    for place, row in zip(records.places, records.rows, strict=True):
        try:
            answers.append(_answer(model.task({field: row[column] for field, column in sources.items()})))
        except PromptError as error:  # empty, or too long for the context
            answers.append(None)
            unanswered.append(f"{place}: {error}")
        progress(len(answers) / len(right))
    return Evaluation(_measured(measure(answers), data, len(right)), tuple(unanswered))


def score_answers(
    task: Task, answers: Sequence[Answer], right: Sequence[str], places: Sequence[str], data: str
) -> tuple[Measured, ...]:
    """The scores of answers that are at hand, such as those of a baseline, with the metrics of `evaluate`.

    `places` says where each of the right answers stands, for messages. Raises as `evaluate`.
    """
    check_packages(task)
    return _measured(_measure_of(task, right, places)(answers), data, len(right))


def _measured(scores: Mapping[str, float], data: str, count: int) -> tuple[Measured, ...]:
    return tuple(Measured(name, value, data, count) for name, value in scores.items())


def _answer(result: TaskResult) -> Answer:
    if isinstance(result, TaskLabel):
        return result.label
    return result.text if isinstance(result, TaskText) else result.similarity


def _writes_text(task: Task) -> bool:
    return isinstance(task, GenerateTask | ChatTask)


def _measure_of(
    task: Task, right: Sequence[str], places: Sequence[str]
) -> Callable[[Sequence[Answer]], dict[str, float]]:
    """How answers become scores. Raises ConfigError before anything is computed if `right` has a wrong value."""
    if isinstance(task, ChooseTask):
        labels = task.choices
        for place, label in zip(places, right, strict=True):
            if label not in labels:
                raise ConfigError(f"{place} has the label {label!r:.60}, which is none of {', '.join(labels)}"[:300])
        return lambda answers: {"accuracy": _accuracy(answers, right)}
    if _writes_text(task):
        return lambda answers: _text_scores(answers, right)
    numbers: list[float] = []
    for place, text in zip(places, right, strict=True):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"{place} has {text!r:.60} where a number belongs")
        numbers.append(number)
    return lambda answers: {"Spearman": _spearman(answers, numbers)}


def _accuracy(answers: Sequence[Answer], right: Sequence[str]) -> float:
    return sum(label == one for label, one in zip(answers, right, strict=True)) / len(right)


def _text_scores(answers: Sequence[Answer], right: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    texts = [answer if isinstance(answer, str) else "" for answer in answers]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [scorer.score(one, text)["rougeL"].fmeasure for text, one in zip(texts, right, strict=True)]
    return {"BLEU": float(corpus_bleu(texts, [list(right)]).score), "ROUGE-L": 100 * sum(rouge) / len(rouge)}


def _spearman(answers: Sequence[Answer], right: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    if None in answers:
        raise ConfigError("an input cannot be answered, and a rank needs all of them: leave it out of the data")
    if len(set(answers)) < 2 or len(set(right)) < 2:
        raise ConfigError("all numbers of the data, or all similarities, are equal: there is no rank to compare")
    return float(spearmanr(answers, right).statistic)
