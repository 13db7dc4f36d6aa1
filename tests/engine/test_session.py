"""Sessions of ONNX Runtime on the graph of the tiny bundle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm import Bundle, ContextError, DeviceError, PromptError, Session
from edgelm.bundle.folder import default_bundle_path
from edgelm.engine import graph as graph_module
from edgelm.engine.device import Device
from edgelm.engine.graph import Graph
from edgelm.ids import prompt_chunks
from tests.conftest import TINY_BUNDLE

TEXT = [int(i) for i in np.random.default_rng(0).integers(0, 300, 40)]


@pytest.fixture(scope="module")
def tiny() -> Session:
    return Graph.open(Bundle.read(TINY_BUNDLE), device="cpu", threads=1).session()


@pytest.fixture(scope="module")
def int8() -> Session:
    return Graph.open(Bundle.read(default_bundle_path()), device="cpu", threads=1).session()


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> None:
    for name in {"tiny", "int8"} & set(request.fixturenames):
        request.getfixturevalue(name).reset()


def test_logits_are_transformers(tiny: Session, golden: dict[str, Any]) -> None:
    for case in golden["cases"]:
        tiny.reset()
        np.testing.assert_allclose(tiny.step(case["ids"]), case["last_logits"], atol=1e-3)


def test_greedy_ids_are_transformers(tiny: Session, golden: dict[str, Any]) -> None:
    for case in golden["cases"]:
        tiny.reset()
        logits, greedy = tiny.step(case["ids"]), []
        for _ in range(20):
            greedy.append(int(logits.argmax()))
            logits = tiny.step([greedy[-1]])
        assert greedy == case["greedy_ids"]


def test_cached_steps_equal_one_pass(tiny: Session) -> None:
    whole = tiny.score(TEXT)
    tiny.reset()
    stepwise = np.stack([tiny.step([token]) for token in TEXT])
    np.testing.assert_allclose(stepwise, whole, atol=1e-4)


def test_step_is_the_last_row_of_score(tiny: Session) -> None:
    last = tiny.score(TEXT)[-1]
    tiny.reset()
    assert np.array_equal(tiny.step(TEXT), last)


def test_hidden_states_come_beside_the_same_logits(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiny.step(TEXT)
    tiny.reset()
    logits, whole = tiny.step_hidden(TEXT)
    assert np.array_equal(logits, expected)
    assert whole.shape == (40, 32) and whole.dtype == np.float32
    tiny.reset()
    monkeypatch.setattr(tiny._graph, "piece_tokens", 8)
    assert np.array_equal(tiny.step_hidden(TEXT)[1], whole)
    tiny.rewind(1)
    np.testing.assert_allclose(tiny.step_hidden(TEXT[-1:])[1], whole[-1:], atol=1e-4)
    assert tiny.position == 40


def test_results_are_the_callers_own(tiny: Session) -> None:
    first = tiny.step([1])
    copy = first.copy()
    tiny.step([2])
    assert np.array_equal(first, copy)
    first[:] = 0
    tiny.rewind(1)
    assert tiny.step([2]).any()


def test_rewind_and_reset_forget(tiny: Session) -> None:
    tiny.step(TEXT[:10])
    expected = tiny.step([5, 6])
    tiny.rewind(2)
    tiny.step([7, 8, 9])
    tiny.rewind(3)
    assert np.array_equal(tiny.step([5, 6]), expected)
    assert tiny.position == 12
    tiny.reset()
    assert tiny.position == 0
    with pytest.raises(ContextError, match="cannot rewind 1 tokens: the cache holds 0"):
        tiny.rewind(1)
    with pytest.raises(ContextError):
        tiny.rewind(-1)


def test_siblings_have_caches_of_their_own(tiny: Session) -> None:
    expected = tiny.step(TEXT)
    other = tiny.sibling()
    assert (other.position, other.high_water_tokens) == (0, 0)
    other.step([1, 2, 3])
    assert (tiny.position, other.position) == (40, 3)
    tiny.rewind(2)
    assert np.array_equal(tiny.step(TEXT[-2:]), expected)


def test_a_prefix_leaves_room_for_a_token(tiny: Session) -> None:
    other = tiny.sibling()
    with pytest.raises(ContextError, match="a prefix of 64 tokens leaves no room in a context of 64"):
        other.begin_after(np.zeros((4, 4, 64, 8), np.float32))
    assert (other.context_length, other.prefix) == (64, None)
    other.begin_after(np.zeros((4, 4, 63, 8), np.float32))
    assert other.context_length == 1 and np.isfinite(other.step([1])).all()
    with pytest.raises(ContextError, match="1 tokens do not fit: the context holds 1 and 1 are used"):
        other.step([1])


def test_context_is_a_limit_that_changes_nothing(tiny: Session) -> None:
    assert tiny.context_length == 64
    tiny.step(TEXT)
    with pytest.raises(ContextError, match="25 tokens do not fit: the context holds 64 and 40 are used"):
        tiny.step(TEXT[:25])
    assert tiny.position == 40
    tiny.step(TEXT[:24])
    with pytest.raises(ContextError):
        tiny.step([1])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "there are no token ids"),
        ([300], "token id 300 is out of range: this model knows 0 to 299"),
        ([1, -1], "token id -1 is out of range"),
        ([10**30], "flat list of whole numbers"),
        ([1.5], "flat list of whole numbers"),
        ([True], "flat list of whole numbers"),
        ([[1, 2]], "flat list of whole numbers"),
        ([[1], [2, 3]], "flat list of whole numbers"),
        (["a"], "flat list of whole numbers"),
        (np.array([2**63], np.uint64), "out of range"),
    ],
)
def test_bad_ids_are_named(tiny: Session, ids: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        tiny.step(ids)
    assert tiny.position == 0


def test_arrays_are_taken_too(tiny: Session) -> None:
    expected = tiny.step([1, 2, 3])
    tiny.reset()
    assert np.array_equal(tiny.step(np.array([1, 2, 3], np.int32)), expected)


@pytest.mark.parametrize("chunk", [2, 3, 4, 5, 7, 39])
@pytest.mark.parametrize("length", [11, 24, 40])
def test_int8_is_the_same_bit_for_bit_however_a_prompt_is_cut(
    int8: Session, monkeypatch: pytest.MonkeyPatch, chunk: int, length: int
) -> None:
    expected = int8.step(TEXT[:length])
    int8.reset()
    monkeypatch.setattr(int8._graph, "piece_tokens", chunk)
    assert np.array_equal(int8.step(TEXT[:length]), expected)


@pytest.mark.parametrize("chunk", [2, 3, 7])
def test_int8_scores_are_the_same_bit_for_bit_however_a_text_is_cut(int8: Session, chunk: int) -> None:
    expected = int8.score(TEXT[:39])
    int8.reset()
    pieces = [int8.score(TEXT[at : at + chunk]) for at in range(0, 39 // chunk * chunk, chunk)]
    assert np.array_equal(np.concatenate(pieces), expected[: 39 // chunk * chunk])


def test_an_odd_chunk_fits_at_the_end_of_the_context(int8: Session) -> None:
    ids = np.arange(int8.context_length)
    expected = int8.step(ids)
    int8.reset()
    int8.step(ids[:-3])
    assert np.array_equal(int8.step(ids[-3:]), expected)
    assert int8.position == int8.context_length


def test_int8_is_the_same_bit_for_bit_on_any_number_of_threads(int8: Session) -> None:
    expected = int8.score(TEXT)
    two = Graph.open(int8.bundle, device="cpu", threads=2).session()
    assert np.array_equal(two.score(TEXT), expected)


def test_chunks_never_end_in_a_single_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelm.ids.PREFILL_CHUNK_TOKENS", 4)
    for length in range(1, 30):
        chunks = prompt_chunks(np.arange(length))
        assert np.array_equal(np.concatenate(chunks), np.arange(length))
        assert all(2 <= len(chunk) <= 5 for chunk in chunks) or length == 1
        assert all(len(chunk) == 4 for chunk in chunks[:-1])


@pytest.mark.parametrize("threads", [0, -1, 1.5, 5000])
def test_threads_are_checked(threads: Any) -> None:
    with pytest.raises(DeviceError, match="threads must be a whole number from 1 to 1024"):
        Graph.open(Bundle.read(TINY_BUNDLE), threads=threads).session()


def test_batch_invariance_is_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "choose_device", lambda *_: Device("cuda", 1))
    with pytest.raises(DeviceError, match="works on the CPU only, not on cuda:1"):
        Graph.open(Bundle.read(TINY_BUNDLE), batch_invariant=True).session()


def test_caches_are_freed_with_their_session(tiny: Session) -> None:
    import gc
    import weakref

    gc.disable()  # a cycle would keep the cache of every generation until the collector runs
    try:
        other = tiny.sibling()
        other.step(TEXT)
        gone = weakref.ref(other)
        del other
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("bundle", [TINY_BUNDLE, default_bundle_path()])
def test_no_chunk_ends_in_a_tile_of_one_token(bundle: Path) -> None:
    """Attention computes queries in tiles of twice the head's width, and a tile of one token by another kernel."""
    session = Graph.open(Bundle.read(bundle), device="cpu", threads=1).session()
    tile = 2 * session.bundle.manifest.architecture.head_dim
    for length in (tile + 1, tile + 3, 2 * tile + 1, 2 * tile + 8):
        ids = np.random.default_rng(length).integers(0, session.vocab_size, length)
        session.reset()
        expected, cache = session.step(ids), session.remembered(length)
        for cut in sorted({2, 7, 8, length // 2, tile + 1, tile - 1, length - 7, length - 2}):
            if 2 <= cut <= length - 2:
                session.reset()
                session.step(ids[:cut])
                assert np.array_equal(session.step(ids[cut:]), expected), (length, cut)
                assert np.array_equal(session.remembered(length), cache), (length, cut)


def test_switches_and_devices_are_checked() -> None:
    bundle: Any = Bundle.read(TINY_BUNDLE)
    wrong: Any = "no"
    for name in ("batch_invariant", "shared_threads"):
        with pytest.raises(DeviceError, match=f"{name} must be True or False, got 'no'"):
            Graph.open(bundle, **{name: wrong}).session()
    with pytest.raises(DeviceError, match="device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got None"):
        Graph.open(bundle, device=None).session()  # type: ignore[arg-type]
