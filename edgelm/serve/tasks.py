"""``POST /v1/task``, edgelm's own: what the model is for, done with an input."""

import asyncio
from functools import partial
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints
from starlette.responses import Response

from edgelm.bundle.task import MAX_FIELDS
from edgelm.decoding.generation_config import GenerationOptions
from edgelm.generation.task_format import TaskFormat, TaskLabel, TaskResult, TaskText
from edgelm.serve.call import Call
from edgelm.serve.errors import ApiError
from edgelm.serve.fields import FilledText, ModelField
from edgelm.serve.limits import MAX_PROMPT_CHARACTERS
from edgelm.serve.loading import batch_options
from edgelm.serve.operation import Operation, json_answer
from edgelm.serve.strict import in_words

FieldName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
TaskFields = Annotated[
    FilledText | Annotated[dict[FieldName, FilledText], Field(min_length=1, max_length=MAX_FIELDS)],
    in_words(f"a text, or an object of texts; 1 to {MAX_PROMPT_CHARACTERS:,} characters each"),
]


class TaskRequest(ModelField):
    """An input of the model's task, which its prefix or its bundle states."""

    input: TaskFields = Field(description="The text of the task's only field, or the text of each field by its name.")


class TaskAnswer(BaseModel):
    """What the task made of the input; the fields of other kinds are null."""

    model: str
    kind: Literal["choose", "generate", "chat", "embed"]
    label: str | None = None
    """Of a choice: the likeliest label."""
    probability: float | None = None
    probabilities: dict[str, float] | None = None
    """Of all labels."""
    text: str | None = None
    """Of a task that generates, without the blanks around it."""
    finish_reason: str | None = None
    """edgelm's own: "eos", "stop", "length", "context" or "time"."""
    embedding: list[float] | None = None
    """A vector of length 1, where the input is one text."""
    similarity: float | None = None
    """The cosine of two texts, from -1 to 1."""


async def do_task(call: Call, body: TaskRequest) -> Response:
    """Answer a request for the model's task."""
    task, values = call.model.task_format, body.input
    if task is None:
        raise ApiError(400, "this model has no task: use the other routes", param="model", code="no_task")
    characters = len(values) if isinstance(values, str) else sum(map(len, values.values()))
    if characters > MAX_PROMPT_CHARACTERS:
        raise ApiError(400, f"input has {characters:,} characters, more than {MAX_PROMPT_CHARACTERS:,}", param="input")
    answer = TaskAnswer(model=call.name, kind=task.task.kind)
    if task.writes_text:
        result: TaskResult = await _written(call, task, body)
    else:
        result = await call.compute(partial(call.model.task, values))
    if isinstance(result, TaskLabel):
        answer.label, answer.probability = result.label, result.probability
        answer.probabilities = result.probabilities
    elif isinstance(result, TaskText):
        answer.text, answer.finish_reason = result.text, result.finish_reason
    elif result.similarity is not None:
        answer.similarity = result.similarity
    else:
        answer.embedding = result.vector.tolist()
    return json_answer(answer)


async def _written(call: Call, task: TaskFormat, body: TaskRequest) -> TaskText:
    """The text, decoded beside those of other callers."""
    (prompt,) = await asyncio.to_thread(lambda: task.prompts(task.values(body.input)))
    defaults = task.config(call.model.generation_config)
    options: GenerationOptions = {**task.options, **batch_options(defaults)}
    generation = await call.submit(prompt, options)
    return task.written(await generation.completion())


TASK = Operation(
    "/v1/task", TaskRequest, TaskAnswer, do_task, "Do what the model is for with an input.", prompt_field="input"
)
