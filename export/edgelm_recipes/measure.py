"""What a bundle scores on the development part, beside its baseline."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgelm.bundle.task import Measured, Task
from edgelm.errors import PromptError, TrainingError
from edgelm.model import Model
from edgelm_recipes.data import DEV, TRAIN, spread
from edgelm_recipes.recipe import Recipe
from edgelm_recipes.speed import Runnable
from edgelm_train.data.records import Records, read_records
from edgelm_train.evaluate import evaluate, score_answers


@dataclass(frozen=True)
class Scores:
    """What something scored, an entry for each metric."""

    measured: tuple[Measured, ...]
    unanswered: tuple[str, ...] = ()
    """Inputs that could not be answered, and why."""

    def value(self, metric: str) -> float:
        """The score of one metric."""
        return next(one.value for one in self.measured if one.metric == metric)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Scores":
        """What `as_json` gave."""
        return cls(tuple(Measured(**one) for one in content["measured"]), tuple(content["unanswered"]))


def dev_records(data: Path, limit: int | None) -> Records:
    """The rows of the development part, `limit` of them at even distances."""
    records = read_records(data / DEV)
    places = spread(range(len(records.rows)), limit)
    return replace(
        records,
        rows=tuple(records.rows[place] for place in places),
        places=tuple(records.places[place] for place in places),
        values=tuple(records.values[place] for place in places),
    )


def measure(
    recipe: Recipe,
    run: Runnable,
    task: Path,
    records: Records,
    data: str,
    threads: int,
    progress: Callable[[float], None],
) -> Scores:
    """The scores of a bundle. In a chat it is the perplexity of the answers, each after all before it.

    Args:
        task: file of the task.
        data: what the scores call the data.
        progress: called with the share that is done.
    """
    with run.open(task, threads) as model:
        if recipe.is_chat:
            return _perplexity(model, records, data, progress)
        done = evaluate(model, records, recipe.target, {}, data, progress)
    return Scores(done.measured, done.unanswered)


def measure_answers(recipe: Recipe, task: Task, data: Path, records: Records, name: str) -> Scores:
    """The scores of the recipe's baseline, which has answers of its own."""
    assert recipe.baseline.answers is not None
    train = read_records(data / TRAIN).rows
    answers = recipe.baseline.answers(train, records.rows)
    right = [row[recipe.target] for row in records.rows]
    return Scores(score_answers(task, answers, right, records.places, name))


def _perplexity(model: Model, records: Records, data: str, progress: Callable[[float], None]) -> Scores:
    nats, tokens, answers, unanswered = 0.0, 0, 0, []
    for place, row in zip(records.places, records.rows, strict=True):
        prompt = model.tokenizer.encode_prompt(row["prompt"])
        answer = model.tokenizer.encode(row["answer"], add_special_tokens=False)
        try:
            score = model.score(prompt, answer)
        except PromptError as error:  # too long for the context
            unanswered.append(f"{place}: {error}")
        else:
            nats, tokens, answers = nats - score.logprob, tokens + len(score.tokens), answers + 1
        progress((answers + len(unanswered)) / len(records.rows))
    if not tokens:
        raise TrainingError(f"no answer of {data} could be measured; the first: {unanswered[0]}")
    measured = Measured("perplexity", math.exp(nats / tokens), f"{data}, {tokens:,} tokens", answers)
    return Scores((measured,), tuple(unanswered))


def name_of(recipe: Recipe, records: Records, total: int) -> str:
    """What a score calls its data, which are `records` out of `total`."""
    count = len(records.rows)
    part = "" if count == total else f", {count:,} of {total:,} rows"
    return f"{recipe.source.name}, development part{part}"
