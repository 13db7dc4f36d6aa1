"""Answers that obey: OpenAI's response formats, and edgelm's own field."""

import json
import threading
from typing import Any

import pytest
from starlette.testclient import TestClient

from edgelm import Choices, JsonSchema, Model, Regex
from edgelm.serve.settings import ServeSettings
from edgelm.text import token_matcher
from edgelm.text.messages import ChatMessage
from tests.serve.chat_servers import chat_bundle, chat_client, chat_model
from tests.serve.conftest import app_client

__all__ = ["chat_bundle", "chat_client", "chat_model"]  # fixtures

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
CHAT_FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
RESPONSE_FORMAT = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}
MESSAGES: list[ChatMessage] = [{"role": "user", "content": "H"}]


def post(client: TestClient, path: str, status: int = 200, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def obeys(text: str) -> bool:
    content = json.loads(text)
    return set(content) == {"n", "ok"} and content["n"] in range(100) and isinstance(content["ok"], bool)


def test_a_chat_obeys_a_schema(chat_client: TestClient, chat_model: Model) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "response_format": CHAT_FORMAT, "seed": 3, "temperature": 1}
    answer = post(chat_client, "/v1/chat/completions", n=3, max_tokens=40, **body)
    assert all(obeys(choice["message"]["content"]) for choice in answer["choices"])
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    own = chat_model.generate_batch(
        [chat_model.chat_prompt(MESSAGES)],
        constraint=JsonSchema(SCHEMA),
        seed=3,
        do_sample=True,
        temperature=1.0,
        max_new_tokens=40,
    )[0]
    assert answer["choices"][0]["message"]["content"] == own.text


def test_a_stream_of_a_chat_obeys(chat_client: TestClient) -> None:
    body = {"messages": MESSAGES, "response_format": CHAT_FORMAT, "stream": True, "max_tokens": 40}
    lines = chat_client.post("/v1/chat/completions", json=body).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert obeys("".join(event["choices"][0]["delta"].get("content", "") for event in events))
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_cut_answer_says_length(chat_client: TestClient) -> None:
    (choice,) = post(chat_client, "/v1/chat/completions", messages=MESSAGES, response_format=CHAT_FORMAT, max_tokens=8)[
        "choices"
    ]
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith('{"n":')


def test_a_response_obeys_and_repeats_its_format(chat_client: TestClient) -> None:
    body: dict[str, Any] = {"input": "H", "text": {"format": RESPONSE_FORMAT}, "max_output_tokens": 40}
    answer = post(chat_client, "/v1/responses", **body)
    assert answer["status"] == "completed"
    assert obeys(answer["output"][0]["content"][0]["text"])
    told = answer["text"]["format"]
    assert {name: value for name, value in told.items() if value is not None} == RESPONSE_FORMAT
    assert post(chat_client, "/v1/responses", input="H", max_output_tokens=2)["text"] == {"format": {"type": "text"}}


def test_openais_client_parses_answers(chat_client: TestClient) -> None:
    openai = pytest.importorskip("openai")
    pydantic = pytest.importorskip("pydantic")

    answer_type = pydantic.create_model("Answer", ok=(bool, ...))
    client = openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=chat_client)
    done = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=answer_type, max_tokens=40)
    assert isinstance(done.choices[0].message.parsed.ok, bool)
    response = client.responses.parse(model="tiny", input="H", text_format=answer_type, max_output_tokens=40)
    assert isinstance(response.output_parsed.ok, bool)


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ({"choices": [" yes", " no"]}, Choices([" yes", " no"])),
        ({"regex": "[0-9]{3}"}, Regex("[0-9]{3}")),
        ({"json_schema": SCHEMA}, JsonSchema(SCHEMA)),
    ],
)
def test_completions_take_a_field_of_ours(client: TestClient, model: Model, given: Any, own: Any) -> None:
    body: dict[str, Any] = {"prompt": ["Hello", "The"], "max_tokens": 30, "temperature": 0}
    answer = post(client, "/v1/completions", constraint=given, **body)
    batch = model.generate_batch(["Hello", "The"], constraint=own, max_new_tokens=30, do_sample=False)
    assert [choice["text"] for choice in answer["choices"]] == [done.text for done in batch]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}


@pytest.mark.parametrize(
    ("constraint", "param", "words"),
    [
        ({}, "constraint", "one of choices, regex, json_schema and grammar"),
        ({"regex": "a", "choices": ["a"]}, "constraint", "one of choices"),
        ({"regex": "(?=a)"}, None, "look-around"),
        ({"regex": "(" * 16_385}, "constraint.regex", "at most 16384 characters"),
        ({"regex": "(" * 9_000}, None, "unclosed group"),
        ({"choices": []}, "constraint.choices", "at least 1 item"),
        ({"choices": [""]}, "constraint", "none of them empty"),
        ({"choices": ["a long text that needs some tokens"]}, None, "needs at least"),
        ({"grammar": "start: " + "(" * 60_000}, None, "the grammar cannot be read"),
        ({"grammar": 'start: "a" b'}, None, "line 1, column 8"),
        ({"json_schema": {"multipleOf": 9999991}}, "constraint", "multipleOf at #"),
        ({"json_schema": {"uniqueItems": True}}, None, "'uniqueItems' is not supported (at #)"),
        ({"xml": "a"}, "constraint.xml", "unknown field"),
    ],
)
def test_what_cannot_be_read_is_refused(client: TestClient, constraint: Any, param: str | None, words: str) -> None:
    error = post(client, "/v1/completions", 400, prompt="Hello", max_tokens=3, constraint=constraint)["error"]
    assert words in error["message"]
    assert error["param"] == param


def test_contradictions(chat_client: TestClient) -> None:
    body = {"messages": MESSAGES, "response_format": {"type": "json_object"}}
    error = post(chat_client, "/v1/chat/completions", 400, constraint={"regex": "a"}, **body)["error"]
    assert "contradict" in error["message"]
    error = post(chat_client, "/v1/chat/completions", 400, stop=["a"], **body)["error"]
    assert "stop_strings and constraint contradict" in error["message"]
    bad = {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}
    error = post(chat_client, "/v1/chat/completions", 400, messages=MESSAGES, response_format=bad)["error"]
    assert error["param"] == "response_format"


def test_a_constraint_that_takes_long_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    release, begun = threading.Event(), threading.Event()

    def slow(constraint: object, words: object) -> str:
        begun.set()
        release.wait(30)
        return 'start: "a"'

    with app_client(ServeSettings()) as client:
        monkeypatch.setattr(token_matcher, "_source", slow)
        answers: list[Any] = []
        thread = threading.Thread(
            target=lambda: answers.append(post(client, "/v1/completions", prompt="H", constraint={"regex": "a"}))
        )
        thread.start()
        assert begun.wait(30)
        for _ in range(3):
            assert post(client, "/v1/completions", prompt="Hello", max_tokens=2)["choices"]
        release.set()
        thread.join()
        assert answers[0]["choices"][0]["text"] == "a"
