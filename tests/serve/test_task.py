"""``POST /v1/task`` gives what `Model.task` gives, for each model of the server."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import edgelm
from edgelm import Bundle, ConfigError, TaskLabel, TaskText, TaskVector
from edgelm.serve.app import create_app
from edgelm.serve.settings import ServeSettings
from edgelm.serve.shelf import Shelf, place_of, read_place_behind_prefix, with_task
from tests.conftest import TINY_BUNDLE, give_task
from tests.serve.conftest import app_client, loaded, wait_until
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


def test_each_prefix_has_its_own_job(tmp_path: Path) -> None:
    """Two prefixes with different tasks and one without, beside a first model with the task of a file."""
    tasks = {
        "mood": CHOOSE,
        "next": {"kind": "generate", "template": "{x}", "generation": {"max_new_tokens": 3, "do_sample": False}},
        "base": {"kind": "embed", "template": "{text}", "description": "A vector."},
    }
    for name, task in tasks.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(task), encoding="utf-8")
    settings = ServeSettings()
    with edgelm.load(TINY_BUNDLE, device="cpu", threads=1) as model:
        model.save_prefix(tmp_path / "mood.prefix", "The end. ", task=tmp_path / "mood.json")
        model.save_prefix(tmp_path / "next.prefix", "The dog ran. ", task=tmp_path / "next.json")
        model.save_prefix(tmp_path / "plain.prefix", "The cat. ")
        label = model.with_prefix(tmp_path / "mood.prefix").task("cat")
        text = model.with_prefix(tmp_path / "next.prefix").task("The cat")
    assert isinstance(label, TaskLabel) and isinstance(text, TaskText)
    places = [with_task(place_of(Bundle.read(TINY_BUNDLE)), str(tmp_path / "base.json"))]
    places += [
        read_place_behind_prefix(f"{name}={tmp_path / name}.prefix", places) for name in ("mood", "next", "plain")
    ]
    shelf = Shelf(places, settings, lambda place, base: loaded(place, base, settings))
    with TestClient(create_app(settings, shelf), base_url="http://localhost") as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert {name: card["task"]["kind"] for name, card in cards.items()} == {
            "tiny-gpt2": "embed", "mood": "choose", "next": "generate", "plain": "embed",
        }  # fmt: skip
        assert cards["mood"]["task"] == {
            "kind": "choose", "description": None, "fields": ["who"], "labels": ["rug", "home"],
        }  # fmt: skip
        answer = post(client, "/v1/task", input="cat", model="mood")
        assert answer["label"] == label.label
        assert answer["probabilities"] == pytest.approx(label.probabilities, abs=1e-6)
        assert post(client, "/v1/task", input="The cat", model="next")["text"] == text.text
        assert post(client, "/v1/task", input="The cat")["embedding"]
        plain = post(client, "/v1/task", input="The cat", model="plain")
        assert plain["kind"] == "embed" and plain["embedding"]


def test_the_former_flag_is_explained() -> None:
    with pytest.raises(ConfigError, match="a prefix is given as --prefix NAME=FILE"):
        with_task(place_of(Bundle.read(TINY_BUNDLE)), "mood=mood.prefix")


def test_a_bundle_without_a_task(client: TestClient) -> None:
    assert refused(client, "/v1/task", input="x")["code"] == "no_task"
