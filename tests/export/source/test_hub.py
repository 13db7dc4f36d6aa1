"""Exporting a hub id, with a stand-in for the hub on this machine. No request leaves the machine."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from huggingface_hub.errors import OfflineModeIsEnabled

from edgelm.errors import ExportError
from edgelm_export.source.checkpoint import load_checkpoint
from edgelm_export.source.hub import locate
from tests.conftest import RunCommand
from tests.export.checkpoints import Shape, save_checkpoint
from tests.hub.stand_in import COMMIT, Hub, serving

pytestmark = [pytest.mark.export, pytest.mark.network]

CARD = """---
language: en
license: mit
tags: [test]
---

# A tiny model

It says nothing sensible.
"""
CHAT_TEMPLATES = {
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
}
NEVER_FETCHED = ["onnx/model.onnx", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "pytorch_model.bin", "run.py"]
NEVER_FETCHED += ["additional_chat_templates/readme.md", "additional_chat_templates/old/tool_use.jinja"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with one model under two names, one with chat templates, and with files that export does not need."""
    source = save_checkpoint(tmp_path / "upload", Shape(layers=1, context=16, vocab=256))
    content = {path.name: path.read_bytes() for path in source.iterdir()}
    content["README.md"] = CARD.encode()
    content |= dict.fromkeys(NEVER_FETCHED, b"never to be fetched")
    hub = Hub({"owner/tiny": content | CHAT_TEMPLATES, "tiny2": content})
    with serving(hub):
        yield hub


@pytest.fixture
def hub_env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return hub.variables(tmp_path)


def failure(status: int, stdout: str, stderr: str) -> str:
    """The last line of stderr, after the lines of progress."""
    assert status == 1, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    assert lines[-1].startswith("edgelm: "), stderr
    assert all(line.endswith(" s") for line in lines[:-1]), stderr
    return lines[-1]


def test_export_from_the_hub(hub: Hub, hub_env: dict[str, str], tmp_path: Path, edgelm_command: RunCommand) -> None:
    done = edgelm_command("export", "owner/tiny", "-o", "out", "--precision", "fp32", env=hub_env)
    assert done.status == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "bundle.json").read_text(encoding="utf-8"))
    assert manifest["source"]["name"] == "owner/tiny"
    assert manifest["source"]["revision"] == COMMIT
    assert manifest["source"]["license"] == "mit"
    assert hub.fetched() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        *CHAT_TEMPLATES,
    }
    templates = json.loads((tmp_path / "out" / "chat_template.json").read_text(encoding="utf-8"))["templates"]
    assert templates == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = card.split("---\n")[1].splitlines()
    assert 'license: "mit"' in front
    assert 'base_model: "owner/tiny"' in front
    assert "It says nothing sensible." in card
    assert "language: en" not in card
    reference = tmp_path / "hf-home" / "hub" / "models--owner--tiny" / "refs" / "main"
    assert reference.read_text(encoding="utf-8") == COMMIT, "without it nobody finds the model again offline"
    assert "hf-home" not in "".join(path.name for path in (tmp_path / "out").iterdir())
    assert edgelm_command("run", "-m", "out", "-n", "3", "a").status == 0
    assert edgelm_command("verify", "out").status == 0


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub as the hub of this process: a new process takes seconds to load torch."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr(
        "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return hub


def test_revision_of_a_short_name(here: Hub, tmp_path: Path, edgelm_command: RunCommand, few_tokens: None) -> None:
    done = edgelm_command("export", "tiny2", "-o", "out", "--precision", "fp32", "--revision", "v1")
    assert done.status == 0, done.stderr
    assert ("GET", "/api/models/tiny2/revision/v1") in here.asked
    source = json.loads((tmp_path / "out" / "bundle.json").read_text(encoding="utf-8"))["source"]
    assert (source["name"], source["revision"]) == ("tiny2", COMMIT)


def test_only_pickled_weights(here: Hub, tmp_path: Path, edgelm_command: RunCommand, few_tokens: None) -> None:
    upload = save_checkpoint(tmp_path / "pickled", Shape(layers=1, context=16, stored="bin"))
    here.files["owner/pickled"] = {path.name: path.read_bytes() for path in upload.iterdir()}
    done = edgelm_command("export", "owner/pickled", "-o", "out", "--precision", "fp32")
    assert done.status == 0, done.stderr
    assert "pytorch_model.bin" in here.fetched()
    source = json.loads((tmp_path / "out" / "bundle.json").read_text(encoding="utf-8"))["source"]
    assert source["license"] is None


def test_unknown_repository(here: Hub, tmp_path: Path, edgelm_command: RunCommand) -> None:
    done = edgelm_command("export", "owner/nothing", "-o", "out")
    line = failure(done.status, done.stdout, done.stderr)
    assert "'owner/nothing'" in line
    assert "no public model of this name; for a private one run `hf auth login`" in line
    assert "check the name, or give the folder of a local checkpoint" in line
    assert not (tmp_path / "out").exists()


def test_unknown_revision(here: Hub, tmp_path: Path, edgelm_command: RunCommand) -> None:
    done = edgelm_command("export", "owner/tiny", "--revision", "v9", "-o", "out")
    line = failure(done.status, done.stdout, done.stderr)
    assert "'owner/tiny'" in line
    assert "no revision 'v9'; check the revision" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "check your access token"),
        (403, "check your access token"),
        (404, "check the name"),
        (503, "try again later"),
    ],
)
def test_hub_that_refuses(status: int, advice: str, here: Hub) -> None:
    here.broken = status
    with pytest.raises(ExportError, match=f"cannot fetch 'owner/tiny' from the hub: .*{advice}.*, or give the folder"):
        locate("owner/tiny", None, set, "checkpoint")


@pytest.mark.parametrize("name", ["ProxyError", "SSLError", "ConnectTimeout", "ReadTimeout", "ConnectionError"])
def test_network_that_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise getattr(requests.exceptions, name)("HTTPSConnectionPool(host='hub', port=443): Max retries exceeded")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(ExportError, match=rf"cannot be reached \({name}\); check the network and the proxy") as caught:
        locate("owner/tiny", None, set, "checkpoint")
    assert "HTTPSConnectionPool" not in str(caught.value)


def test_hub_that_does_not_answer(
    here: Hub, tmp_path: Path, edgelm_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    done = edgelm_command("export", "owner/tiny", "-o", "out")
    assert "cannot fetch 'owner/tiny' from the hub" in failure(done.status, done.stdout, done.stderr)
    assert not (tmp_path / "out").exists()


def test_told_to_stay_offline(hub: Hub, hub_env: dict[str, str], tmp_path: Path, edgelm_command: RunCommand) -> None:
    done = edgelm_command("export", "owner/tiny", "-o", "out", env=hub_env | {"HF_HUB_OFFLINE": "1"})
    assert "cannot fetch 'owner/tiny' from the hub" in failure(done.status, done.stdout, done.stderr)
    assert hub.asked == []


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of owner/tiny in a cache, whose hub cannot be reached."""
    store = tmp_path / "cache" / "models--owner--tiny"
    snapshot = store / "snapshots" / COMMIT
    save_checkpoint(tmp_path / "upload", Shape(layers=1, context=16, vocab=54))
    (store / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (tmp_path / "upload").iterdir():
        path.rename(store / "blobs" / path.name)
        (snapshot / path.name).symlink_to(store / "blobs" / path.name)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    fail_with(monkeypatch, requests.exceptions.ConnectionError("no route"))
    return snapshot


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Every request for a model raises this error."""

    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)


@pytest.mark.parametrize(
    "error",
    [
        OfflineModeIsEnabled("offline"),
        requests.exceptions.ConnectionError("no route"),
        requests.exceptions.ReadTimeout("slow"),
        TimeoutError("slow"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_cached_model_while_the_hub_cannot_be_reached(
    error: Exception, revision: str | None, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, error)
    assert locate("owner/tiny", revision, set, "checkpoint") == (cached, "owner/tiny", COMMIT)


@pytest.mark.parametrize("revision", ["v2", "f" * 40])
def test_a_revision_that_the_cache_does_not_have(revision: str, cached: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot fetch 'owner/tiny' from the hub: .*cannot be reached"):
        locate("owner/tiny", revision, set, "checkpoint")


def test_a_cache_that_was_filled_by_commit(cached: Path) -> None:
    (cached.parents[1] / "refs" / "main").unlink()
    with pytest.raises(ExportError, match=r"cannot fetch 'owner/tiny' from the hub: .*cannot be reached"):
        locate("owner/tiny", None, set, "checkpoint")
    assert locate("owner/tiny", COMMIT, set, "checkpoint") == (cached, "owner/tiny", COMMIT)
    assert locate(str(cached), None, set, "checkpoint") == (cached, "owner/tiny", COMMIT)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_cache_with_a_part_of_a_model(missing: str, cached: Path) -> None:
    (cached / missing).unlink()
    with pytest.raises(ExportError, match=r"cannot fetch 'owner/tiny' from the hub: .*cannot be reached"):
        locate("owner/tiny", None, set, "checkpoint")


def test_a_refused_model_does_not_come_from_the_cache(cached: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cached.parents[2]))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub.broken = 403
    with pytest.raises(ExportError, match="check your access token"):
        locate("owner/tiny", None, set, "checkpoint")
    hub.broken = 503
    assert locate("owner/tiny", None, set, "checkpoint")[0] == cached


def test_a_cached_checkpoint_loads_offline(cached: Path) -> None:
    checkpoint = load_checkpoint("owner/tiny")
    assert (checkpoint.name, checkpoint.source.revision) == ("owner/tiny", COMMIT)


def test_a_snapshot_folder_has_the_name_of_its_model(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (str(cached), f"{cached}/", f"{cached}/../{COMMIT}"):
        assert locate(folder, None, set, "checkpoint")[1:] == ("owner/tiny", COMMIT)
    monkeypatch.chdir(cached)
    assert locate(".", None, set, "checkpoint")[1:] == ("owner/tiny", COMMIT)
    (tmp_path / "link").symlink_to(cached)
    assert locate(str(tmp_path / "link"), None, set, "checkpoint")[1:] == ("owner/tiny", COMMIT)
    (short := tmp_path / "models--gpt2" / "snapshots" / COMMIT).mkdir(parents=True)
    assert locate(str(short), None, set, "checkpoint")[1:] == ("gpt2", COMMIT)
    (other := tmp_path / "runs" / "snapshots" / "last").mkdir(parents=True)
    assert locate(str(other), None, set, "checkpoint")[1:] == ("last", None)
