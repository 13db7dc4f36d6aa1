"""``edgelm push``: what it uploads is what ``edgelm pull`` then fetches."""

from pathlib import Path

import pytest

from tests.conftest import TINY_BUNDLE
from tests.hub.conftest import Commands
from tests.hub.stand_in import COMMIT, Hub
from tests.hub.test_pull import last_line

pytest.importorskip("huggingface_hub", reason="needs the extra [hub]")
pytestmark = pytest.mark.network


@pytest.fixture(params=["folder", "packed"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path, edgelm: Commands) -> str:
    if request.param == "folder":
        return str(TINY_BUNDLE)
    assert edgelm("pack", str(TINY_BUNDLE), "-o", "tiny.edgelm").status == 0
    return "tiny.edgelm"


def test_push_and_pull(hub: Hub, edgelm: Commands, bundle: str) -> None:
    done = edgelm("push", bundle, "me/mine", HF_TOKEN="writer")
    assert done.status == 0 and done.stdout == "", done.stderr
    assert done.stderr.splitlines()[-1] == f"pushed: {hub.url}/me/mine/commit/{COMMIT}"
    assert hub.files["me/mine"] == {path.name: path.read_bytes() for path in TINY_BUNDLE.iterdir()}
    assert edgelm("pull", "me/mine").status == 0
    assert edgelm("verify", "me/mine", "--hashes-only").status == 0


def test_push_to_a_branch_of_a_model_that_exists(hub: Hub, edgelm: Commands) -> None:
    assert edgelm("push", str(TINY_BUNDLE), "owner/tiny@next", HF_TOKEN="writer").status == 0
    assert "next" in hub.revisions
    assert ("POST", "/api/models/owner/tiny/commit/next") in hub.asked


@pytest.mark.parametrize("token", ["", "stranger"])
def test_without_the_right_to_write(hub: Hub, edgelm: Commands, token: str) -> None:
    line = last_line(edgelm("push", str(TINY_BUNDLE), "owner/tiny", HF_TOKEN=token))
    assert "cannot push to 'owner/tiny'" in line and "`hf auth login` or set HF_TOKEN" in line


def test_a_damaged_bundle_is_not_pushed(hub: Hub, edgelm: Commands, tiny_copy: Path) -> None:
    weights = tiny_copy / "model.onnx.data"
    content = weights.read_bytes()
    weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert "'model.onnx.data' is not what" in last_line(edgelm("push", str(tiny_copy), "me/mine", HF_TOKEN="writer"))
    assert hub.asked == []


def test_a_rate_limit_is_waited_for(hub: Hub, edgelm: Commands) -> None:
    hub.limited, hub.retry_after = 1, "1"
    done = edgelm("push", str(TINY_BUNDLE), "me/mine", HF_TOKEN="writer")
    assert done.status == 0 and "rate limit" in done.stderr, done.stderr
