"""``/v1/completions`` on the tiny bundle, compared with the model itself."""

import json
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from edgelm import Model
from edgelm.serve.fields import SAME_OPTIONS
from edgelm.serve.limits import MAX_CHOICES, MAX_PROMPTS, MAX_STOPS

GREEDY = {"temperature": 0, "max_tokens": 8}


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def refused(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


def events(client: TestClient, **body: Any) -> list[Any]:
    """The content of all events of a stream, which ends with [DONE]."""
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_is_what_the_model_generates(client: TestClient, model: Model) -> None:
    answer = complete(client, prompt="Hello there", **GREEDY)
    own = model.generate("Hello there", do_sample=False, max_new_tokens=8)
    assert answer["choices"][0]["text"] == own.text
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["model"] == "tiny"
    assert answer["object"] == "text_completion"
    count = own.stats.prompt_tokens
    assert answer["usage"]["prompt_tokens"] == count
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["usage"]["total_tokens"] == count + 8


def test_seeds_repeat_texts(client: TestClient, model: Model) -> None:
    body = {"prompt": "Hello", "max_tokens": 12, "temperature": 1.2, "top_p": 0.9, "seed": 7}
    text = complete(client, **body)["choices"][0]["text"]
    assert text == complete(client, **body)["choices"][0]["text"]
    own = model.generate("Hello", max_new_tokens=12, do_sample=True, temperature=1.2, top_p=0.9, seed=7)
    assert text == own.text
    assert complete(client, **{**body, "seed": -1}) != text  # OpenAI's seeds are signed


def test_prompts_of_every_form(client: TestClient, model: Model) -> None:
    ids = model.tokenizer.encode("Hello there")
    alone = complete(client, prompt="Hello there", **GREEDY)["choices"][0]["text"]
    assert complete(client, prompt=ids, **GREEDY)["choices"][0]["text"] == alone
    choices = complete(client, prompt=["One", "Hello there"], **GREEDY)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert choices[1]["text"] == alone
    assert [choice["text"] for choice in complete(client, prompt=[ids, ids], **GREEDY)["choices"]] == [alone, alone]


def test_several_choices_of_several_prompts_are_numbered_in_order(client: TestClient) -> None:
    body = {"prompt": ["One", "Two"], "n": 3, "max_tokens": 4, "seed": 1, "temperature": 1.5}
    choices = complete(client, **body)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3, 4, 5]
    alone = complete(client, **{**body, "prompt": "Two"})["choices"]
    assert [choice["text"] for choice in choices[3:]] == [choice["text"] for choice in alone]
    assert len({choice["text"] for choice in alone}) > 1


def test_greedy_choices_are_the_same_text(client: TestClient) -> None:
    answer = complete(client, prompt="Hello", n=2, **GREEDY)
    first, second = answer["choices"]
    assert first["text"] == second["text"]
    assert second["index"] == 1
    assert answer["usage"]["completion_tokens"] == 16


def test_best_of_returns_the_likeliest_per_token(client: TestClient) -> None:
    body = {"prompt": "Hello", "max_tokens": 6, "seed": 3, "temperature": 1.5}
    every = complete(client, **body, n=4, logprobs=0)["choices"]
    means = {c["text"]: sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"]) for c in every}
    best = complete(client, **body, best_of=4)
    assert [choice["text"] for choice in best["choices"]] == [max(means, key=lambda text: means[text])]
    assert best["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == 24
    two = complete(client, **body, best_of=4, n=2)["choices"]
    assert [choice["text"] for choice in two] == sorted(means, key=lambda text: -means[text])[:2]


def test_stops(client: TestClient) -> None:
    text = complete(client, prompt="Hello", **GREEDY)["choices"][0]["text"]
    stop = text[2:4]
    choice = complete(client, prompt="Hello", stop=[stop], **GREEDY)["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == choice["edgelm_finish_reason"] == "stop"
    assert complete(client, prompt="Hello", stop=stop, **GREEDY)["choices"][0] == choice
    assert refused(client, prompt="Hello", stop=["x"] * (MAX_STOPS + 1))["param"] == "stop"
    assert refused(client, prompt="Hello", stop="x" * 257)["param"] == "stop"
    assert refused(client, prompt="Hello", stop="")["param"] == "stop"


def test_end_of_text_and_a_full_context(client: TestClient, model: Model) -> None:
    first = model.generate("Hello", do_sample=False, max_new_tokens=1).choices[0].token_ids[0]
    choice = complete(client, prompt="Hello", eos_token_id=[first], **GREEDY)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["edgelm_finish_reason"]) == ("", "stop", "eos")
    choice = complete(client, prompt="Hello", temperature=0, max_tokens=64)["choices"][0]
    assert (choice["finish_reason"], choice["edgelm_finish_reason"]) == ("length", "context")


def test_biases_and_penalties(client: TestClient, model: Model) -> None:
    loop = model.generate("Hello", do_sample=False, max_new_tokens=8).choices[0].token_ids
    text = complete(client, prompt="Hello", logit_bias={str(loop[0]): -100}, **GREEDY)["choices"][0]["text"]
    assert text == model.generate("Hello", do_sample=False, max_new_tokens=8, logit_bias={loop[0]: -100}).text
    options = {"presence_penalty": 1.5, "frequency_penalty": -0.5}
    text = complete(client, prompt="Hello", **options, **GREEDY)["choices"][0]["text"]
    assert text == model.generate("Hello", do_sample=False, max_new_tokens=8, **options).text  # type: ignore[arg-type]


def test_edgelms_own_options(client: TestClient, model: Model) -> None:
    given: dict[str, Any] = {"min_p": 0.05, "dry_multiplier": 1.0, "repetition_penalty": 1.1, "top_k": 50}
    text = complete(client, prompt="Hello", max_tokens=12, seed=5, **given)["choices"][0]["text"]
    assert text == model.generate("Hello", max_new_tokens=12, seed=5, **given).text
    assert {"min_p", "dry_multiplier", "xtc_probability", "mirostat_tau", "bad_words_ids"} <= set(SAME_OPTIONS)


def test_logprobs_are_those_of_the_model(client: TestClient, model: Model) -> None:
    answer = complete(client, prompt="Hello", logprobs=3, **GREEDY)["choices"][0]
    own = model.generate("Hello", do_sample=False, max_new_tokens=8, logprobs=3).choices[0].logprobs
    assert own is not None
    logprobs = answer["logprobs"]
    assert logprobs["tokens"] == [token.text for token in own]
    assert logprobs["token_logprobs"] == pytest.approx([token.logprob for token in own], abs=1e-5)
    assert all(1 <= len(top) <= 4 for top in logprobs["top_logprobs"])
    for top, token, logprob in zip(
        logprobs["top_logprobs"], logprobs["tokens"], logprobs["token_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values())  # greedy


def test_offsets_say_where_tokens_begin(client: TestClient, model: Model) -> None:
    text = "Hello there, my friend"
    choice = complete(client, prompt=text, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert "".join(tokens) == text == choice["text"]
    assert [text[begin:].startswith(token) for begin, token in zip(offsets, tokens, strict=True)] == [True] * len(
        tokens
    )
    behind = complete(client, prompt=text, echo=True, logprobs=0, max_tokens=1)["choices"][0]
    assert behind["logprobs"]["text_offset"] == [*offsets, len(text)]


def test_an_echo_is_scored_like_score(client: TestClient, model: Model) -> None:
    """lm-eval's loglikelihoods: the sum over a continuation's tokens is what `Model.score` returns."""
    prompt, continuation = model.tokenizer.encode("Hello there"), model.tokenizer.encode(" my friend")
    body: dict[str, Any] = {"prompt": [prompt + continuation], "echo": True, "logprobs": 1, "temperature": 0}
    for max_tokens in (0, 1):
        choice = complete(client, **body, max_tokens=max_tokens)["choices"][0]
        logprobs = choice["logprobs"]
        end = len(prompt) + len(continuation)
        assert len(logprobs["tokens"]) == end + max_tokens
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        scored = logprobs["token_logprobs"][len(prompt) : end]
        assert sum(scored) == pytest.approx(model.score(prompt, continuation).logprob, abs=1e-9)
        for top, logprob in zip(logprobs["top_logprobs"][1:], logprobs["token_logprobs"][1:], strict=True):
            assert max(top.values()) >= logprob
        assert choice["text"].startswith("Hello there my friend")
        assert choice["finish_reason"] == "length"


def test_an_echo_has_one_more_token_where_the_text_ends_too(client: TestClient, model: Model) -> None:
    """lm-eval takes the last token for the generated one: without it, it would leave out the last one of the prompt."""
    random = np.random.default_rng(0)
    for _ in range(30):  # tokens that are parts of characters, and special ones, are among them
        ids = random.integers(0, 300, int(random.integers(2, 20))).tolist()
        likeliest = model.generate(ids, max_new_tokens=1, do_sample=False, eos_token_id=()).choices[0].token_ids[0]
        body = {"prompt": ids, "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": 1}
        for ends in ([], [likeliest]):
            choice = complete(client, **body, eos_token_id=ends)["choices"][0]
            assert choice["edgelm_finish_reason"] == ("eos" if ends else "length")
            logprobs = choice["logprobs"]
            assert {len(values) for values in logprobs.values()} == {len(ids) + 1}
            expected = model.token_logprobs([*ids, likeliest])[-1].logprob
            assert logprobs["token_logprobs"][-1] == pytest.approx(expected, abs=1e-4)
            assert list(logprobs["top_logprobs"][-1].values()) == [logprobs["token_logprobs"][-1]]
    (part,) = events(client, **body, eos_token_id=[likeliest])[1:]
    assert part["choices"][0]["logprobs"]["tokens"] == logprobs["tokens"][-1:]


def test_an_echo_keeps_the_text_of_its_prompt(client: TestClient) -> None:
    text = complete(client, prompt="Grüße 🙂", echo=True, logprobs=0, **GREEDY)["choices"][0]
    assert text["text"].startswith("Grüße 🙂")
    offsets = text["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(text["text"])
    plain = complete(client, prompt="Grüße 🙂", echo=True, **GREEDY)["choices"][0]
    assert plain["text"] == text["text"]
    assert plain["logprobs"] is None


def test_a_stream_joins_to_the_whole_answer(client: TestClient) -> None:
    for extra in ({}, {"n": 2}, {"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 1, "n": 2}):
        body = {"prompt": ["Hello", "One two"], "seed": 2, "max_tokens": 6, "temperature": 1.2, **extra}
        whole = complete(client, **body)
        parts = events(client, **body)
        assert all("usage" not in part and part["object"] == "text_completion" for part in parts)
        assert {part["id"] for part in parts} == {parts[0]["id"]}
        for choice in whole["choices"]:
            own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
            assert "".join(part["text"] for part in own) == choice["text"]
            assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
            if "logprobs" in extra:
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    assert [item for part in own for item in part["logprobs"][name]] == choice["logprobs"][name]


def test_a_stream_counts_tokens_when_asked(client: TestClient) -> None:
    *parts, last = events(client, prompt="Hello", **GREEDY, stream_options={"include_usage": True})
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8


def test_a_prompt_that_was_computed_before_is_counted(client: TestClient) -> None:
    prompt = "the same words again and again and again"
    first = complete(client, prompt=prompt, **GREEDY)["usage"]
    again = complete(client, prompt=prompt, **GREEDY)["usage"]
    assert 0 < again["prompt_tokens_details"]["cached_tokens"] < first["prompt_tokens"]


@pytest.mark.parametrize(
    "body, param, words",
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": "a", "nonsense": 1}, "nonsense", "unknown field 'nonsense'"),
        ({"prompt": "a", "num_beams": 4}, "num_beams", "unknown field 'num_beams'"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "suffix is not supported"),
        ({"prompt": "a", "n": MAX_CHOICES + 1}, "n", "n: should be less than or equal to 8, got 9"),
        ({"prompt": "a", "n": 10**9}, "n", "n: "),
        ({"prompt": "a", "n": 2, "best_of": 1}, "best_of", "best_of is 1, but n is 2"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of", "best_of cannot be streamed"),
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt", "prompt: must be a text"),
        ({"prompt": ["a"] * MAX_PROMPTS, "n": 2}, "prompt", "more than 64"),
        ({"prompt": "a", "max_tokens": 65}, "max_tokens", "max_tokens is 65, but this model's context holds 64"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "max_tokens: "),
        ({"prompt": "a", "temperature": 2.1}, "temperature", "temperature: "),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "temperature: should be a valid number, got 'hot'"),
        ({"prompt": "a", "temperature": True}, "temperature", "temperature: "),
        ({"prompt": "a", "top_p": 1.5}, "top_p", "top_p: "),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "logprobs: "),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x.[key]", "logit_bias"),
        ({"prompt": "a", "logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "logit_bias: "),
        ({"prompt": "a", "logit_bias": {"99999": 1}}, None, "logit_bias"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"prompt": "", "echo": True, "logprobs": 1}, "prompt", "the text is empty"),
        ({"prompt": []}, "prompt", "prompt: must be a text"),
        ({"prompt": [[]]}, "prompt", "prompt: must be a text"),
        ({"prompt": [1, "a"]}, "prompt", "prompt: must be a text"),
        ({"prompt": [10**6]}, "prompt", "token id 1000000 is out of range"),
        ({"prompt": {"a": 1}}, "prompt", "prompt: must be a text"),
        ({"prompt": "a" * 65_537}, "prompt", "prompt: must be a text"),
        ({"prompt": "a", "user": 5}, "user", "user: should be a valid string, got 5"),
        ({"prompt": "a", "dry_base": 2.0}, None, "dry_base does nothing without dry_multiplier"),
        ({"prompt": "a", "context_overflow": "window"}, "context_overflow", "context_overflow: "),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, body: dict[str, Any], param: str | None, words: str) -> None:
    error = refused(client, **body)
    assert error["param"] == param
    assert words in error["message"]
    assert len(error["message"]) < 500


def test_a_prompt_longer_than_the_context(client: TestClient) -> None:
    error = refused(client, prompt="word " * 100)
    assert error["code"] == "context_length_exceeded"
    choice = complete(client, prompt="word " * 100, context_overflow="truncate", **GREEDY)["choices"][0]
    assert choice["text"]


def test_an_unknown_model(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"model": "../../etc/passwd", "prompt": "a"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert complete(client, model="tiny", prompt="Hello", **GREEDY)["model"] == "tiny"


def test_harmless_fields_of_openai(client: TestClient) -> None:
    assert complete(client, prompt="Hello", user="me", suffix=None, **GREEDY)["choices"]
