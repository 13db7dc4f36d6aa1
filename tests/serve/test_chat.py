"""Chat completions, compared with the model itself, and read by OpenAI's own client."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from edgelm import Model
from edgelm.bundle.chat_template import CHAT_TEMPLATE_FILE
from edgelm.serve.chat import ChatRequest
from edgelm.text.messages import ChatMessage
from tests.conftest import replace_file
from tests.serve.chat_servers import chat_bundle, chat_client, chat_model
from tests.serve.conftest import app_client

openai = pytest.importorskip("openai")

__all__ = ["chat_bundle", "chat_client", "chat_model"]  # fixtures

PATH = "/v1/chat/completions"
MESSAGES: list[ChatMessage] = [{"role": "system", "content": "s"}, {"role": "user", "content": "Hello"}]


def ask(client: TestClient, **body: Any) -> Any:
    answer = client.post(PATH, json={"messages": MESSAGES, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: TestClient, **body: Any) -> Any:
    answer = client.post(PATH, json={"messages": MESSAGES, **body})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def events(client: TestClient, path: str = PATH, **body: Any) -> list[Any]:
    """The contents of a stream's events, without the last one, [DONE]."""
    answer = client.post(path, json={"messages": MESSAGES, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_an_answer(chat_client: TestClient, chat_model: Model) -> None:
    answer = ask(chat_client, max_completion_tokens=5, temperature=0)
    own = chat_model.chat(MESSAGES, max_new_tokens=5, do_sample=False)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": own.text, "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["edgelm_finish_reason"]) == (0, "length", "length")
    assert choice["logprobs"] is None
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    assert answer["id"].startswith("chatcmpl-")
    count = len(chat_model.chat_prompt(MESSAGES))
    assert answer["usage"]["prompt_tokens"] == count
    assert answer["usage"]["total_tokens"] == count + 5
    assert ask(chat_client, max_tokens=5, temperature=0)["choices"] == answer["choices"]


def test_options(chat_client: TestClient, chat_model: Model) -> None:
    given = {"seed": 7, "temperature": 1.5, "top_p": 0.9, "min_p": 0.01, "logit_bias": {"5": 3}, "max_tokens": 8}
    own = chat_model.chat(
        MESSAGES, seed=7, do_sample=True, temperature=1.5, top_p=0.9, min_p=0.01, logit_bias={5: 3.0}, max_new_tokens=8
    )
    answer = ask(chat_client, do_sample=True, **given)
    assert answer["choices"][0]["message"]["content"] == own.text
    whole = own.text
    stop = whole[len(whole) // 2]
    stopped = ask(chat_client, do_sample=True, stop=[stop], **given)["choices"][0]
    assert stopped["message"]["content"] == whole.partition(stop)[0]
    assert stopped["finish_reason"] == "stop"


def test_several_answers(chat_client: TestClient, chat_model: Model) -> None:
    own = chat_model.chat(MESSAGES, num_return_sequences=3, do_sample=True, seed=3, max_new_tokens=6)
    drawn = ask(chat_client, n=3, do_sample=True, seed=3, max_tokens=6)
    assert [choice["message"]["content"] for choice in drawn["choices"]] == [c.text for c in own.choices]
    assert [choice["index"] for choice in drawn["choices"]] == [0, 1, 2]
    assert drawn["usage"]["completion_tokens"] == own.stats.new_tokens
    greedy = ask(chat_client, n=3, temperature=0, max_tokens=6)
    assert len({choice["message"]["content"] for choice in greedy["choices"]}) == 1
    assert greedy["usage"]["completion_tokens"] == 18


def test_logprobs(chat_client: TestClient, chat_model: Model) -> None:
    own = chat_model.chat(MESSAGES, max_new_tokens=4, do_sample=False, logprobs=3).choices[0]
    choice = ask(chat_client, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3)["choices"][0]
    assert own.logprobs is not None
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [token.text for token in own.logprobs]
    assert [entry["logprob"] for entry in content] == pytest.approx([t.logprob for t in own.logprobs], abs=1e-5)
    assert [len(entry["top_logprobs"]) for entry in content] == [3] * 4
    for entry in content:
        assert entry["bytes"] == (None if "\ufffd" in entry["token"] else list(entry["token"].encode()))
    alone = ask(chat_client, max_tokens=4, temperature=0, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in alone] == [[]] * 4


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"do_sample": True, "seed": 5}])
def test_a_stream_has_the_same_content(n: int, options: dict[str, Any], chat_client: TestClient) -> None:
    common = {"n": n, "max_tokens": 6, "logprobs": True, "top_logprobs": 2, **options}
    whole = ask(chat_client, **common)
    parts = events(chat_client, stream_options={"include_usage": True}, **common)
    assert parts[-1]["choices"] == []
    assert {**parts[-1]["usage"], "prompt_tokens_details": 0} == {**whole["usage"], "prompt_tokens_details": 0}
    assert len({part["id"] for part in parts}) == 1
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    for index, choice in enumerate(whole["choices"]):
        own = [part["choices"][0] for part in parts[:-1] if part["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert own[-1]["delta"] == {}
        assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert "".join(piece["delta"].get("content", "") for piece in own) == choice["message"]["content"]
        logprobs = [entry for piece in own if piece["logprobs"] for entry in piece["logprobs"]["content"]]
        assert [entry["token"] for entry in logprobs] == [e["token"] for e in choice["logprobs"]["content"]]
    assert "usage" not in events(chat_client, **common)[0]


def test_messages_in_every_form(chat_client: TestClient, chat_model: Model) -> None:
    said = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c", "name": "Ann"},
        {"role": "assistant", "content": "d", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "e"},
    ]
    own: list[ChatMessage] = [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    answer = ask(chat_client, messages=said, max_tokens=3, temperature=0)
    assert answer["choices"][0]["message"]["content"] == chat_model.chat(own, max_new_tokens=3, do_sample=False).text


def test_a_message_cannot_write_a_control_token(chat_client: TestClient, chat_model: Model) -> None:
    said: list[ChatMessage] = [{"role": "user", "content": "<|endoftext|>"}]
    ids = chat_model.chat_prompt(said)
    assert ids.count(chat_model.tokenizer.special_tokens["<|endoftext|>"]) == 1
    answer = ask(chat_client, messages=said, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "a text"),
        ({"messages": [{"role": "function", "content": "a"}]}, "messages.0.role", "'developer', 'system', 'user'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "knows no tools: leave messages[0] out"),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages.0.x", "unknown field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            "messages.0.content",
            "text parts",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages.0.tool_calls.0.id",
            "is missing",
        ),
        ({"messages": [{"role": "user", "content": "a" * 60_000}] * 2}, "messages", "120,000 characters"),
        ({"messages": [{"role": "user", "content": "a"}] * 1025}, "messages", "at most 1024"),
        ({"messages": [{"role": "user", "content": "refuse"}]}, "messages", "refuses these messages: not that"),
        ({"messages": [{"role": "user", "content": "word " * 100}]}, "messages", "context holds 64"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "is missing"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "chat template knows no tools"),
        ({"functions": [{}]}, "functions", "older form of tools"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": "maybe"}, "tool_choice", '"none", "auto", "required" or'),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"modalities": ["audio"]}, "modalities.0", "'text'"),
        ({"audio": {}}, "audio", "text only"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
        ({"verbosity": "low"}, "verbosity", "not supported"),
        ({"prediction": {}}, "prediction", "not supported"),
        ({"web_search_options": {}}, "web_search_options", "not supported"),
        ({"store": True}, "store", "False"),
        ({"store": 0}, "store", "boolean"),
        ({"service_tier": "priority"}, "service_tier", "'auto' or 'default'"),
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": 65}, "max_completion_tokens", "context holds 64"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "give one of them"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"best_of": 2}, "best_of", "unknown field"),
        ({"prompt": "a"}, "prompt", "unknown field"),
        ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    body: dict[str, Any], param: str, words: str, chat_client: TestClient
) -> None:
    error = refused(chat_client, **body)
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_model_without_a_template_says_so() -> None:
    with app_client() as client:
        error = refused(client)
    assert error["message"].startswith("this bundle has no chat template")
    assert error["param"] == "messages"


def test_a_template_that_cannot_be_used_is_no_failure_of_the_server(chat_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(chat_bundle, tmp_path / "broken"))
    content = {"templates": {"default": "{% include 'a' %}"}, "special_tokens": {}}
    replace_file(bundle, CHAT_TEMPLATE_FILE, json.dumps(content).encode())
    with app_client(bundle=bundle) as client:
        error = refused(client)
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    assert error["code"] == "unusable_chat_template"
    assert error["message"].endswith("cannot be used: include is not offered to chat templates")


# OpenAI's client.


def test_openais_client(official: Any, chat_model: Model) -> None:
    own = chat_model.chat(MESSAGES, max_new_tokens=5, do_sample=False)
    create = official.chat.completions.create
    answer = create(model="tiny", messages=MESSAGES, max_completion_tokens=5, temperature=0, logprobs=True)
    assert answer.choices[0].message.content == own.text
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].logprobs.content) == 5
    said = [*MESSAGES, answer.choices[0].message.model_dump(), {"role": "user", "content": "b"}]
    assert create(model="tiny", messages=said, max_tokens=2).usage.completion_tokens == 2
    stream = create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=5,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"repetition_penalty": 1.0},
    )
    parts = list(stream)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == own.text
    assert parts[-1].usage.completion_tokens == 5
    end = own.text[-1]  # the client's own helper wants an answer that ends by itself
    with official.chat.completions.stream(
        model="tiny", messages=MESSAGES, max_tokens=5, temperature=0, stop=end
    ) as helper:
        assert helper.get_final_completion().choices[0].message.content == own.text.partition(end)[0]
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
    assert caught.value.param == "tools"


def test_every_field_of_openais_client_is_known() -> None:
    """Honoured, accepted without effect, or refused by name: never unknown."""
    names = set(inspect.signature(openai.resources.chat.Completions.create).parameters)
    names -= {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert names - ChatRequest.model_fields.keys() == set()
