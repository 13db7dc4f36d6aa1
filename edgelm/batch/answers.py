"""Rows become answers. Many threads of one process ask, and their texts decode side by side."""

import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from edgelm.batch.facts import Facts, choice_facts, embedding_facts, perplexity_facts, task_facts, text_facts
from edgelm.batch.lines import LINE_ERRORS, complaint, json_line
from edgelm.batch.rows import (
    ChooseFields,
    EmbedFields,
    Job,
    PerplexityFields,
    ScoreFields,
    check_options,
    generate_fields,
    read_object,
    row_seed,
    scoring_fields,
    take_id,
)
from edgelm.errors import ConfigError

if TYPE_CHECKING:
    from edgelm.model import Model


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a row."""

    number: int
    """Of its line, from 1."""
    line: str
    """A JSON object on one line."""
    new_tokens: int = 0


class RowAnswerer:
    """Computes rows with one model. Any thread may call it; texts decode side by side, scores one after another."""

    def __init__(self, model: "Model", job: Job) -> None:
        """`model` stays the caller's. Raises ConfigError if `job` asks for too many rows at a time."""
        self._model, self._job = model, job
        self._task = model.task_format if job.kind is None else None
        self._scheduler = model.scheduler(max_rows=job.max_rows, max_waiting=2 * job.max_rows)
        self._scores = threading.Lock()

    def answer(self, number: int, line: bytes) -> Answer:
        """The answer to line `number`, an object with "error" if the line is bad.

        Raises EdgelmError if the row could not be computed for another reason than what its line says.
        """
        row_id: str | int | None = None
        new_tokens = 0
        try:
            row = read_object(line)
            if self._task is None or "id" not in self._task.fields:
                row_id = take_id(row)
            facts, new_tokens = self._computed(number, row)
            facts = {"line": number, **_named(row_id), **facts}
        except (*LINE_ERRORS, ConfigError) as error:  # the run's own options are right
            facts = {"line": number, **_named(row_id), "error": complaint(f"line {number}", error)}
        return Answer(number, json_line(facts), new_tokens)

    def close(self) -> None:
        """End the texts that are being computed. Their callers get a part of the text, or an error."""
        self._scheduler.close()

    def _computed(self, number: int, row: dict[str, object]) -> tuple[Facts, int]:
        """What came of a row, and how many tokens were written."""
        kind = self._job.kind
        if kind == "generate" or (kind is None and self._task is not None and self._task.writes_text):
            return self._written(number, row)
        with self._scores:  # each needs a whole context of memory, and uses all threads
            return self._scored(row), 0

    def _written(self, number: int, row: dict[str, object]) -> tuple[Facts, int]:
        model, job, task = self._model, self._job, self._task
        fields = generate_fields(row, None if task is None else task.fields)
        if task is not None:
            (prompt,) = task.prompts(task.values(fields.task_input), now=job.started)
        elif fields.messages is not None:
            prompt = model.chat_prompt(fields.messages, now=job.started)
        else:
            assert fields.prompt is not None  # one of them is there
            prompt = fields.prompt
        options = fields.options
        if options.get("seed") is None:
            options["seed"] = row_seed(job.seed, number)
        check_options(model.generation_config.updated(dict(options)))
        completion = self._scheduler.submit(prompt, **options).completion()
        facts = text_facts(completion.choices[0]) if task is None else task_facts(task.written(completion), whole=True)
        return facts, completion.stats.new_tokens

    def _scored(self, row: dict[str, object]) -> Facts:
        model, kind = self._model, self._job.kind
        if kind == "score":
            score = scoring_fields(ScoreFields, row)
            return asdict(model.score(score.prompt, score.continuation))
        if kind == "choose":
            given = scoring_fields(ChooseFields, row)
            normalization = given.length_normalization or "none"
            return choice_facts(
                model.choose(given.prompt, given.options, length_normalization=normalization, calibrate=given.calibrate)
            )
        if kind == "perplexity":
            text = scoring_fields(PerplexityFields, row)
            return perplexity_facts(model.perplexity(text.text, stride=text.stride))
        if kind == "embed":
            wanted = scoring_fields(EmbedFields, row)
            return embedding_facts(
                model.embed(wanted.text, pooling=wanted.pooling or "mean", normalize=bool(wanted.normalize))
            )
        assert self._task is not None  # a kind is given, or the model has a task
        fields = generate_fields(row, self._task.fields)
        return task_facts(model.task(fields.task_input, fields.options or None), whole=True)


def _named(row_id: str | int | None) -> Facts:
    return {} if row_id is None else {"id": row_id}
