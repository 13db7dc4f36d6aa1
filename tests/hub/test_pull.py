"""``edgelm pull`` from a hub that cuts, refuses, lies and is slow: a whole bundle appears in the cache, or none."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import TINY_BUNDLE, CommandResult
from tests.hub.conftest import Commands
from tests.hub.stand_in import COMMIT, Hub

pytest.importorskip("huggingface_hub", reason="needs the extra [hub]")
pytestmark = pytest.mark.network

OTHER_COMMIT = "f" * 40


def last_line(done: CommandResult) -> str:
    """The last line on stderr of a command that failed as commands do."""
    assert done.status == 1 and done.stdout == "", done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("edgelm: ")
    return line


def test_pull_and_use_offline(hub: Hub, edgelm: Commands) -> None:
    done = edgelm("pull", "owner/tiny")
    assert done.status == 0 and done.stdout == "", done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"owner/tiny: commit {COMMIT[:12]}, 0.")
    assert hub.fetched() == {path.name for path in TINY_BUNDLE.iterdir()}
    folder = edgelm.cache / "models" / "owner--tiny" / COMMIT
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in TINY_BUNDLE.iterdir()
    }
    asked = len(hub.asked)
    for name in ("owner/tiny", "owner/tiny@main", f"owner/tiny@{COMMIT}"):
        assert edgelm("run", "-m", name, "ab", "-n", "3").status == 0
    assert edgelm("verify", "owner/tiny", "--hashes-only").status == 0
    assert len(hub.asked) == asked, "only pull asks the network"
    assert (
        "no model of this name was pulled; run: edgelm pull owner/tiny@v1"
        in edgelm("run", "-m", "owner/tiny@v1", "ab").one_line()
    )


def test_list_and_rm(edgelm: Commands) -> None:
    assert "no models were pulled" in edgelm("list").stderr
    for name in ("owner/tiny", "owner/tiny@v1"):
        assert edgelm("pull", name).status == 0
    listed = [json.loads(line) for line in edgelm("list", "--json").stdout.splitlines()]
    assert [(row["name"], row["version"]) for row in listed] == [
        ("owner/tiny@main", COMMIT), ("owner/tiny@v1", COMMIT),
    ]  # fmt: skip
    assert listed[0]["path"] == str(edgelm.cache / "models" / "owner--tiny" / COMMIT)
    assert "owner/tiny@v1" in edgelm("list").stdout
    assert edgelm("rm", "owner/tiny@v1").status == 0
    assert len(edgelm.bundles()) == 1, "main is the same commit"
    assert "was not pulled" in edgelm("rm", "owner/tiny@v1").one_line()
    assert edgelm("rm", "owner/tiny").status == 0
    assert edgelm.bundles() == [] and edgelm("list", "--json").stdout == ""
    assert "was not pulled" in edgelm("rm", "owner/tiny").one_line()


def test_a_damaged_bundle_is_listed_with_the_reason_and_fetched_again(hub: Hub, edgelm: Commands) -> None:
    edgelm("pull", "owner/tiny")
    weights = edgelm.bundles()[0] / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "cannot be used" in edgelm("list").stdout
    assert edgelm("pull", "owner/tiny").status == 0
    assert edgelm("verify", "owner/tiny", "--hashes-only").status == 0


def test_a_newer_commit_takes_the_place_of_the_older_one(hub: Hub, edgelm: Commands) -> None:
    edgelm("pull", "owner/tiny")
    asked = len(hub.asked)
    edgelm("pull", "owner/tiny")
    assert len(hub.asked) == asked + 1, "the same commit is not fetched twice"
    hub.commit = OTHER_COMMIT
    assert edgelm("pull", "owner/tiny").status == 0
    assert [path.name for path in edgelm.bundles()] == [OTHER_COMMIT]


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub: Hub, edgelm: Commands) -> None:
    hub.cuts = 2
    done = edgelm("pull", "owner/tiny")
    assert done.status == 0, done.stderr
    assert "its answer was cut off: trying again in 1 s" in done.stderr
    assert [name for name, begin in hub.ranges if begin > 0] == ["model.onnx.data"] * 2


def test_cut_for_good_and_pulled_again_later(hub: Hub, edgelm: Commands) -> None:
    hub.cuts = 1000
    program = (
        "import edgelm.hub.client as client, edgelm.cli as cli, sys\n"
        "client.TRIES = 2\n"
        "sys.argv = ['edgelm', 'pull', 'owner/tiny']\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | edgelm.variables, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot fetch 'owner/tiny' from the hub" in done.stderr.splitlines()[-1]
    assert edgelm.bundles() == []
    hub.cuts, hub.ranges = 0, []
    assert edgelm("pull", "owner/tiny").status == 0
    assert [name for name, begin in hub.ranges if begin > 0] == ["model.onnx.data"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs the signals of POSIX")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT"])
def test_a_kill_in_the_middle(hub: Hub, edgelm: Commands, number: str) -> None:
    hub.slow_seconds = 60
    command = [sys.executable, "-m", "edgelm", "pull", "owner/tiny"]
    child = subprocess.Popen(command, env=os.environ | edgelm.variables, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(path.endswith("model.onnx.data") and method == "GET" for method, path in hub.asked):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(getattr(signal, number))
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == (-signal.SIGKILL if number == "SIGKILL" else 130) and "Traceback" not in stderr
    assert edgelm.bundles() == []
    hub.slow_seconds = 0
    done = edgelm("pull", "owner/tiny")
    assert done.status == 0, done.stderr
    assert edgelm("verify", "owner/tiny", "--hashes-only").status == 0


def test_two_pulls_at_once(hub: Hub, edgelm: Commands) -> None:
    hub.slow_seconds = 2
    command = [sys.executable, "-m", "edgelm", "pull", "owner/tiny"]
    children = [
        subprocess.Popen(command, env=os.environ | edgelm.variables, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    output = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], output
    assert any("another process changes 'owner/tiny' in the cache: waiting" in text for text in output)
    fetched = [path for method, path in hub.asked if method == "GET" and path.endswith("model.onnx.data")]
    assert len(fetched) == 1


@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json"])
def test_content_that_the_manifest_does_not_state(hub: Hub, edgelm: Commands, name: str) -> None:
    good = hub.files["owner/tiny"][name]
    hub.files["owner/tiny"][name] = good[:-1] + bytes([good[-1] ^ 1])
    assert f"{name!r} of 'owner/tiny' is not what its bundle.json says" in last_line(edgelm("pull", "owner/tiny"))
    assert edgelm.bundles() == []
    hub.files["owner/tiny"][name] = good
    assert edgelm("pull", "owner/tiny").status == 0


def test_sizes_that_disagree_are_refused_before_anything_large_comes(hub: Hub, edgelm: Commands) -> None:
    hub.files["owner/tiny"]["model.onnx.data"] += b"x"
    assert "bytes on the hub, but its bundle.json says" in last_line(edgelm("pull", "owner/tiny"))
    assert hub.fetched() == {"bundle.json"}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "is not valid JSON"),
        (b"x" * (4 * 2**20 + 1), "more than 4,194,304"),
        (None, "is no bundle, because it holds no"),
    ],
)
def test_repositories_that_hold_no_bundle(hub: Hub, edgelm: Commands, content: bytes | None, message: str) -> None:
    hub.files["owner/tiny"] |= {"bundle.json": content or b""}
    if content is None:
        del hub.files["owner/tiny"]["bundle.json"]
    assert message in last_line(edgelm("pull", "owner/tiny"))
    assert edgelm.bundles() == []


def test_a_file_that_the_manifest_lists_is_missing(hub: Hub, edgelm: Commands) -> None:
    del hub.files["owner/tiny"]["config.json"]
    assert "lacks the file 'config.json'" in last_line(edgelm("pull", "owner/tiny"))


def test_a_rate_limit_is_waited_for(hub: Hub, edgelm: Commands) -> None:
    hub.limited, hub.retry_after = 2, "1"
    done = edgelm("pull", "owner/tiny")
    assert done.status == 0, done.stderr
    assert done.stderr.count("the hub asks to wait (rate limit): trying again in 1 s") == 2


def test_a_long_rate_limit_is_an_error(hub: Hub, edgelm: Commands) -> None:
    hub.limited, hub.retry_after = 1000, "3600"
    line = last_line(edgelm("pull", "owner/tiny"))
    assert "the hub asks to wait 3600 s (rate limit); try again then, or run `hf auth login`" in line


def test_gated_models_name_the_token_and_the_page(hub: Hub, edgelm: Commands) -> None:
    hub.gated = True
    for variables in ({}, {"HF_TOKEN": "stranger"}):
        line = last_line(edgelm("pull", "owner/tiny", **variables))
        assert f"accept its terms on {hub.url}/owner/tiny, then run `hf auth login` or set HF_TOKEN" in line
    assert edgelm("pull", "owner/tiny", HF_TOKEN="accepted").status == 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("owner/none", "the hub has no public model of this name"),
        ("owner/tiny@v9", "the model has no revision 'v9'"),
    ],
)
def test_names_that_the_hub_does_not_know(edgelm: Commands, name: str, words: str) -> None:
    assert words in last_line(edgelm("pull", name))
    assert edgelm.bundles() == []


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "../x", "owner/..", "o/a--b", "owner/tiny@", "o/n@../x", "ö/x"])
def test_names_that_are_none(hub: Hub, edgelm: Commands, name: str) -> None:
    assert edgelm("pull", name).status == 2
    assert hub.asked == []


def test_nobody_answers(edgelm: Commands) -> None:
    line = last_line(edgelm("pull", "owner/tiny", HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE is set" in line


def test_a_cache_that_cannot_be_written(edgelm: Commands, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = last_line(edgelm("pull", "owner/tiny", EDGELM_CACHE=str(tmp_path / "file")))
    assert "cannot write into the cache" in line and "EDGELM_CACHE" in line


def test_a_full_disk_is_told_before_the_download(hub: Hub, edgelm: Commands) -> None:
    program = (
        "import shutil, sys, collections\n"
        "shutil.disk_usage = lambda path: collections.namedtuple('U', 'total used free')(10, 10, 1000)\n"
        "sys.argv = ['edgelm', 'pull', 'owner/tiny']\n"
        "import edgelm.cli as cli; cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | edgelm.variables, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and "MB are to come, but the disk of the cache" in done.stderr
    assert "model.onnx.data" not in hub.fetched()


def test_without_the_package_one_line_says_what_to_install(edgelm: Commands) -> None:
    program = (
        "import sys\n"
        "sys.modules['huggingface_hub'] = None\n"
        "sys.argv = ['edgelm', 'pull', 'owner/tiny']\n"
        "import edgelm.cli as cli; cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | edgelm.variables, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and "pip install 'edgelm[hub]'" in done.stderr and len(done.stderr.splitlines()) == 1
