"""The official client of OpenAI's API, against a server on loopback."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("openai")

import openai

from edgelm import Model
from edgelm.bundle.folder import default_bundle_path
from edgelm.serve.settings import ServeSettings
from tests.documents.pages import page
from tests.serve.conftest import running_server

KEY = "a-key-for-these-tests"


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with running_server(ServeSettings(port=0, keys=(KEY,))) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "edgelm"


def test_completions(client: openai.OpenAI, model: Model) -> None:
    answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=6, temperature=0, logprobs=2)
    own = model.generate("Hello", max_new_tokens=6, do_sample=False)
    assert answer.choices[0].text == own.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens is not None
    assert len(answer.choices[0].logprobs.tokens) == 6
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    extra = client.completions.create(model="tiny", prompt="Hello", max_tokens=4, extra_body={"min_p": 0.1})
    assert extra.choices[0].text


def test_streamed_completions(client: openai.OpenAI, model: Model) -> None:
    stream = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=6, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    text = "".join(part.choices[0].text for part in parts if part.choices)
    assert text == model.generate("Hello", max_new_tokens=6, do_sample=False).text
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == 6


def test_embeddings(client: openai.OpenAI, model: Model) -> None:
    """The client asks for base64 by itself."""
    answer = client.embeddings.create(model="tiny", input=["Hello", "there"])
    assert answer.data[0].embedding == pytest.approx(model.embed("Hello", normalize=True).tolist(), abs=1e-6)


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-3.5-turbo-instruct", prompt="Hello")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="Hello", suffix="x")
    assert refused.value.param == "suffix"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong-key-0123456789").models.list()


def test_the_program_of_the_page() -> None:
    (program,) = (block.body for block in page("docs/serve.md").blocks if "from openai import" in block.body)
    with running_server(ServeSettings(port=0), default_bundle_path(), "stories-6m-int8") as server:
        code = program.replace("http://127.0.0.1:8000", server.url)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
