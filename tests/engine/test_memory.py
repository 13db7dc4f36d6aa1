"""The memory of a model is known before it is loaded, and a model that does not fit is refused."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgelm
from edgelm import InsufficientMemoryError
from edgelm.bundle.folder import default_bundle_path
from edgelm.engine.limits import Room, rooms
from edgelm.engine.memory import PIECES, SPARE, ModelMemory
from tests.conftest import TINY_BUNDLE
from tests.engine.cgroup_trees import version_2

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

LIMITED = """
import resource, sys
import edgelm, edgelm.model, onnxruntime
from edgelm.engine.limits import status_bytes
memory = edgelm.model.ModelMemory.of(edgelm.Bundle.read(sys.argv[1]))
name = sys.argv[3]
needed = memory.forecast_bytes + (memory.weights_bytes if name == "RLIMIT_AS" else 0)
limit = status_bytes({"RLIMIT_AS": "VmSize:", "RLIMIT_DATA": "VmData:"}[name]) + int(needed * float(sys.argv[2]))
resource.setrlimit(getattr(resource, name), (limit, limit))
model = edgelm.load(sys.argv[1], threads=1)
print(model.generate([5] * (model.session.context_length - 2), max_new_tokens=3).choices[0].finish_reason)
"""

MEASURED = """
import sys
import edgelm, edgelm.model, onnxruntime, tokenizers
from edgelm.engine.memory import resident_bytes
before = resident_bytes()
model = edgelm.load(sys.argv[1], threads=2)
model.generate([5] * (model.session.context_length - 2), max_new_tokens=3)
print(resident_bytes() - before, model.memory.forecast_bytes, model.memory.present_bytes)
"""


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)


@linux
@pytest.mark.parametrize("bundle", [TINY_BUNDLE, default_bundle_path()], ids=lambda path: path.name)
def test_the_forecast_is_near_what_a_full_context_takes(bundle: Path) -> None:
    taken, forecast, present = map(int, run(MEASURED, str(bundle)).stdout.split())
    assert 0.75 < forecast / taken < 1.33
    assert present > taken


def test_the_parts_add_up() -> None:
    memory = ModelMemory.of(edgelm.Bundle.read(default_bundle_path()))
    assert memory.cache_bytes == 2 * 6 * 4 * 64 * 512 * 4  # 6 layers, 4 heads of 64, 512 tokens, keys and values
    assert memory.prefix_bytes == 0
    facts = edgelm.Bundle.read(default_bundle_path()).manifest.architecture
    half = ModelMemory.forecast(facts, "float16", memory.weights_bytes, prefix_bytes=1000)
    assert (half.cache_bytes, half.prefix_bytes) == (memory.cache_bytes // 2, 1000)
    assert half.forecast_bytes == memory.forecast_bytes - half.cache_bytes + 1000
    parts = memory.prepacked_bytes + memory.cache_bytes + memory.activation_bytes
    assert 8 << 20 < memory.forecast_bytes - parts < 32 << 20


@linux
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_with_a_tenth_more_than_the_forecast_it_runs(limit: str) -> None:
    done = run(LIMITED, str(default_bundle_path()), "1.1", limit)
    assert done.stdout.strip() in ("context", "length", "eos"), done.stderr


@linux
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_with_half_of_it_it_is_refused_with_both_numbers(limit: str) -> None:
    done = run(LIMITED, str(default_bundle_path()), "0.5", limit)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("edgelm.errors.InsufficientMemoryError: the model 'stories-6m-int8' needs about ")
    assert f" MB but {limit} leaves " in last


def test_limits_are_asked_when_onnx_runtime_has_its_memory() -> None:
    code = """if True:
    import sys
    import edgelm, edgelm.engine.memory
    ask = edgelm.engine.memory.rooms
    def rooms():
        print("onnxruntime" in sys.modules)
        return ask()
    edgelm.engine.memory.rooms = rooms
    edgelm.load(sys.argv[1]).close()
    """
    assert run(code, str(TINY_BUNDLE)).stdout == "True\n"


@pytest.mark.parametrize("limit", ["the cgroup's memory limit", "this machine's available memory"])
def test_every_limit_counts(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forecast = ModelMemory.of(edgelm.Bundle.read(TINY_BUNDLE)).forecast_bytes
    monkeypatch.setattr("edgelm.engine.memory.rooms", lambda: [Room(forecast - 1, limit)])
    with pytest.raises(InsufficientMemoryError, match=f"needs about 17 MB but {limit} leaves 17 MB: free some"):
        edgelm.load(TINY_BUNDLE)
    monkeypatch.setattr("edgelm.engine.memory.rooms", lambda: [Room(forecast, limit)])
    edgelm.load(TINY_BUNDLE).close()


def test_the_limit_of_the_address_space_counts_the_mapped_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = ModelMemory.of(edgelm.Bundle.read(TINY_BUNDLE))
    assert memory.weights_bytes == (TINY_BUNDLE / "model.onnx.data").stat().st_size
    needed = memory.forecast_bytes + memory.weights_bytes
    monkeypatch.setattr("edgelm.engine.memory.rooms", lambda: [Room(needed - 1, "RLIMIT_AS", counts_mapped_files=True)])
    with pytest.raises(InsufficientMemoryError, match="but RLIMIT_AS leaves"):
        edgelm.load(TINY_BUNDLE)
    monkeypatch.setattr("edgelm.engine.memory.rooms", lambda: [Room(needed, "RLIMIT_AS", counts_mapped_files=True)])
    edgelm.load(TINY_BUNDLE).close()


def test_where_memory_is_short_a_call_takes_less_of_a_prompt(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = edgelm.Bundle.read(default_bundle_path())
    prompt = np.random.default_rng(0).integers(0, 4000, 400)
    expected = {}
    for piece_tokens in PIECES:
        forecast = ModelMemory.of(bundle, 0, piece_tokens).forecast_bytes
        room = Room(forecast if piece_tokens == 256 else math.ceil(forecast * SPARE), "a limit")
        monkeypatch.setattr("edgelm.engine.memory.rooms", lambda room=room: [room])
        caplog.clear()
        with edgelm.load() as model:
            assert (model.graph.piece_tokens, model.memory.forecast_bytes) == (piece_tokens, forecast)
            expected[piece_tokens] = model.session.step(prompt)
        warned = f"in pieces of {piece_tokens} tokens instead of 256, which is slower, because a limit leaves"
        assert (warned in caplog.text) == (piece_tokens != 256)
    assert all(np.array_equal(logits, expected[256]) for logits in expected.values())


def test_a_prefix_counts(tmp_path: Path) -> None:
    with edgelm.load(TINY_BUNDLE) as model:
        alone = model.memory
        model.save_prefix(tmp_path / "prefix.safetensors", "Once upon a time")
        tokens = len(model.tokenizer.encode("Once upon a time"))
        token_bytes = model.session.bytes_per_token
    assert alone.prefix_bytes == 0
    with edgelm.load(TINY_BUNDLE, prefix=tmp_path / "prefix.safetensors") as model:
        assert model.memory.prefix_bytes == tokens * token_bytes
        assert model.memory.forecast_bytes == alone.forecast_bytes + tokens * token_bytes


def test_a_memory_error_too() -> None:
    assert issubclass(InsufficientMemoryError, MemoryError) and issubclass(InsufficientMemoryError, edgelm.EdgelmError)


@linux
def test_this_machine_says_what_is_left() -> None:
    assert all(room.free_bytes > 0 for room in rooms())
    assert "this machine's available memory" in [room.limit for room in rooms()]


def test_a_cgroup_at_any_depth_leaves_room(tmp_path: Path) -> None:
    files = {"a/b/memory.max": "1000", "a/b/memory.current": "700", "a/b/memory.stat": "anon 5\ninactive_file 200\n"}
    root = version_2(tmp_path, "/a/b", files)
    found = {room.limit: room.free_bytes for room in rooms(root)}
    assert found[f"the cgroup limit {root}/sys/fs/cgroup/a/b/memory.max"] == 500


def test_without_proc_the_machine_s_memory_is_the_limit(tmp_path: Path) -> None:
    (room,) = rooms(tmp_path)
    assert room.limit == "this machine's memory" and room.free_bytes > 100 << 20


def test_warmup_says_how_long_it_took() -> None:
    with edgelm.load(TINY_BUNDLE) as model:
        assert 0 < model.warmup() < 60
        assert model.session.position == 0
