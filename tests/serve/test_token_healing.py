"""Token healing over HTTP: completions have it, conversations do not."""

import json

from starlette.testclient import TestClient

from edgelm import load
from tests.conftest import TINY_BUNDLE

BODY = {"prompt": "The cat sat on th", "max_tokens": 6, "temperature": 0, "token_healing": True}


def test_completions_and_streams(client: TestClient) -> None:
    expected = load(TINY_BUNDLE, threads=1, device="cpu").generate(
        "The cat sat on th", token_healing=True, do_sample=False, max_new_tokens=6
    )
    answer = client.post("/v1/completions", json={**BODY, "echo": True})
    assert answer.json()["choices"][0]["text"] == f"The cat sat on th{expected.text}"
    lines = client.post("/v1/completions", json={**BODY, "stream": True}).text.split("\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == expected.text


def test_what_is_refused(client: TestClient) -> None:
    for change, words in (
        ({"prompt": [1, 2, 3]}, "token_healing needs the prompt as a text"),
        ({"logprobs": 1}, "token_healing and logprobs do not go together"),
        ({"constraint": {"regex": "a"}}, "token_healing and constraint contradict each other"),
    ):
        answer = client.post("/v1/completions", json={**BODY, **change})
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    messages = [{"role": "user", "content": "Hi"}]
    answer = client.post("/v1/chat/completions", json={"messages": messages, "token_healing": True})
    assert answer.status_code == 400 and "token_healing" in answer.json()["error"]["message"]
