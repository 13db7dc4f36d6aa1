"""Each row of a batch computes what it would compute alone."""

from pathlib import Path

import numpy as np
import pytest

from edgelm import Bundle, ContextError, PromptError, Session
from edgelm.bundle.folder import default_bundle_path
from edgelm.engine.batch import IDLE_TOKEN, Batch
from edgelm.engine.graph import Graph
from tests.conftest import TINY_BUNDLE

PROMPT = [int(i) for i in np.random.default_rng(0).integers(0, 300, 9)]


@pytest.fixture(scope="module")
def tiny() -> Session:
    return Graph.open(Bundle.read(TINY_BUNDLE), device="cpu", threads=1).session()


def alone(session: Session, tokens: list[int]) -> np.ndarray:
    """The logits after each of `tokens`, which follow the prompt one at a time."""
    session.reset()
    session.step(PROMPT)
    return np.stack([session.step([token]) for token in tokens])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_rows_equal_single_runs_bit_for_bit(tiny: Session, rows: int) -> None:
    tokens = np.random.default_rng(rows).integers(0, 300, (12, rows))
    expected = [alone(tiny, tokens[:, row].tolist()) for row in range(rows)]
    tiny.reset()
    tiny.step(PROMPT)
    batch = tiny.batch(rows, 64)
    for step, ids in enumerate(tokens):
        logits = batch.step(ids)
        for row in range(rows):
            assert np.array_equal(logits[row], expected[row][step])
    assert batch.position == 21 and tiny.position == 9


def test_several_tokens_of_the_only_text_equal_those_of_a_session(tiny: Session) -> None:
    """In row 0, where it is moved if it stands elsewhere; logits, keys and values are the same."""
    rng, text = np.random.default_rng(0), list(PROMPT)
    tiny.reset()
    tiny.step(PROMPT)
    batch = tiny.empty_batch(3)
    assert [tiny.copy_into(batch) for _ in range(2)] == [0, 1]
    with pytest.raises(ContextError, match="several tokens at once need a batch whose only text stands in row 0"):
        batch.step_all([1, 2])
    batch.leave(0)
    assert (batch.moved_down(), batch.moved_down()) == ((1, 0), None)
    while batch.room:
        new = [int(token) for token in rng.integers(0, 300, min(batch.room, int(rng.integers(2, 6))))]
        actual = batch.step_all(new).copy()
        tiny.reset()
        tiny.step(text)
        assert np.array_equal(actual, tiny.step_all(new))
        kept = int(rng.integers(1, len(new) + 1))
        batch.rewind(0, len(new) - kept)
        text += new[:kept]
        held = np.stack([value.numpy()[0, :, : len(text)] for value in batch._cache.values])
        assert np.array_equal(held, tiny.remembered(len(text)))
    with pytest.raises(ContextError, match="2 tokens do not fit: the batch has room for 0 more"):
        batch.step_all([1, 2])


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_prompts_of_several_rows_equal_single_runs(tiny: Session, rows: int) -> None:
    """Prompts of any lengths, each behind tokens of its own; logits, keys and values are the same."""
    rng = np.random.default_rng(rows)
    batch = tiny.empty_batch(rows + 1)
    tiny.reset()
    tiny.step([1, 2, 3])
    assert tiny.copy_into(batch) == 0
    texts, new = [], []
    for row in range(rows):
        texts.append([int(token) for token in rng.integers(0, 300, rng.integers(2, 20))] if row else [])
        new.append(rng.integers(0, 300, rng.integers(2, 12)))
        tiny.reset()
        if texts[row]:
            tiny.step(texts[row])
        assert tiny.copy_behind(batch) == row + 1
    assert batch.rows_behind == 0
    logits = batch.prefill(1, new)
    for row in range(rows):
        tiny.reset()
        if texts[row]:
            tiny.step(texts[row])
        assert np.array_equal(logits[row], tiny.step(new[row], as_in_batch=True))
        held = np.stack([value.numpy()[row + 1, :, : tiny.position] for value in batch._cache.values])
        assert np.array_equal(held, tiny.remembered(tiny.position))
    with pytest.raises(ContextError, match="tokens do not fit into each row"):
        batch.prefill(1, [new[0], np.arange(60)])


def test_reordered_rows_go_on_as_what_they_copied(tiny: Session) -> None:
    rng = np.random.default_rng(5)
    tiny.reset()
    tiny.step(PROMPT)
    batch, texts = tiny.batch(4, 64), [list[int]() for _ in range(4)]
    for _ in range(15):
        order = rng.integers(0, 4, 4) if rng.random() < 0.8 else np.full(4, rng.integers(4))
        batch.reorder(order)
        texts = [list(texts[row]) for row in order]
        ids = rng.integers(0, 300, 4)
        logits = batch.step(ids).copy()
        for row, token in enumerate(ids.tolist()):
            texts[row].append(token)
            assert np.array_equal(logits[row], alone(tiny, texts[row])[-1])


def test_hidden_states_come_with_the_logits(tiny: Session) -> None:
    tiny.reset()
    logits, hidden = tiny.step_hidden(PROMPT)
    assert hidden.shape == (9, 32) and hidden.dtype == np.float32
    tiny.reset()
    assert np.array_equal(tiny.step(PROMPT), logits)
    batch = tiny.batch(3, 64)
    rows, states = batch.step_hidden([1, 2, 3])
    assert rows.shape == (3, 300) and states.shape == (3, 32)
    alone_logits, alone_hidden = tiny.step_hidden([2])
    assert np.array_equal(rows[1], alone_logits)
    assert np.array_equal(states[1], alone_hidden[0])


def test_hidden_states_of_long_prompts_come_from_all_pieces(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(1).integers(0, 300, 40)
    tiny.reset()
    whole = tiny.step_hidden(ids)
    monkeypatch.setattr(tiny._graph, "piece_tokens", 16)
    tiny.reset()
    pieces = tiny.step_hidden(ids)
    assert all(map(np.array_equal, whole, pieces))


def admitted(session: Session, batch: Batch, prompt: list[int]) -> int:
    """The row of a text that begins with `prompt`."""
    session.reset()
    session.step(prompt)
    return session.copy_into(batch)


def test_texts_come_into_free_rows_and_leave_them(tiny: Session) -> None:
    batch = tiny.empty_batch(4)
    assert batch.position == 0 and not batch.is_full
    assert [admitted(tiny, batch, PROMPT[:length]) for length in (3, 9, 5, 7)] == [0, 1, 2, 3]
    assert batch.position == 9 and batch.is_full
    with pytest.raises(ContextError, match="all 4 rows of the batch are taken"):
        admitted(tiny, batch, PROMPT)
    batch.leave(1)
    assert batch.position == 7 and not batch.is_full
    assert admitted(tiny, batch, PROMPT[:4]) == 1
    batch.leave(2)
    assert batch.moved_down() is None  # four rows are computed for three texts, wherever they stand
    batch.leave(0)
    assert batch.moved_down() == (3, 0)
    assert batch.moved_down() is None
    assert batch.step([1, 2]).shape == (2, 300)
    batch.leave(1)
    assert batch.step([1]).shape == (1, 300)
    batch.leave(0)
    assert batch.position == 0
    assert admitted(tiny, batch, PROMPT[:2]) == 0


@pytest.mark.parametrize("bundle", [TINY_BUNDLE, default_bundle_path()], ids=lambda path: path.name)
def test_a_text_computes_the_same_bits_whoever_comes_and_goes(bundle: Path) -> None:
    session = Graph.open(Bundle.read(bundle), device="cpu", threads=1).session()

    def logits_of(neighbours: list[int]) -> list[np.ndarray]:
        batch = session.empty_batch(6)
        row = admitted(session, batch, PROMPT)
        others = [admitted(session, batch, PROMPT[:length]) for length in neighbours]
        found = []
        for token in (5, 6, 7, 8, 9, 10):
            ids = [token if at == row else IDLE_TOKEN for at in range(1 + max([row, *others]))]
            found.append(batch.step(ids)[row].copy())
            if others:
                batch.leave(others.pop(0))
        return found

    expected = logits_of([])
    for neighbours in ([3], [2, 9], [4, 4, 4], [2, 3, 4, 5, 6]):
        assert all(map(np.array_equal, logits_of(neighbours), expected)), neighbours


def test_a_batch_invariant_session_computes_what_a_batch_computes(tiny: Session) -> None:
    session = Graph.open(tiny.bundle, device="cpu", threads=1, batch_invariant=True).session()
    tiny.reset()
    tiny.step(PROMPT)
    prefix = tiny.remembered(4)
    batch = tiny.batch(2, 64)
    session.step(PROMPT)
    tokens = [5, 250, 9, 9, 17]
    expected = [batch.step([token, 1])[0].copy() for token in tokens]
    assert all(np.array_equal(session.step([token]), row) for token, row in zip(tokens, expected, strict=True))
    session.begin_after(prefix)
    session.step(PROMPT[4:])
    assert session.position == 5
    assert all(np.array_equal(session.step([token]), row) for token, row in zip(tokens, expected, strict=True))


def test_limits(tiny: Session) -> None:
    tiny.reset()
    tiny.step(PROMPT)
    with pytest.raises(ContextError, match="room for 8 tokens cannot take over 9"):
        tiny.batch(2, 8)
    full = tiny.batch(2, 9)
    with pytest.raises(ContextError, match="room for 9 tokens, and all are used"):
        full.step([1, 2])
    batch = tiny.batch(2, 10)
    with pytest.raises(PromptError, match="a batch of 2 rows takes that many token ids"):
        batch.step([1, 2, 3])
    batch.step([1, 2])
    with pytest.raises(ContextError, match="room for 10 tokens, and all are used"):
        batch.step([1, 2])


@pytest.mark.parametrize("ids", [[5, 99_999], [5, -1]])
def test_unknown_ids_are_refused(ids: list[int]) -> None:
    session = Graph.open(Bundle.read(TINY_BUNDLE), device="cpu", threads=1).session()
    session.step([1, 2])
    batch = session.batch(2, 10)
    with pytest.raises(PromptError, match="is out of range: this model knows 0 to 299"):
        batch.step(ids)
    assert batch.position == 2
