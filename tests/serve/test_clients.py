"""Clients that people have, each the real package in an environment of its own, against ``edgelm serve`` on loopback.

`EDGELM_TEST_NETWORK=1 pytest -n 0 tests/serve/test_clients.py` runs them, for some minutes. What docs/serve.md tells
users to copy runs as it stands.
"""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgelm import Model, load
from edgelm.bundle.folder import default_bundle_path
from tests.documents.pages import page
from tests.environments import INSTALLS, Environment
from tests.serve.chat_servers import chat_bundle, chat_model
from tests.serve.conftest import ServerProcess, server_process

__all__ = ["chat_bundle", "chat_model"]
pytestmark = INSTALLS

STORY = "Once upon a time"
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
END = 0
"""The end token of the embedded model."""
ON_THE_PAGE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server(chat_bundle: Path) -> Iterator[ServerProcess]:
    """A server of the embedded model and of one that chats."""
    with server_process("-m", f"chat={chat_bundle}", model=default_bundle_path()) as running:
        yield running


@pytest.fixture(scope="module")
def story() -> Iterator[Model]:
    """The embedded model."""
    with load(threads=1) as model:
        yield model


def with_packages(folder: Path, *packages: str) -> Environment:
    """A new environment with `packages`."""
    environment = Environment(folder / "venv")
    environment.install(*packages)
    return environment


def on_the_page(words: str, server: ServerProcess) -> str:
    """The only block of docs/serve.md with `words`, for `server`."""
    (body,) = (block.body for block in page("docs/serve.md").blocks if words in block.body)
    return body.replace(ON_THE_PAGE, server.url)


def answer_of(model: Model, *said: str) -> str:
    """The answer to a conversation, in which the user speaks first."""
    roles = ("user", "assistant") * len(said)
    return model.chat([{"role": role, "content": text} for role, text in zip(roles, said, strict=False)], **GREEDY).text


@pytest.fixture(scope="module")
def langchain(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return with_packages(tmp_path_factory.mktemp("langchain"), "langchain-openai")


def found_by(langchain: Environment, server: ServerProcess, code: str) -> dict[str, Any]:
    """What a program, which has `base`, puts into `found`."""
    start = "import asyncio, json, sys\nfrom langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings\n"
    start += "base = {'base_url': sys.argv[1], 'api_key': 'none', 'max_retries': 0}\nfound = {}\n"
    program = f"{start}{code}\nprint(json.dumps(found))"
    result: dict[str, Any] = json.loads(langchain.output("python", "-c", program, f"{server.url}/v1"))
    return result


def test_langchain_completions(langchain: Environment, server: ServerProcess, story: Model) -> None:
    code = """
model = OpenAI(**base, model="stories-6m-int8", temperature=0, max_tokens=12)
found["whole"] = model.invoke("Once upon a time")
found["streamed"] = list(model.stream("Once upon a time"))
found["batch"] = model.batch(["Once upon a time", "The cat"] * 15)
async def both():
    return [piece async for piece in model.astream("The cat")], await model.abatch(["The cat", "Once upon a time"])
found["astream"], found["abatch"] = asyncio.run(both())
result = OpenAI(**base, model="stories-6m-int8", n=2, best_of=3, seed=5, logprobs=2, max_tokens=3,
                logit_bias={"5": -100}, frequency_penalty=0.5, extra_body={"min_p": 0.1}).generate(["Once upon a time"])
found["drawn"] = [[choice.text, choice.generation_info["logprobs"]["tokens"]] for choice in result.generations[0]]
found["usage"] = result.llm_output["token_usage"]
found["defaults"] = OpenAI(**base, model="stories-6m-int8").invoke("Once upon a time")
"""
    found = found_by(langchain, server, code)
    texts = {prompt: story.generate(prompt, **GREEDY).text for prompt in (STORY, "The cat")}
    assert found["whole"] == texts[STORY] == "".join(found["streamed"])
    assert len(found["streamed"]) >= 12
    assert found["batch"] == [texts[STORY], texts["The cat"]] * 15
    assert ("".join(found["astream"]), found["abatch"]) == (texts["The cat"], [texts["The cat"], texts[STORY]])
    assert [text for text, _ in found["drawn"]] == ["".join(tokens) for _, tokens in found["drawn"]]
    assert found["usage"]["completion_tokens"] == 9
    assert found["defaults"]


def test_langchain_chats(langchain: Environment, server: ServerProcess, chat_model: Model) -> None:
    code = """
for name, responses in (("chats", False), ("responses", True)):
    chat = ChatOpenAI(**base, model="chat", temperature=0, max_tokens=12, use_responses_api=responses)
    answer = chat.invoke("hello")
    found[name] = [answer.text, "".join(piece.text for piece in chat.stream("hello")),
                   chat.batch(["hello", "you"])[1].text, answer.usage_metadata["output_tokens"]]
    found[name].append(chat.invoke([("human", "hi"), ("ai", "yes"), ("human", "go")]).text)
    def tool(number: int) -> int:
        "A tool."
    for refused in (chat.bind_tools([tool]), ChatOpenAI(**base, model="stories-6m-int8", use_responses_api=responses)):
        try:
            refused.invoke("hello")
        except Exception as error:
            found[name].append(str(error))
async def both():
    return ["".join([piece.text async for piece in ChatOpenAI(
        **base, model="chat", temperature=0, max_tokens=12, use_responses_api=responses).astream("hello")])
        for responses in (False, True)]
found["astream"] = asyncio.run(both())
streamed = ChatOpenAI(**base, model="chat", temperature=0, max_tokens=12, stream_usage=True).stream("hello")
found["streamed tokens"] = sum(piece.usage_metadata["output_tokens"] for piece in streamed if piece.usage_metadata)
"""
    found = found_by(langchain, server, code)
    hello, you = answer_of(chat_model, "hello"), answer_of(chat_model, "you")
    later = answer_of(chat_model, "hi", "yes", "go")
    for name in ("chats", "responses"):
        whole, streamed, batched, tokens, long, tools, without_template = found[name]
        assert (whole, streamed, batched, tokens, long) == (hello, hello, you, 12, later)
        assert "chat template knows no tools" in tools
        assert "no chat template" in without_template
    assert found["astream"] == [hello, hello]
    assert found["streamed tokens"] == 12


def test_langchain_embeddings(langchain: Environment, server: ServerProcess, story: Model) -> None:
    code = """
vectors = OpenAIEmbeddings(**base, model="stories-6m-int8", check_embedding_ctx_length=False)
found["one"] = vectors.embed_query("a cat")
found["many"] = vectors.embed_documents(["a cat", "a dog"] * 20)
"""
    found = found_by(langchain, server, code)
    cat, dog = (story.embed(text, normalize=True).tolist() for text in ("a cat", "a dog"))
    assert found["one"] == pytest.approx(cat, abs=1e-6)
    assert len(found["many"]) == 40
    assert found["many"][38] == pytest.approx(cat, abs=1e-6)
    assert found["many"][39] == pytest.approx(dog, abs=1e-6)


def test_the_langchain_program_of_the_page(langchain: Environment, server: ServerProcess) -> None:
    printed = langchain.output("python", "-c", on_the_page("from langchain_openai", server))
    assert printed.splitlines()[-1] == "256"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return with_packages(tmp_path_factory.mktemp("llm"), "llm")


@pytest.fixture
def settings(server: ServerProcess, tmp_path: Path) -> dict[str, str]:
    """The variable that names a folder with the page's settings, and a model that chats."""
    models = on_the_page("model_id: stories", server)
    models += f"- model_id: talk\n  model_name: chat\n  api_base: {server.url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models, encoding="utf-8")
    return {"LLM_USER_PATH": str(tmp_path)}


@pytest.mark.parametrize("how", [[], ["--no-stream"]], ids=["streamed", "whole"])
def test_llm_completions_and_chats(
    llm: Environment, settings: dict[str, str], story: Model, chat_model: Model, how: Sequence[str]
) -> None:
    options = ["-o", "temperature", "0", "-o", "max_tokens", "12", *how]
    completed = llm.output("llm", "-m", "stories", STORY, *options, variables=settings)
    assert completed == story.generate(STORY, **GREEDY).text + "\n"
    llm.output("llm", "-m", "talk", "hello", *options, variables=settings)
    (logged,) = json.loads(llm.output("llm", "logs", "-n", "1", "--json", variables=settings))
    assert logged["response"] == answer_of(chat_model, "hello")
    assert logged["output_tokens"] == 12
    llm.output("llm", "-c", "go on", *options, variables=settings)
    (continued,) = json.loads(llm.output("llm", "logs", "-n", "1", "--json", variables=settings))
    assert continued["response"] == answer_of(chat_model, "hello", logged["response"], "go on")


def test_llm_its_options(llm: Environment, settings: dict[str, str]) -> None:
    given = {"max_tokens": 4, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.5, "stop": "@"}
    given |= {"logit_bias": '{"5": -100}', "seed": 3, "logprobs": 2, "temperature": 0.7}
    options = [word for name, value in given.items() for word in ("-o", name, str(value))]
    assert llm.output("llm", "-m", "stories", STORY, *options, variables=settings)
    (logged,) = json.loads(llm.output("llm", "logs", "-n", "1", "--json", variables=settings))
    assert len(logged["response_json"]["logprobs"]) >= 4


def test_the_llm_command_of_the_page(llm: Environment, settings: dict[str, str], server: ServerProcess) -> None:
    (line,) = (line for line in on_the_page("llm -m stories", server).splitlines() if line.startswith("llm -m"))
    program, *arguments = shlex.split(line)
    assert llm.output(program, *arguments, variables=settings)


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return with_packages(tmp_path_factory.mktemp("lm_eval"), "lm-eval[api]")


@pytest.fixture(scope="module")
def examples(story: Model) -> list[tuple[str, list[str]]]:
    """Beginnings, and endings for each: those that the model would end after as well."""
    whole = STORY + story.generate(STORY, max_new_tokens=300, do_sample=False).text
    beginning, ending = whole.rsplit(" ", 1)
    return [
        (beginning, [ending, "never."]),
        ("Once upon a time, there was a little", ["girl named Lily.", "Zürich 🙂", "table"]),
        ("The dog was very happy because", ["he had a ball.", "the the the."]),
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, examples: list[tuple[str, list[str]]]) -> Path:
    """A folder with three tasks about `examples`."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"beginning": beginning, "endings": endings, "right": 0} for beginning, endings in examples]
    (folder / "stories.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    shared = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/stories.jsonl}}}}\n"
    shared += "test_split: test\ndoc_to_text: '{{beginning}}'\n"
    kinds = {
        "own_choices": "output_type: multiple_choice\ndoc_to_choice: '{{endings}}'\ndoc_to_target: '{{right}}'\n",
        "own_texts": "output_type: generate_until\ndoc_to_target: ''\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n",
        "own_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{beginning}}'\n",
    }
    for name, kind in kinds.items():
        text = shared.replace("doc_to_text: '{{beginning}}'\n", "") if "doc_to_text" in kind else shared
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}{kind}", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "options, batch",
    [
        ("", 1),
        (",num_concurrent=3", 4),
        (",tokenized_requests=False", 1),
        (f",tokenizer_backend=huggingface,tokenizer={default_bundle_path()},custom_prefix_token_id={END}", 2),
    ],
    ids=["ids", "batches of ids", "texts", "a tokenizer of its own"],
)
def test_local_completions(
    lm_eval: Environment, server: ServerProcess, story: Model, examples: list[tuple[str, list[str]]],
    tasks: Path, tmp_path: Path, options: str, batch: int,
) -> None:  # fmt: skip
    if "huggingface" in options:
        lm_eval.install("transformers")
    lines = on_the_page("--model local-completions", server).replace("\\\n", " ").splitlines()
    (line,) = (line for line in lines if line.startswith("lm_eval "))
    program, *arguments = shlex.split(re.sub("--tasks [^ ]+", "--tasks own_choices,own_texts,own_rolling", line))
    arguments[arguments.index("--model_args") + 1] += options
    arguments += ["--include_path", str(tasks), "--batch_size", str(batch)]
    arguments += ["--log_samples", "--output_path", str(tmp_path)]
    variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
    lm_eval.output(program, *arguments, variables=variables)

    def answers(task: str) -> list[Any]:
        (log,) = tmp_path.glob(f"**/samples_{task}_*.jsonl")
        rows = [json.loads(row) for row in log.read_text(encoding="utf-8").splitlines()]
        return [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]

    encode = story.tokenizer.encode
    for (beginning, endings), found in zip(examples, answers("own_choices"), strict=True):
        for ending, ((logprob, is_greedy),) in zip(endings, found, strict=True):
            context = encode(beginning)
            continuation = encode(f"{beginning} {ending}")[len(context) :]  # lm-eval cuts like this
            assert float(logprob) == pytest.approx(story.score(context, continuation).logprob, abs=1e-4)
            greedy = story.generate(context, max_new_tokens=len(continuation), do_sample=False).choices[0]
            assert is_greedy == str(list(greedy.token_ids) == continuation)
    for (beginning, _), found in zip(examples, answers("own_texts"), strict=True):
        assert found == [[story.generate(beginning, stop_strings=["."], **GREEDY).text]]
    for (beginning, _), found in zip(examples, answers("own_rolling"), strict=True):
        tokens = story.token_logprobs([END, *encode(beginning)])
        assert float(found[0][0]) == pytest.approx(sum(token.logprob for token in tokens), abs=1e-4)
