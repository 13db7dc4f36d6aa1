"""Clients that people have, with the real packages where they are installed, against a server on loopback."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelm import Model
from edgelm.serve.settings import ServeSettings
from tests.serve.conftest import Running, running_server

KEY = "a-key-for-these-tests"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_server(ServeSettings(port=0, keys=(KEY,))) as server:
        yield server


def greedy(model: Model, prompt: str) -> str:
    return model.generate(prompt, max_new_tokens=8, do_sample=False).text


def test_langchain(server: Running, model: Model) -> None:
    pytest.importorskip("langchain_openai")
    package = importlib.import_module("langchain_openai")
    options = {"base_url": f"{server.url}/v1", "api_key": KEY, "model": "tiny"}
    chain = package.OpenAI(max_tokens=8, temperature=0, **options)
    assert chain.invoke("Hello") == greedy(model, "Hello")
    assert "".join(chain.stream("Hello")) == greedy(model, "Hello")
    assert chain.batch(["Hello", "One two"]) == [greedy(model, "Hello"), greedy(model, "One two")]
    vectors = package.OpenAIEmbeddings(check_embedding_ctx_length=False, **options).embed_documents(["Hello", "One"])
    assert vectors[0] == pytest.approx(model.embed("Hello", normalize=True).tolist(), abs=1e-6)


def test_llm(server: Running, model: Model, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    settings = f"- model_id: mine\n  model_name: tiny\n  api_base: {server.url}/v1\n  completion: true\n"
    settings += "  api_key_name: mine\n"
    (tmp_path / "extra-openai-models.yaml").write_text(settings)
    command = [
        sys.executable,
        "-m",
        "llm",
        "-m",
        "mine",
        "--key",
        KEY,
        "-o",
        "max_tokens",
        "8",
        "-o",
        "temperature",
        "0",
    ]
    done = subprocess.run(
        [*command, "Hello"], capture_output=True, env={**os.environ, "LLM_USER_PATH": str(tmp_path)}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip() == greedy(model, "Hello").strip()


def test_lm_eval(server: Running, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-likelihoods come from echoed prompts, generations from completions, tokens from the server's own routes."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    completions = importlib.import_module("lm_eval.models.openai_completions")
    instance = importlib.import_module("lm_eval.api.instance").Instance
    client = completions.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="tiny", auth_token=KEY, max_length=64, batch_size=2
    )
    pairs = [("Hello there", " my friend"), ("One two", " three"), ("Hello there", " again")]
    requests = [
        instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number) for number, pair in enumerate(pairs)
    ]
    for (logprob, _), (context, continuation) in zip(client.loglikelihood(requests), pairs, strict=True):
        ids = model.tokenizer.encode(context), model.tokenizer.encode(continuation)
        assert logprob == pytest.approx(model.score(*ids).logprob, abs=1e-4)
    until = {"until": ["\n\n\n"], "max_gen_toks": 8, "temperature": 0}
    asked = [instance(request_type="generate_until", doc={}, arguments=("Hello", until), idx=0)]
    assert client.generate_until(asked) == [greedy(model, "Hello")]
