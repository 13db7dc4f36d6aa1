"""The memory of a model is known before it is loaded, and a model that does not fit is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

import edgelm
from edgelm import InsufficientMemoryError
from edgelm.bundle.folder import default_bundle_path
from edgelm.engine.memory import ModelMemory, Room, rooms
from tests.conftest import TINY_BUNDLE

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

LIMITED = """
import resource, sys
import edgelm, edgelm.model, onnxruntime
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
memory = edgelm.model.ModelMemory.of(edgelm.Bundle.read(sys.argv[1]))
limit = used + int((memory.forecast_bytes + memory.weights_bytes) * float(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
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
    parts = memory.prepacked_bytes + memory.cache_bytes + memory.activation_bytes
    assert 8 << 20 < memory.forecast_bytes - parts < 32 << 20


@linux
def test_with_a_tenth_more_than_the_forecast_it_runs() -> None:
    done = run(LIMITED, str(default_bundle_path()), "1.1")
    assert done.stdout.strip() in ("context", "length", "eos"), done.stderr


@linux
def test_with_half_of_it_it_is_refused_with_both_numbers() -> None:
    done = run(LIMITED, str(default_bundle_path()), "0.5")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("edgelm.errors.InsufficientMemoryError: the model 'stories-6m-int8' needs about ")
    assert " MB but RLIMIT_AS leaves " in last


@pytest.mark.parametrize("limit", ["the cgroup's memory limit", "this machine's available memory"])
def test_every_limit_counts(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forecast = ModelMemory.of(edgelm.Bundle.read(TINY_BUNDLE)).forecast_bytes
    monkeypatch.setattr("edgelm.engine.memory.rooms", lambda: [Room(forecast - 1, limit)])
    with pytest.raises(InsufficientMemoryError, match=f"needs about 17 MB but {limit} leaves 17 MB: free some"):
        edgelm.load(TINY_BUNDLE)
    monkeypatch.setattr("edgelm.engine.memory.rooms", lambda: [Room(forecast, limit)])
    edgelm.load(TINY_BUNDLE).close()


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


@pytest.mark.parametrize(("limit", "left"), [("max", None), ("1000", 500)])
def test_the_cgroup_s_limit(limit: str, left: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": limit, "memory.current": "700", "memory.stat": "anon 5\ninactive_file 200\n"}
    read = Path.read_text

    def fake(self: Path, encoding: str | None = None, errors: str | None = None) -> str:
        return files[self.name] if str(self).startswith("/sys/fs/cgroup/memory.") else read(self, encoding, errors)

    monkeypatch.setattr(Path, "read_text", fake)
    free = [room.free_bytes for room in rooms() if "cgroup" in room.limit]
    assert free == ([] if left is None else [left])


def test_warmup_says_how_long_it_took() -> None:
    with edgelm.load(TINY_BUNDLE) as model:
        assert 0 < model.warmup() < 60
        assert model.session.position == 0
