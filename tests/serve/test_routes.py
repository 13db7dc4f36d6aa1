"""The routes beside completions, on the tiny bundle, compared with the model itself."""

import base64
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from edgelm import Model
from edgelm.engine.limits import Room
from tests.serve.conftest import app_client


def post(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def refused(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_embeddings(client: TestClient, model: Model) -> None:
    answer = post(client, "/v1/embeddings", input=["Hello", "there"], model="tiny")
    own = model.embed("Hello", normalize=True)
    first, second = answer["data"]
    assert first["embedding"] == pytest.approx(own.tolist(), abs=1e-6)
    assert (first["index"], second["index"]) == (0, 1)
    tokens = sum(len(model.tokenizer.encode(text)) for text in ("Hello", "there"))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    encoded = post(client, "/v1/embeddings", input="Hello", encoding_format="base64")["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(encoded), "<f4").tolist() == pytest.approx(own.tolist(), abs=1e-6)
    raw = post(client, "/v1/embeddings", input=model.tokenizer.encode("Hello"), normalize=False, pooling="last")
    last = model.embed("Hello", pooling="last")
    assert raw["data"][0]["embedding"] == pytest.approx(last.tolist(), abs=1e-6)


def test_embeddings_refuse(client: TestClient) -> None:
    assert refused(client, "/v1/embeddings", input="a", dimensions=8)["param"] == "dimensions"
    assert refused(client, "/v1/embeddings", input="")["param"] == "input"
    assert refused(client, "/v1/embeddings", input=["a"] * 2049)["param"] == "input"
    assert refused(client, "/v1/embeddings", input="a", encoding_format="hex")["param"] == "encoding_format"
    assert refused(client, "/v1/embeddings", input="word " * 100)["code"] == "context_length_exceeded"


def test_score_and_choose(client: TestClient, model: Model) -> None:
    own = model.score("Hello there", " my friend")
    answer = post(client, "/v1/score", prompt="Hello there", continuation=" my friend")
    assert answer["logprob"] == pytest.approx(own.logprob, abs=1e-6)
    assert [token["text"] for token in answer["tokens"]] == [token.text for token in own.tokens]
    selection = model.choose("Hello", [" a", " b", " c"], length_normalization="token", calibrate="x")
    body = {"prompt": "Hello", "options": [" a", " b", " c"], "length_normalization": "token", "calibrate": "x"}
    chosen = post(client, "/v1/choose", **body)
    assert chosen["index"] == selection.index
    assert chosen["best"] == chosen["options"][selection.index]
    assert [option["probability"] for option in chosen["options"]] == pytest.approx(
        [option.probability for option in selection.options], abs=1e-6
    )


def test_score_and_choose_refuse(client: TestClient) -> None:
    assert refused(client, "/v1/score", prompt="a", continuation="")["param"] == "continuation"
    error = refused(client, "/v1/score", prompt="word " * 100, continuation="b")
    assert error["code"] == "context_length_exceeded"
    assert refused(client, "/v1/choose", prompt="a", options=["x"])["param"] == "options"
    assert "given twice" in refused(client, "/v1/choose", prompt="a", options=["x", "x"])["message"]
    error = refused(client, "/v1/choose", prompt="a", options=["x", "y"], length_normalization="words")
    assert error["param"] == "length_normalization"


def test_tokens(client: TestClient, model: Model) -> None:
    ids = model.tokenizer.encode("Hello there")
    answer = post(client, "/tokenize", prompt="Hello there", return_token_strs=True)
    assert answer["tokens"] == ids
    assert answer["count"] == len(ids)
    assert answer["max_model_len"] == 64
    assert "".join(answer["token_strs"]) == "Hello there"
    assert post(client, "/detokenize", tokens=ids) == {"prompt": "Hello there"}
    assert refused(client, "/detokenize", tokens=[10**6])["param"] == "tokens"


def test_special_tokens(client: TestClient, model: Model) -> None:
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == model.tokenizer.decode(model.generation_config.eos_token_id[:1])
    assert set(info) == {"eos_token", "bos_token", "pad_token", "chat_template"}


def test_models() -> None:
    with app_client(names=["first", "second/one"]) as client:
        listed = client.get("/v1/models").json()
        assert [card["id"] for card in listed["data"]] == ["first", "second/one"]
        assert listed["data"][0]["context_length"] == 64
        assert client.get("/v1/models/second/one").json() == listed["data"][1]
        missing = client.get("/v1/models/../../etc/passwd")
        assert missing.status_code == 404
        assert missing.json()["error"]["type"] == "invalid_request_error"
        assert post(client, "/tokenize", prompt="a", model="second/one")["tokens"]


def test_metrics(client: TestClient) -> None:
    def value(line: str) -> float:
        rows = [row for row in client.get("/metrics").text.splitlines() if row.startswith(line)]
        return float(rows[0].rpartition(" ")[2]) if rows else 0.0

    texts = 'edgelm_texts_total{model="tiny",reason="length"}'
    tokens = 'edgelm_generated_tokens_total{model="tiny"}'
    requests = 'edgelm_requests_total{route="/v1/completions",status="200"}'
    drafted = [f'edgelm_{what}_tokens_total{{model="tiny"}}' for what in ("drafted", "accepted_draft")]
    before = value(texts), value(tokens), value(requests)
    post(client, "/v1/completions", prompt="Hello", max_tokens=5, temperature=0)
    assert (value(texts), value(tokens), value(requests)) == (before[0] + 1, before[1] + 5, before[2] + 1)
    assert list(map(value, drafted)) == [0, 0], "the bundle has no small model"
    assert value('edgelm_first_token_seconds_count{model="tiny"}') >= 1
    assert value('edgelm_token_seconds_count{model="tiny"}') >= 4
    assert value('edgelm_model_loaded{model="tiny"}') == 1
    assert value('edgelm_model_memory_bytes{model="tiny"}') > 10**6
    client.get("/a/path/that/nobody/has")
    assert value('edgelm_requests_total{route="other",status="404"}') >= 1
    assert "nobody" not in client.get("/metrics").text


def test_unknown_routes_and_methods(client: TestClient) -> None:
    assert client.get("/v1/nothing").status_code == 404
    wrong = client.get("/v1/completions")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["message"] == "this route has other methods"
    assert client.put("/v1/completions", json={}).status_code == 405


def test_explain(client: TestClient, model: Model) -> None:
    text = "Hello there, my friend"
    own = model.explain(text, top=3)
    answer = post(client, "/v1/explain", text=text, top=3)
    assert answer["model"] == "tiny"
    assert [token["token_id"] for token in answer["tokens"]] == [token.token_id for token in own.tokens]
    assert answer["tokens"][0]["logprob"] is None and answer["tokens"][0]["top"] == []
    assert [token["logprob"] for token in answer["tokens"][1:]] == [token.logprob for token in own.tokens[1:]]
    assert [one["text"] for one in answer["following"]] == [one.text for one in own.following]
    assert (answer["layers"], answer["heads"], answer["prefix_tokens"]) == (2, 4, 0)
    count = len(own.tokens)
    shares = np.frombuffer(base64.b64decode(answer["attentions"]), np.uint8).reshape(2, 4, count * (count + 1) // 2)
    rows = np.tril_indices(count)
    assert np.abs(shares / 255 - own.attentions[:, :, rows[0], rows[1]]).max() <= 0.5 / 255 + 1e-6
    ids = model.tokenizer.encode(text)
    assert post(client, "/v1/explain", text=ids, top=3, model="tiny") == answer
    assert len(post(client, "/v1/explain", text=text)["following"]) == 5


def test_explain_refuses(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(client, "/v1/explain", text="")["param"] == "text"
    assert refused(client, "/v1/explain")["param"] == "text"
    assert refused(client, "/v1/explain", text="a", top=21)["param"] == "top"
    assert refused(client, "/v1/explain", text="a", prompt="b")["param"] == "prompt"
    error = refused(client, "/v1/explain", text="word " * 100)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "text")
    monkeypatch.setattr("edgelm.serve.explanations.MAX_ATTENTION_BYTES", 1000)
    error = refused(client, "/v1/explain", text="word " * 4)
    assert "more than 0 MB: explain a shorter text" in error["message"] and error["param"] == "text"


def test_explain_says_where_there_is_no_room(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelm.engine.memory.rooms", lambda: [Room(0, "a limit")])
    answer = client.post("/v1/explain", json={"text": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")
