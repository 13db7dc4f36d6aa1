"""Tools in chats and responses: compared with the model itself, and read by OpenAI's own client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from edgelm import Model, load
from edgelm.bundle.folder import default_bundle_path
from edgelm.serve.settings import ServeSettings
from edgelm.text.messages import ChatMessage
from tests.serve.conftest import app_client, running_server
from tests.text.tool_templates import CLOCK, SHORT, call
from tests.tool_bundles import make_tool_bundle

openai = pytest.importorskip("openai")

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
ASKED: list[ChatMessage] = [{"role": "user", "content": "How warm is it?"}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
TOOLS = [SHORT, CLOCK]
FLAT: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
"""The tools as responses have them."""
ONE: Any = {"tools": TOOLS, "tool_choice": NAMED, "seed": 3, "max_tokens": 200}


@pytest.fixture(scope="module")
def tool_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tool_bundle(default_bundle_path(), tmp_path_factory.mktemp("tools"), "hermes", tags="special")


@pytest.fixture(scope="module")
def tool_client(tool_bundle: Path) -> Iterator[TestClient]:
    with app_client(bundle=tool_bundle) as client:
        yield client


@pytest.fixture(scope="module")
def tool_model(tool_bundle: Path) -> Iterator[Model]:
    with load(tool_bundle, device="cpu", threads=1, batch_invariant=True) as model:  # as the server's scheduler is
        yield model


@pytest.fixture(scope="module")
def official(tool_bundle: Path) -> Iterator[Any]:
    with running_server(ServeSettings(port=0), tool_bundle) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def ask(client: TestClient, path: str = CHAT, **body: Any) -> Any:
    content = {"messages": ASKED} if path == CHAT else {"input": "How warm is it?"}
    answer = client.post(path, json={**content, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: TestClient, path: str = CHAT, **body: Any) -> Any:
    content = {"messages": ASKED} if path == CHAT else {"input": "How warm is it?"}
    answer = client.post(path, json={**content, **body})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def events(client: TestClient, path: str, **body: Any) -> list[Any]:
    content = {"messages": ASKED} if path == CHAT else {"input": "How warm is it?"}
    answer = client.post(path, json={**content, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_a_call_in_a_chat(tool_client: TestClient, tool_model: Model) -> None:
    answer = ask(tool_client, **ONE)
    own = tool_model.chat(ASKED, tools=TOOLS, tool_choice=NAMED, seed=3, max_new_tokens=200)
    (made,) = own.choices[0].tool_calls
    (choice,) = answer["choices"]
    (given,) = choice["message"]["tool_calls"]
    assert given["function"] == {"name": "get_weather", "arguments": made.arguments}
    assert given["type"] == "function" and len(given["id"]) == 9
    assert (choice["finish_reason"], choice["edgelm_finish_reason"]) == ("tool_calls", "tool_calls")
    assert choice["message"]["content"] is None
    assert answer["usage"]["prompt_tokens"] == own.stats.prompt_tokens
    assert answer["usage"]["completion_tokens"] == own.stats.new_tokens


def test_a_stream_of_a_chat(tool_client: TestClient) -> None:
    whole = ask(tool_client, n=2, **ONE)
    parts = events(tool_client, CHAT, n=2, **ONE)
    for index, choice in enumerate(whole["choices"]):
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        deltas = [piece["delta"] for piece in own]
        assert deltas[0] == {"role": "assistant", "content": ""}
        made = [one for delta in deltas for one in delta.get("tool_calls", [])]
        assert [one["index"] for one in made] == [0]
        assert made[0]["function"] == choice["message"]["tool_calls"][0]["function"]
        assert "".join(delta.get("content", "") for delta in deltas) == ""
        assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + ["tool_calls"]


def test_none_and_auto(tool_client: TestClient, tool_model: Model) -> None:
    for choice in ("none", "auto", None):
        answer = ask(tool_client, tools=TOOLS, tool_choice=choice, seed=1, max_tokens=8)
        own = tool_model.chat(ASKED, tools=TOOLS, tool_choice=choice or "auto", seed=1, max_new_tokens=8)
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": own.text, "refusal": None}
    plain = ask(tool_client, temperature=0, max_tokens=8, tools=[], tool_choice="auto", parallel_tool_calls=False)
    own = tool_model.chat(ASKED, do_sample=False, max_new_tokens=8)
    assert plain["choices"][0]["message"]["content"] == own.text


def test_a_cut_call_is_no_call(tool_client: TestClient) -> None:
    choice = ask(tool_client, **{**ONE, "max_tokens": 8})["choices"][0]
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("length", False)
    assert choice["message"]["content"].startswith("<tool_call>")
    parts = events(tool_client, CHAT, **{**ONE, "max_tokens": 8})
    assert all("tool_calls" not in part["choices"][0]["delta"] for part in parts)
    assert parts[-1]["choices"][0]["finish_reason"] == "length"


def test_calls_and_results_in_the_conversation(tool_client: TestClient, tool_model: Model) -> None:
    made: Any = call("get_weather", '{"city": "Rome"}', "abcdefgh1")
    said: list[Any] = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": [{"type": "text", "text": "21 C"}]},
    ]
    own: list[ChatMessage] = [
        *ASKED,
        {"role": "assistant", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": "21 C"},
    ]
    answer = ask(tool_client, messages=said, tools=TOOLS, tool_choice="none", max_tokens=5, temperature=0)
    expected = tool_model.chat(own, tools=TOOLS, tool_choice="none", max_new_tokens=5, do_sample=False)
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["usage"]["prompt_tokens"] == expected.stats.prompt_tokens
    items: list[Any] = [
        {"role": "user", "content": "How warm is it?"},
        {"type": "function_call", "id": "fc_1", "status": "completed", "call_id": "abcdefgh1", **made["function"]},
        {"type": "function_call_output", "call_id": "abcdefgh1", "output": "21 C"},
    ]
    response = ask(
        tool_client, RESPONSES, input=items, tools=FLAT, tool_choice="none", max_output_tokens=5, temperature=0
    )
    assert response["output"][0]["content"][0]["text"] == expected.text
    assert response["usage"]["input_tokens"] == expected.stats.prompt_tokens


def test_a_call_in_a_response(tool_client: TestClient) -> None:
    body: Any = {"tools": FLAT, "tool_choice": {"type": "function", "name": "get_weather"}, "max_output_tokens": 200}
    answer = ask(tool_client, RESPONSES, temperature=0, **body)
    (item,) = answer["output"]
    assert (item["type"], item["status"], item["name"]) == ("function_call", "completed", "get_weather")
    assert json.loads(item["arguments"])["city"] is not None
    assert answer["status"] == "completed"
    assert answer["tools"] == [{"strict": None, "description": None, "parameters": None, **tool} for tool in FLAT]
    assert answer["tool_choice"] == {"type": "function", "name": "get_weather"}
    found = events(tool_client, RESPONSES, temperature=0, **body)
    assert [event["type"] for event in found] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert found[2]["item"]["arguments"] == ""
    assert found[3]["delta"] == found[4]["arguments"] == found[5]["item"]["arguments"] == item["arguments"]
    assert found[-1]["response"]["output"][0]["call_id"] == found[2]["item"]["call_id"]


def test_an_empty_response_is_a_message(tool_client: TestClient, tool_model: Model) -> None:
    end = tool_model.tokenizer.special_tokens["<|im_end|>"]
    assert end  # an answer that ends at once has a message all the same, as without tools
    found = events(tool_client, RESPONSES, tools=FLAT, tool_choice="none", max_output_tokens=3, temperature=0)
    kinds = [event["type"] for event in found]
    assert kinds[2:4] == ["response.output_item.added", "response.content_part.added"]
    assert kinds[-1] in ("response.completed", "response.incomplete")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type", "should be 'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "match pattern"),
        ({"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, "tools.0.function.x", "unknown field"),
        ({"tools": [CLOCK] * 129}, "tools", "at most 128"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "the name 'clock' of another tool"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools", "'f'"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"properties": {"a": {"uniqueItems": True}}}},
                    }
                ]
            },
            None,
            "the parameters of the function 'f' cannot be read: the keyword 'uniqueItems' is not supported",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 65_000}}] * 1},
            "messages",
            "context holds 512",
        ),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", '"none", "auto", "required" or'),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "'g', which is no function of tools",
        ),
        ({"tool_choice": NAMED}, "tool_choice", "which is no function of tools"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tools", "other fields say"),
        (
            {"tools": TOOLS, "constraint": {"choices": ["a"]}, "tool_choice": "required"},
            "tools",
            "other fields say",
        ),
        ({"tools": TOOLS, "stop": "a"}, None, "stop_strings and constraint contradict each other"),
        ({"messages": [{"role": "assistant"}]}, "messages.0.content", "is missing"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [call("f", "{}")]}]},
            "messages",
            "only the assist",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [call("f", "{")]}]}, "messages", "no JSON object"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [call("f", {})]}]},
            "messages.0.tool_calls.0.function.arguments",
            "valid string",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [call("f", json.dumps({"a": "b" * 65_536}))]}]},
            "messages.0.tool_calls.0.function.arguments",
            "at most 65536 characters",
        ),
    ],
)
def test_wrong_tools_are_refused_by_name(
    body: dict[str, Any], param: str | None, words: str, tool_client: TestClient
) -> None:
    error = refused(tool_client, **body)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [CLOCK]}, "tools.0.name", "is missing"),
        ({"tools": FLAT, "tool_choice": NAMED}, "tool_choice", '"none", "auto", "required" or'),
        ({"tools": FLAT * 2}, "tools", "of another tool"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input", "calls of functions"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": 7}]}, "input", "their outputs"),
        ({"tools": FLAT, "text": {"format": {"type": "json_object"}}}, "tools", "other fields say"),
    ],
)
def test_wrong_tools_of_responses_are_refused(
    body: dict[str, Any], param: str, words: str, tool_client: TestClient
) -> None:
    error = refused(tool_client, RESPONSES, **body)
    assert error["param"] == param
    assert words in error["message"]


# OpenAI's client.


def test_a_conversation_of_openais_client(official: Any) -> None:
    create = official.chat.completions.create
    messages: list[Any] = [{"role": "user", "content": "How warm is it?"}]
    common: Any = {"model": "tiny", "tools": TOOLS, "max_tokens": 200}
    asked = create(messages=messages, tool_choice="required", parallel_tool_calls=False, **common)
    assert asked.choices[0].finish_reason == "tool_calls"
    (made,) = asked.choices[0].message.tool_calls
    assert isinstance(json.loads(made.function.arguments), dict)
    messages += [asked.choices[0].message, {"role": "tool", "tool_call_id": made.id, "content": "21 C"}]
    answer = create(messages=messages, tool_choice="none", **{**common, "max_tokens": 5})
    assert answer.choices[0].message.tool_calls is None
    with official.chat.completions.stream(messages=messages[:1], tool_choice=NAMED, temperature=0, **common) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert final.choices[0].message.tool_calls[0].function.name == "get_weather"
    assert final.choices[0].finish_reason == "tool_calls"


def test_a_response_of_openais_client(official: Any) -> None:
    create = official.responses.create
    items: list[Any] = [{"role": "user", "content": "How warm is it?"}]
    common: Any = {"model": "tiny", "tools": FLAT, "max_output_tokens": 200}
    asked = create(input=items, tool_choice="required", parallel_tool_calls=False, **common)
    (made,) = asked.output
    assert made.type == "function_call"
    items += [*asked.output, {"type": "function_call_output", "call_id": made.call_id, "output": "21 C"}]
    answer = create(input=items, tool_choice="none", **{**common, "max_output_tokens": 5})
    assert answer.output_text
    named = {"type": "function", "name": "get_weather"}
    with official.responses.stream(input=items[:1], tool_choice=named, **common) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.done" in kinds
    assert final.output[0].name == "get_weather"
