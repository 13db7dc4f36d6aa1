"""`benchmarks.real_gpt2` against a stand-in for the hub, with another checkpoint and other data sets."""

import io
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.published import PUBLISHED, read_published
from edgelm.decoding.logprobs import log_softmax
from edgelm_export.source.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.export.checkpoints import Ids, TorchModel
from tests.export.source.test_hub import hub, hub_env
from tests.hub.stand_in import Hub

__all__ = ["hub", "hub_env"]  # pytest finds fixtures by name

pytestmark = [pytest.mark.export, pytest.mark.network]

CONTEXT, STRIDE = 16, 8
WIKITEXT = " \n = A heading = \n \n Some words of a long article , which goes on . \n"
PASSAGES = ["the cat sat on the mat", "one two three four five", "a b"]


class Source:
    """The figures of the stand-in checkpoint, computed by torch."""

    def __init__(self, folder: Path) -> None:
        self.torch = TorchModel(folder)
        self.tokenizer = load_tokenizer(folder)

    def ids(self, text: str) -> Ids:
        return np.array(self.tokenizer.encode(text), np.int64)

    def log_probabilities(self, context: Ids, continuation: Ids) -> list[float]:
        whole = np.concatenate([context, continuation])[-(CONTEXT + 1) :]
        logs = log_softmax(self.torch.logits(whole[:-1]))[-len(continuation) :]
        return [float(x) for x in logs[np.arange(len(continuation)), continuation]]

    def stride_perplexity(self, ids: Ids) -> float:
        """Perplexity as Hugging Face's documentation computes it."""
        nats, count, done = 0.0, 0, 0
        for begin in range(0, len(ids), STRIDE):
            end = min(begin + CONTEXT, len(ids))
            window, new = ids[begin:end], end - max(done, 1)
            logs = log_softmax(self.torch.logits(window))[:-1]
            nats -= float(logs[np.arange(len(window) - 1), window[1:]][-new:].sum())
            count, done = count + new, end
            if end == len(ids):
                break
        return math.exp(nats / count)

    def lambada(self) -> tuple[float, float]:
        right, nats = 0, 0.0
        for passage in PASSAGES:
            context, last = (
                self.ids(part) for part in (passage[: passage.rindex(" ")], passage[passage.rindex(" ") :])
            )
            nats -= sum(self.log_probabilities(context, last))
            whole = np.concatenate([context, last])[-(CONTEXT + 1) :]
            right += np.array_equal(self.torch.logits(whole[:-1]).argmax(axis=1)[-len(last) :], last)
        return right / len(PASSAGES), math.exp(nats / len(PASSAGES))


def archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr("wikitext-2-raw/wiki.test.raw", WIKITEXT)
    return stream.getvalue()


@pytest.fixture
def source(hub: Hub, tmp_path: Path) -> Source:
    hub.files["datasets/ggml-org/ci"] = {"wikitext-2-raw-v1.zip": archive()}
    lines = "".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES)
    hub.files["datasets/EleutherAI/lambada_openai"] = {"data/lambada_test_en.jsonl": lines.encode()}
    return Source(tmp_path / "upload")


@pytest.fixture
def figures(source: Source, tmp_path: Path) -> Path:
    """A file of published figures of the stand-in checkpoint."""
    prompt = source.ids("Hello").tolist()
    greedy = source.tokenizer.decode(prompt + source.torch.greedy(prompt, 7))
    a, b = source.ids("ab"), source.ids("cde")
    content: dict[str, Any] = {
        "tiny": {
            "greedy": [
                {"prompt": "Hello", "max_length": 12, "output": greedy},
                {"prompt_ids": prompt, "max_new_tokens": 7, "output": greedy},
                {"prompt": "Hello", "max_new_tokens": 7, "output": "another text"},
            ],
            "token_log_probabilities": [{"prefix": "ab", "text": "cde", "values": source.log_probabilities(a, b)}],
            "continuations": [
                {"context": "ab", "continuation": "cde", "log_likelihood": sum(source.log_probabilities(a, b))}
            ],
            "wikitext2": [{"what": "by hand", "perplexity": 12.345}],
            "lambada": [{"what": "by hand", "perplexity": 40.06, "accuracy": 0.3256}],
        }
    }
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def run(tmp_path: Path, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    import os

    command = [sys.executable, "-m", "benchmarks.real_gpt2", "--work", str(tmp_path / "work"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, encoding="utf-8", timeout=280
    )


def test_a_stand_in_is_compared_with_its_figures(
    source: Source, figures: Path, hub: Hub, hub_env: dict[str, str], tmp_path: Path
) -> None:
    done = run(
        tmp_path,
        hub_env,
        "--model",
        "owner/tiny",
        "--recipes",
        "fp32,int8",
        "--figures",
        str(figures),
        "--threads",
        "1",
    )
    assert done.returncode == 0, done.stderr
    *table, empty, last = done.stdout.splitlines()
    assert empty == "" and [line.split(" | ")[0] for line in table[2:]] == [
        "| by hand",
        "| by hand",
        "| edgelm fp32",
        "| edgelm int8",
    ]
    assert "12.35" in table[2] and "32.56%" in table[3]
    content = json.loads(last)
    exact = content["recipes"]["fp32"]
    assert (exact["greedy_equal"], exact["greedy_cases"]) == (2, 3)
    assert exact["log_probability_error"] < 1e-3
    rows = "\n\n".join(["", " = A heading = \n", "", " Some words of a long article , which goes on . \n"])
    assert exact["wikitext2_perplexity"] == pytest.approx(source.stride_perplexity(source.ids(rows)), rel=1e-4)
    assert exact["wikitext2_tokens"] == len(source.ids(rows))
    accuracy, perplexity = source.lambada()
    assert exact["lambada_accuracy"] == accuracy
    assert exact["lambada_perplexity"] == pytest.approx(perplexity, rel=1e-3)
    assert content["recipes"]["int8"]["wikitext2_perplexity"] == pytest.approx(exact["wikitext2_perplexity"], rel=0.05)
    assert exact["revision"] and sum("/resolve/" in path for _, path in hub.asked) > 5
    asked = len(hub.asked)
    again = run(
        tmp_path, hub_env, "--model", "owner/tiny", "--recipes", "fp32", "--figures", str(figures),
        "--wikitext-tokens", "20", "--lambada-passages", "1",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    exact = json.loads(again.stdout.splitlines()[-1])["recipes"]["fp32"]
    assert (exact["wikitext2_tokens"], exact["lambada_passages"]) == (20, 1)
    assert all(method == "HEAD" for method, _ in hub.asked[asked:]), "the bundle and the data are kept"


def test_without_the_data_it_says_so(hub: Hub, hub_env: dict[str, str], figures: Path, tmp_path: Path) -> None:
    del hub.files["datasets/ggml-org/ci"]
    done = run(tmp_path, hub_env, "--model", "owner/tiny", "--figures", str(figures))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("cannot fetch 'wikitext-2-raw-v1.zip' of the data set 'ggml-org/ci'")


def test_a_model_nobody_published_figures_of(hub_env: dict[str, str], tmp_path: Path) -> None:
    done = run(tmp_path, hub_env, "--model", "owner/tiny")
    assert done.returncode == 1 and "has no figures of 'tiny', only of gpt2, gpt2-medium" in done.stderr


def test_every_published_figure_has_its_source() -> None:
    for name in ("gpt2", "gpt2-medium"):
        figures = read_published(PUBLISHED, name)
        assert figures["wikitext2"] and figures["lambada"]
        assert all(entry["source"] for entries in figures.values() for entry in entries)
    gpt2 = read_published(PUBLISHED, "gpt2")
    assert len(gpt2["greedy"]) == 5 and len(gpt2["token_log_probabilities"][0]["values"]) == 17
    assert [entry["perplexity"] for entry in gpt2["wikitext2"]][:2] == [25.1875, 26.5]
