"""``POST /v1/task`` gives what `Model.task` gives."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import edgelm
from edgelm import TaskLabel, TaskText, TaskVector
from tests.conftest import give_task
from tests.serve.conftest import app_client
from tests.serve.test_routes import post, refused

CHOOSE: dict[str, Any] = {
    "kind": "choose",
    "template": "The {who} sat on the",
    "choices": {"rug": " mat", "home": " house"},
}


def test_a_label(tiny_copy: Path) -> None:
    with app_client(bundle=give_task(tiny_copy, CHOOSE)) as client:
        answer = post(client, "/v1/task", input="cat", model="tiny")
        assert answer == post(client, "/v1/task", input={"who": "cat"})
        with edgelm.load(tiny_copy, device="cpu", threads=1) as model:
            own = model.task("cat")
        assert isinstance(own, TaskLabel)
        assert (answer["model"], answer["kind"], answer["label"], answer["text"]) == ("tiny", "choose", own.label, None)
        assert answer["probabilities"] == pytest.approx(own.probabilities, abs=1e-6)
        assert "no field 'what'" in refused(client, "/v1/task", input={"what": "cat"})["message"]
        for wrong in ("", {}, {"who": ""}, {"a b": "x"}, ["cat"], 3, None, {"who": 3}):
            assert refused(client, "/v1/task", input=wrong)["param"] == "input"
        assert refused(client, "/v1/task", input="cat " * 99)["code"] == "context_length_exceeded"
        assert refused(client, "/v1/task", input="<|endoftext|>")["param"] == "input"
        assert "unknown field" in refused(client, "/v1/task", input="cat", options={})["message"]
        assert "/v1/task" in client.get("/openapi.json").json()["paths"]


def test_a_text(tiny_copy: Path) -> None:
    task = {"kind": "generate", "template": "{a} and {b}", "generation": {"max_new_tokens": 6, "num_beams": 2}}
    with app_client(bundle=give_task(tiny_copy, task)) as client:
        answer = post(client, "/v1/task", input={"a": "The cat", "b": "dog"})
    with edgelm.load(tiny_copy, device="cpu", threads=1) as model:
        own = model.task({"a": "The cat", "b": "dog"}, {"num_beams": 1})  # a server follows no beams
    assert isinstance(own, TaskText) and (answer["text"], answer["finish_reason"]) == (own.text, own.finish_reason)


def test_a_similarity(tiny_copy: Path) -> None:
    with app_client(
        bundle=give_task(tiny_copy, {"kind": "embed", "template": "{a}", "second_template": "{b}"})
    ) as client:
        answer = post(client, "/v1/task", input={"a": "The cat", "b": "The dog"})
    with edgelm.load(tiny_copy, device="cpu", threads=1) as model:
        own = model.task(a="The cat", b="The dog")
    assert isinstance(own, TaskVector) and answer["similarity"] == pytest.approx(own.similarity, abs=1e-6)


def test_a_bundle_without_a_task(client: TestClient) -> None:
    assert refused(client, "/v1/task", input="x")["code"] == "no_task"
