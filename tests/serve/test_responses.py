"""Responses, compared with the model itself, and read by OpenAI's own client."""

import inspect
import json
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from edgelm import Model
from edgelm.errors import ClosedError
from edgelm.generation.results import Chunk
from edgelm.serve.generating import Generation
from edgelm.serve.responses import ResponseRequest
from edgelm.text.messages import ChatMessage
from tests.conftest import replace_file
from tests.serve.chat_servers import chat_bundle, chat_client, chat_model
from tests.serve.conftest import app_client

openai = pytest.importorskip("openai")

__all__ = ["chat_bundle", "chat_client", "chat_model"]  # fixtures

PATH = "/v1/responses"
HELLO: list[ChatMessage] = [{"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0, "max_output_tokens": 5}


def ask(client: TestClient, **body: Any) -> Any:
    answer = client.post(PATH, json={"input": "Hello", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: TestClient, **body: Any) -> list[Any]:
    """The events of a stream, whose names are their types."""
    answer = client.post(PATH, json={"input": "Hello", "stream": True, **body})
    assert answer.status_code == 200, answer.text
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert name == f"event: {content['type']}"
        found.append(content)
    return found


def test_an_answer(chat_client: TestClient, chat_model: Model) -> None:
    answer = ask(chat_client, metadata={"a": "b"}, **GREEDY)
    own = chat_model.chat(HELLO, max_new_tokens=5, do_sample=False)
    (message,) = answer["output"]
    assert message["content"] == [{"type": "output_text", "text": own.text, "annotations": [], "logprobs": []}]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "incomplete")
    assert (answer["object"], answer["status"]) == ("response", "incomplete")
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["metadata"] == {"a": "b"}
    assert (answer["store"], answer["temperature"], answer["max_output_tokens"]) == (False, 0, 5)
    usage = answer["usage"]
    assert usage["input_tokens"] == len(chat_model.chat_prompt(HELLO))
    assert (usage["output_tokens"], usage["output_tokens_details"]) == (5, {"reasoning_tokens": 0})
    assert usage["total_tokens"] == usage["input_tokens"] + 5


def test_instructions_and_messages(chat_client: TestClient, chat_model: Model) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}],
        },
        {"role": "user", "content": "d"},
    ]
    own: list[ChatMessage] = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    answer = ask(chat_client, input=items, instructions="be", **GREEDY)
    assert answer["output"][0]["content"][0]["text"] == chat_model.chat(own, max_new_tokens=5, do_sample=False).text
    assert answer["instructions"] == "be"


def test_a_stream_has_the_events_of_openais(chat_client: TestClient) -> None:
    common = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, **GREEDY}
    whole = ask(chat_client, **common)
    found = events(chat_client, **common)
    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert [event["type"] for event in found if event not in deltas] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    part = whole["output"][0]["content"][0]
    assert "".join(event["delta"] for event in deltas) == found[-4]["text"] == part["text"]
    assert [one["token"] for event in deltas for one in event["logprobs"]] == [one["token"] for one in part["logprobs"]]
    assert len(part["logprobs"][0]["top_logprobs"]) == 2
    assert found[0]["response"]["status"] == "in_progress"
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == part["text"]
    assert found[-1]["response"]["usage"]["output_tokens"] == 5
    assert {event["item_id"] for event in deltas} == {found[-1]["response"]["output"][0]["id"]}


def test_an_answer_that_ends_is_completed(chat_bundle: Path, chat_model: Model, tmp_path: Path) -> None:
    """The fourth greedy token as the end of a text."""
    ids = chat_model.chat(HELLO, max_new_tokens=5, do_sample=False).choices[0].token_ids
    bundle = Path(shutil.copytree(chat_bundle, tmp_path / "ends"))
    replace_file(bundle, "generation_config.json", json.dumps({"eos_token_id": ids[3]}).encode())
    kept = ids[: ids.index(ids[3])]
    with app_client(bundle=bundle) as client:
        answer, found = ask(client, **GREEDY), events(client, **GREEDY)
    assert (answer["status"], answer["incomplete_details"]) == ("completed", None)
    assert answer["completed_at"] >= answer["created_at"]
    assert answer["output"][0]["content"][0]["text"] == chat_model.tokenizer.decode(kept)
    assert found[-1]["type"] == "response.completed"
    assert found[-1]["response"]["output"][0]["status"] == "completed"


def test_a_failure_in_the_middle_ends_the_stream(chat_client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def chunks(self: Generation) -> AsyncGenerator[Chunk, None]:
        yield Chunk("a", (1,), 0)
        raise ClosedError("the model is closed")

    monkeypatch.setattr(Generation, "chunks", chunks)
    found = events(chat_client)
    assert [event["type"] for event in found][-2:] == ["response.output_text.delta", "response.failed"]
    assert found[-1]["response"]["status"] == "failed"
    assert found[-1]["response"]["error"]["code"] == "server_error"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": []}, "input", "messages"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input", "user, assistant, system, developer"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input", "messages"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]}, "input", "text"),
        ({"input": 7}, "input", "a text"),
        ({"input": "word " * 100}, "input", "context holds 64"),
        ({"input": "refuse"}, "input", "not that"),
        ({"input": "a" * 60_000, "instructions": "b" * 60_000}, "input", "120,000 characters"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.name", "is missing"),
        ({"tools": [{"type": "web_search", "name": "a"}]}, "tools.0.type", "should be 'function'"),
        ({"tools": [{"type": "function", "name": "a"}]}, "tools", "chat template knows no tools"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores nothing"),
        ({"conversation": "conv_1"}, "conversation", "stores nothing"),
        ({"prompt": {"id": "p"}}, "prompt", "stores nothing"),
        ({"store": True}, "store", "False"),
        ({"store": 0}, "store", "boolean"),
        ({"background": 0.0}, "background", "boolean"),
        ({"background": True}, "background", "False"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "not supported"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "json_schema"),
        ({"truncation": "auto"}, "truncation", "'disabled'"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0", "message.output_text.logprobs"),
        ({"top_logprobs": 2}, "top_logprobs", "needs include"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": 65}, "max_output_tokens", "context holds 64"),
        ({"stream_options": {}}, "stream_options", "needs stream"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"seed": 7}, "seed", "unknown field"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    body: dict[str, Any], param: str, words: str, chat_client: TestClient
) -> None:
    answer = chat_client.post(PATH, json={"input": "Hello", **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


# OpenAI's client.


def test_openais_client(official: Any, chat_model: Model) -> None:
    own = chat_model.chat(HELLO, max_new_tokens=5, do_sample=False)
    answer = official.responses.create(model="tiny", input="Hello", **GREEDY)
    assert answer.output_text == own.text
    assert answer.usage.output_tokens == 5
    again = [{"role": "user", "content": "a"}, *answer.output, {"role": "user", "content": "b"}]
    assert official.responses.create(model="tiny", input=again, max_output_tokens=2).usage.output_tokens == 2
    parts = list(official.responses.create(model="tiny", input="Hello", stream=True, **GREEDY))
    assert "".join(part.delta for part in parts if part.type == "response.output_text.delta") == own.text
    assert parts[-1].response.output_text == own.text
    with official.responses.stream(model="tiny", input="Hello", **GREEDY) as helper:
        for _ in helper:
            pass
    with pytest.raises(openai.BadRequestError) as caught:
        official.responses.create(model="tiny", input="Hello", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"


def test_every_field_of_openais_client_is_known() -> None:
    """Honoured, accepted without effect, or refused by name: never unknown."""
    names = set(inspect.signature(openai.resources.responses.Responses.create).parameters)
    names -= {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert names - ResponseRequest.model_fields.keys() == set()
