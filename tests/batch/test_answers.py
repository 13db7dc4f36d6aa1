"""Rows become answers: those of the methods of the model, whatever else is computed."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm import Model
from edgelm.batch.pool import ThreadPool, answers
from edgelm.batch.rows import Job, Kind, row_seed
from edgelm.errors import ConfigError
from tests.conftest import TINY_BUNDLE, give_task, make_chat_bundle

STARTED = datetime(2026, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def model() -> Model:
    return edgelm.load(TINY_BUNDLE, device="cpu", threads=1)


def answered(
    model: Model, rows: list[Any], kind: Kind | None = "generate", *, max_rows: int = 4, ordered: bool = True
) -> list[dict[str, Any]]:
    """The answers to rows, each an object or a line."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    pool = ThreadPool(model, Job(kind, 7, STARTED, max_rows))
    try:
        return [json.loads(one.line) for one in answers(pool, iter(enumerate(lines, 1)), ordered=ordered)]
    finally:
        pool.close()


def test_a_row_has_its_own_text_in_any_company(model: Model) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"The cat {number % 5}", "do_sample": True, "max_new_tokens": 1 + number % 7} for number in range(20)
    ]
    together = answered(model, rows)
    for number, (row, answer) in enumerate(zip(rows, together, strict=True), 1):
        (alone,) = model.generate_batch(
            [row["prompt"]], do_sample=True, max_new_tokens=row["max_new_tokens"], seed=row_seed(7, number)
        )
        assert answer == {"line": number, "text": alone.text, "finish_reason": alone.choices[0].finish_reason}
    assert answered(model, rows, max_rows=1) == together
    unordered = answered(model, rows, max_rows=8, ordered=False)
    assert sorted(unordered, key=lambda answer: int(answer["line"])) == together


def test_bad_rows_stand_in_their_places(model: Model) -> None:
    good = {"prompt": "The cat", "max_new_tokens": 2}
    rows: list[Any] = [good, b"", {"id": "x", "prompt": 5}, {"id": 3, "prompt": "a" * 999}, {**good, "num_beams": 2}]
    rows += [{**good, "max_time": 1}, {**good, "top_p": 7}, {"messages": [{"role": "user", "content": "a"}]}, good]
    first, *bad, last = answered(model, rows)
    assert first | {"line": 9} == last
    words = ["is empty", "must have a text", "context", "num_beams", "max_time", "top_p", "chat template"]
    for number, (answer, word) in enumerate(zip(bad, words, strict=True), 2):
        assert answer["line"] == number and word in answer["error"] and answer["error"].startswith(f"line {number}")
    assert (bad[1]["id"], bad[2]["id"]) == ("x", 3)


def test_scores_are_those_of_the_model(model: Model) -> None:
    row: dict[str, Any] = {"prompt": "The cat", "continuation": " sat", "id": 1}
    score, wrong = answered(model, [row, {"prompt": "The cat"}], "score")
    assert score["logprob"] == model.score("The cat", " sat").logprob and score["id"] == 1 and len(score["tokens"]) >= 1
    assert "continuation" in wrong["error"]
    options = [" sat", " ran"]
    (choice,) = answered(model, [{"prompt": "The cat", "options": options, "calibrate": "The"}], "choose")
    selection = model.choose("The cat", options, calibrate="The")
    assert (choice["best"], choice["index"]) == (selection.best.text, selection.index)
    (perplexity,) = answered(model, [{"text": "The cat sat on the mat", "stride": 4}], "perplexity")
    assert perplexity["perplexity"] == model.perplexity("The cat sat on the mat", stride=4).value
    (vector,) = answered(model, [{"text": "The cat", "pooling": "last", "normalize": True}], "embed")
    expected = model.embed("The cat", pooling="last", normalize=True)
    assert vector["embedding"] == pytest.approx(expected.tolist(), rel=1e-8)


def test_tasks(tiny_copy: Path) -> None:
    choices = {"rug": " mat", "home": " house"}
    path = give_task(tiny_copy, {"kind": "choose", "template": "The {id} sat on the", "choices": choices})
    model = edgelm.load(path, device="cpu", threads=1)
    answer, option, extra = answered(model, [{"id": "cat"}, {"id": "cat", "seed": 1}, {"id": "cat", "x": 1}], None)
    result = model.task("cat")
    assert answer["label"] == str(result) and "id" not in answer  # the task's field
    assert "generates no text" in option["error"] and "it may have id, id and" in extra["error"]


def test_a_task_that_writes_takes_options(tiny_copy: Path, tmp_path: Path) -> None:
    task = {"kind": "generate", "template": "{a} and", "generation": {"max_new_tokens": 6, "do_sample": False}}
    (tmp_path / "task.json").write_text(json.dumps(task))
    model = edgelm.load(tiny_copy, device="cpu", threads=1, task=tmp_path / "task.json")
    assert model.task_format is not None
    model.generation_config = model.task_format.config(model.generation_config)
    whole, short = answered(model, [{"a": "The cat"}, {"a": "The cat", "max_new_tokens": 2}], None)
    assert whole["text"] == str(model.task(a="The cat")) and whole["text"].startswith(short["text"])


def test_a_conversation_has_the_date_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2")
    model = edgelm.load(make_chat_bundle(tmp_path), device="cpu", threads=1)
    seen: list[object] = []
    prompt = model.chat_prompt

    def noted(messages: Any, **options: Any) -> list[int]:
        seen.append(options["now"])
        return prompt(messages, **options)

    monkeypatch.setattr(model, "chat_prompt", noted)
    messages = [{"role": "user", "content": "cat"}]
    (answer,) = answered(model, [{"messages": messages, "max_new_tokens": 3}])
    (expected,) = model.generate_batch([prompt(messages)], max_new_tokens=3)  # type: ignore[arg-type]
    assert answer["text"] == expected.text and seen == [STARTED]


def test_too_many_rows_at_a_time_are_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match="max_rows"):
        answered(model, [], max_rows=2000)
