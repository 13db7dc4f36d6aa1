"""The same request gives the same numbers, bit for bit, whatever happens around it: DESIGN's promise, recipe by recipe.

One-token steps are in it where a session is batch invariant, whatever the batch. A prompt taken one token at a time is
not: one token has another kernel of attention than several (docs/quality.md has how often that matters).
"""

from typing import get_args

import numpy as np
import pytest

from edgelm.bundle.manifest import FixedPrecision
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.loop import generate
from edgelm.decoding.request import Step
from edgelm.decoding.scheduler import Scheduler, Turn
from edgelm.engine.session import Session
from edgelm.loading import load
from tests.against_transformers.test_variants import QUANTIZED_SHAPES
from tests.export.checkpoints import Ids, Logits, Shape, Tiny, TinyExport

pytestmark = pytest.mark.export


@pytest.fixture(scope="module", params=QUANTIZED_SHAPES, ids=lambda shape: shape.name)
def shape(request: pytest.FixtureRequest) -> Shape:
    actual: Shape = request.param
    return actual


TWO_STAGES, INT8_CACHE = "a head of two stages", "a cache of 8 bits"
RECIPES = get_args(FixedPrecision)
CASES: list[tuple[Shape, str]] = [  # every shape with half of the recipes, and every recipe with half of the shapes
    *((shape, recipe) for at, shape in enumerate(QUANTIZED_SHAPES) for recipe in RECIPES[at % 2 :: 2]),
    (Shape(width=36, heads=3), TWO_STAGES),  # no block divides the width
    (Shape(width=36, heads=3), INT8_CACHE),
    (Shape(family="llama", heads=4, kv_heads=2), INT8_CACHE),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def tiny(request: pytest.FixtureRequest, tiny_export: TinyExport) -> Tiny:
    """Bundles of every recipe and of every hard shape, one whose head has two stages, and two with an int8 cache."""
    shape, recipe = request.param
    if recipe == TWO_STAGES:
        return tiny_export(shape, "int4", two_stage_head=True)
    return tiny_export(shape, "int8", int8_cache=True) if recipe == INT8_CACHE else tiny_export(shape, recipe)


def chunkings(length: int, threads: int) -> list[list[int]]:
    """Places to cut a text into pieces of 2, of 3 and 7, or of random lengths of at least 2.

    Threads take turns on the one CPU of a process of tests, so several threads get the first and the last of them.
    """
    rng = np.random.default_rng(0)
    cuts_of_texts: list[list[int]] = [[]]
    for low, high in [(2, 3), (3, 4), (7, 8), (2, 4), (2, 9), (2, 30)]:
        cuts, at = [], 0
        while (at := at + int(rng.integers(low, high))) <= length - 2:
            cuts.append(at)
        cuts_of_texts.append(cuts)
    return cuts_of_texts if threads == 1 else [cuts_of_texts[0], cuts_of_texts[-1]]


def remembered(session: Session) -> list[Logits]:
    """The keys and values of every layer up to the position."""
    return [value.numpy()[:, :, : session.position].copy() for value in session._cache.values]


def test_chunks_and_threads_change_no_bit(tiny: Tiny) -> None:
    """Neither the next token's logits nor the cache depends on how a text is cut."""
    sessions = {threads: tiny.session(threads) for threads in (1, 2)}
    for length in (3, tiny.shape.context - 1, tiny.shape.context):
        ids = tiny.text()[:length]
        sessions[1].reset()
        logits, cache = sessions[1].step(ids), remembered(sessions[1])
        for threads, session in sessions.items():
            for cuts in chunkings(length, threads):
                where = f"{length} tokens, {threads} threads, cut at {cuts}"
                session.reset()
                actual = [session.step(piece) for piece in np.split(ids, cuts)][-1]
                assert np.array_equal(actual, logits), where
                assert all(map(np.array_equal, remembered(session), cache)), where


def test_chunks_and_threads_change_no_bit_of_scores(tiny: Tiny) -> None:
    ids = tiny.text()
    whole = tiny.session().score(ids)
    for threads in (1, 2):
        session = tiny.session(threads)
        for cuts in chunkings(len(ids), threads):
            session.reset()
            pieces = np.concatenate([session.score(piece) for piece in np.split(ids, cuts)])
            assert np.array_equal(pieces, whole), cuts


def test_a_rewound_cache_is_as_good_as_new(tiny: Tiny) -> None:
    """A session that is rewound to a prefix of its text computes what a new session computes."""
    ids, other = tiny.text(), tiny.text(1)
    session = tiny.session()
    expected, cache = session.step(ids), remembered(session)
    for kept in sorted({0, 2, 3, len(ids) // 2, len(ids) - 2}):
        session.rewind(session.position - kept)
        session.step(other[kept:])
        session.rewind(session.position - kept)
        assert np.array_equal(session.step(ids[kept:]), expected), kept
        assert all(map(np.array_equal, remembered(session), cache)), kept


def test_interleaved_sessions_do_not_disturb_each_other(tiny: Tiny) -> None:
    mine, other = tiny.session(), tiny.session().sibling()
    siblings = [mine, mine.sibling(), mine.sibling()]
    texts: list[Ids] = [tiny.text(seed) for seed in range(3)]
    alone = [np.stack([other.step(piece) for piece in _fed(other, ids)]) for ids in texts]
    together: list[list[Logits]] = [[], [], []]
    for pieces in zip(*(_fed(session, ids) for session, ids in zip(siblings, texts, strict=True)), strict=True):
        for actual, session, piece in zip(together, siblings, pieces, strict=True):
            actual.append(session.step(piece))
    for actual, expected in zip(together, alone, strict=True):
        assert np.array_equal(np.stack(actual), expected)


def _fed(session: Session, ids: Ids) -> list[Ids]:
    """Feed a prompt and then single tokens into an emptied cache."""
    session.reset()
    half = len(ids) // 2
    return [ids[:half], *(ids[at : at + 1] for at in range(half, len(ids)))]


def test_a_row_of_a_batch_does_not_depend_on_its_neighbours(tiny: Tiny) -> None:
    """In fp32, and where the session is batch invariant, a row is also the same alone: docs/decisions.md, Batches."""
    half = tiny.shape.context // 2
    texts = [tiny.text(seed)[: half + 1 - seed] for seed in range(6)]
    greedy = GenerationConfig(max_new_tokens=half - 2, logprobs=2)

    def steps_of_first(neighbours: int, rows: int, threads: int = 1) -> list[Step]:
        scheduler, actual = Scheduler(tiny.session(threads), max_rows=rows), list[Step]()
        first = scheduler.submit(texts[0].tolist(), greedy, 0)
        for seed in range(1, 1 + neighbours):
            scheduler.submit(texts[seed].tolist(), GenerationConfig(max_new_tokens=3 * seed), 0)
        while scheduler.pending:
            actual += [turn.step for turn in scheduler.step() if turn.handle == first and turn.step is not None]
        return actual

    expected = steps_of_first(0, 1)
    assert len(expected) == half - 1
    for neighbours, rows in [(1, 2), (2, 3), (3, 4), (5, 6), (5, 2)]:
        assert steps_of_first(neighbours, rows) == expected, (neighbours, rows)
    assert steps_of_first(5, 6, threads=2) == expected
    invariant = [tiny.session(threads, batch_invariant=True) for threads in (1, 2)]
    for session in invariant if tiny.exported.bundle.manifest.recipe.name != "fp32" else [tiny.session(), *invariant]:
        (single,) = (list(row) for row in generate(session, texts[0].tolist(), greedy, 0))
        assert single == expected


def test_prompts_computed_together_are_the_bits_of_each_alone(tiny: Tiny) -> None:
    half = tiny.shape.context // 2
    texts = [tiny.text(seed)[:length].tolist() for seed, length in enumerate((half, 2, half - 1, 3))]
    greedy = GenerationConfig(max_new_tokens=half - 2, logprobs=2)

    def steps(rows: int, threads: int) -> list[list[Step]]:
        scheduler = Scheduler(tiny.session(threads), max_rows=rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("edgelm.decoding.scheduler._TOKEN_COST", 0.0 if rows > 1 else 1.0)
            handles = [scheduler.submit(text, greedy, 0) for text in texts]
            turns = list[Turn]()
            while scheduler.pending:
                turns += scheduler.step()
        return [[turn.step for turn in turns if turn.handle == handle and turn.step] for handle in handles]

    expected = steps(1, 1)
    assert [steps(4, 1), steps(4, 2), steps(2, 1)] == [expected] * 3


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_rows_of_beams_equal_single_runs_where_the_session_is_batch_invariant(rows: int, tiny: Tiny) -> None:
    session, text = tiny.session(batch_invariant=True), tiny.text()
    prompt, tokens = text[:4], np.stack([tiny.text(seed)[4:10] for seed in range(rows)], axis=1)  # (6, rows)
    alone, caches = [], []
    for row in range(rows):
        session.reset()
        session.step(prompt)
        alone.append(np.stack([session.step(token) for token in tokens[:, row : row + 1]]))
        caches.append([value[0] for value in remembered(session)])
    session.reset()
    session.step(prompt)
    batch = session.batch(rows, 16)
    assert np.array_equal(np.stack([batch.step(ids).copy() for ids in tokens], axis=1), alone)
    for row, cache in enumerate(caches):
        held = [value.numpy()[row, :, : batch.position] for value in batch._cache.values]
        assert all(map(np.array_equal, held, cache))


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_w8a8_rows_equal_single_runs_but_for_the_last_bits_of_the_head(
    rows: int, shape: Shape, tiny_export: TinyExport
) -> None:
    """A token's scale depends on that token alone; the head uses a different kernel for pairs of rows."""
    tiny = tiny_export(shape, "w8a8")
    session, text = tiny.session(), tiny.text()
    prompt, tokens = text[:4], np.stack([tiny.text(seed)[4:10] for seed in range(rows)], axis=1)  # (6, rows)
    alone = []
    for row in range(rows):
        session.reset()
        session.step(prompt)
        alone.append(np.stack([session.step(token) for token in tokens[:, row : row + 1]]))
    cache = remembered(session)  # of the last row alone
    session.reset()
    session.step(prompt)
    batch = session.batch(rows, 16)
    for step, ids in enumerate(tokens):
        actual = batch.step(ids)
        for row in range(rows):
            assert np.abs(actual[row] - alone[row][step]).max() <= 5e-5
    for value, single in zip(batch._cache.values, cache, strict=True):
        assert np.array_equal(value.numpy()[rows - 1, :, : batch.position], single[0])


def test_interleaved_streams_give_the_text_they_give_alone(tiny: Tiny) -> None:
    model = load(tiny.exported.bundle.path, device="cpu", threads=1)
    prompts = [tiny.text(seed)[:4].tolist() for seed in range(2)]

    def stream(prompt: list[int], seed: int) -> "list[int]":
        chunks = model.stream(prompt, max_new_tokens=4, do_sample=True, seed=seed, eos_token_id=())
        return [token for chunk in chunks for token in chunk.token_ids]

    alone = [stream(prompt, seed) for seed, prompt in enumerate(prompts)]
    open_streams = [
        model.stream(prompt, max_new_tokens=4, do_sample=True, seed=seed, eos_token_id=())
        for seed, prompt in enumerate(prompts)
    ]
    together: list[list[int]] = [[], []]
    live = [0, 1]
    while live:
        for index in list(live):
            chunk = next(open_streams[index], None)
            if chunk is None:
                live.remove(index)
            else:
                together[index] += chunk.token_ids
    assert together == alone
