"""A prefix precedes every prompt. A baked text acts like the same text in the prompt; a learned prefix has no ids."""

import json
import os
import pickle
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import edgelm
from edgelm import Bundle, BundleError, ClosedError, ContextError, Model, PrefixError, PromptError, Session, StateError
from edgelm.bundle.folder import default_bundle_path, file_fact
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.scheduler import Scheduler
from edgelm.reuse.prefix import Prefix, PromptEncoder, _padded_heads, bake, read_prefix, write_learned_prefix
from edgelm.text.tokenizer import Tokenizer
from tests.conftest import TINY_BUNDLE, RunCommand, edit_manifest
from tests.reuse.kv_files import Damage, facts_changed, header_changed, saved_again

TINY_TEXT = "The cat sat on the mat. "
STORY = "Once upon a time there was a dog named Rex. Rex had a friend.\n\n"
BUNDLES = [(TINY_BUNDLE, TINY_TEXT), (default_bundle_path(), STORY)]
BODY = "ab" * 32

Pair = tuple[Model, Model, str]


def loaded(bundle: Path = TINY_BUNDLE, **options: Any) -> Model:
    return edgelm.load(bundle, device="cpu", threads=1, **options)


@pytest.fixture(params=BUNDLES, ids=["tiny-fp32", "stories-int8"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    """A model, the same model with a text as its prefix, and the text."""
    bundle, text = request.param
    plain = loaded(bundle)
    plain.save_prefix(tmp_path / "task.prefix", text)
    return plain, loaded(bundle, prefix=tmp_path / "task.prefix"), text


@pytest.fixture
def tiny(tmp_path: Path) -> Pair:
    plain = loaded()
    plain.save_prefix(tmp_path / "task.prefix", TINY_TEXT)
    return plain, loaded(prefix=tmp_path / "task.prefix"), TINY_TEXT


@pytest.fixture
def learned(tiny_copy: Path, tiny: Pair, tmp_path: Path) -> Pair:
    """The keys and values of a text in a file that says they are learned, so that their effect is known."""
    plain, baked, text = tiny
    assert baked.prefix is not None
    edit_manifest(tiny_copy, lambda m: m["source"].update(body_sha256=BODY))
    write_learned_prefix(tmp_path / "l.prefix", baked.prefix.content, source="tiny-gpt2", body_sha256=BODY)
    return plain, loaded(tiny_copy, prefix=tmp_path / "l.prefix"), text


def test_what_it_says_about_itself(tiny: Pair) -> None:
    plain, model, text = tiny
    assert model.prefix is not None and plain.prefix is None
    assert model.prefix.text == text and list(model.prefix.ids) == model.tokenizer.encode(text)
    assert model.session.context_length == 64 - model.prefix.tokens and model.session.position == 0


OPTIONS: list[dict[str, Any]] = [
    {"do_sample": False, "logprobs": 2},
    {"do_sample": True, "seed": 3, "repetition_penalty": 1.4, "num_return_sequences": 2},
    {"do_sample": False, "no_repeat_ngram_size": 2, "frequency_penalty": 0.5, "dry_multiplier": 0.8},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"prompt_lookup_num_tokens": 4, "do_sample": False},
    {"context_overflow": "window", "do_sample": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_a_text_is_the_same_text_before_the_prompt(pair: Pair, options: dict[str, Any]) -> None:
    """Bit for bit, also with prompts of a single token and with tokens that reach over the border."""
    plain, model, text = pair
    for prompt in ["The dog ran", "x", " and", "\n", "naïve ☕"]:
        plain.forget()
        expected = plain.generate(text + prompt, max_new_tokens=12, **options)
        for _ in range(2):  # the second time the session holds the prompt too
            completion = model.generate(prompt, max_new_tokens=12, **options)
            assert completion.choices == expected.choices
            assert completion.prompt == prompt


def test_prompts_of_ids_follow_its_ids(tiny: Pair) -> None:
    plain, model, _ = tiny
    assert model.prefix is not None
    for prompt in ([7, 8, 9], [5]):
        completion = model.generate(prompt, max_new_tokens=8, do_sample=False)
        expected = plain.generate([*model.prefix.ids, *prompt], max_new_tokens=8, do_sample=False)
        assert completion.choices == expected.choices and completion.prompt == model.tokenizer.decode(prompt)


def test_it_is_never_computed(tiny: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, _ = tiny
    assert model.prefix is not None
    counts: list[int] = []
    step = Session.step

    def counted(session: Session, ids: Any, **options: Any) -> Any:
        counts.append(len(ids))
        return step(session, ids, **options)

    monkeypatch.setattr(Session, "step", counted)
    prompt = list(range(30, 40))
    for run in (
        lambda: model.generate(prompt, max_new_tokens=1),
        lambda: model.generate(prompt, max_new_tokens=1, context_overflow="window"),
        lambda: model.generate_batch([prompt], max_new_tokens=1),
        lambda: model.score(prompt, [1]),
        lambda: model.choose(prompt, [[1], [2]]),
    ):
        model.forget()
        run()
        assert counts == [10]
        counts.clear()


def test_stats_count_it_by_itself(tiny: Pair) -> None:
    _, model, _ = tiny
    assert model.prefix is not None
    first = model.generate([5, 6, 7, 8, 9], max_new_tokens=2).stats
    again = model.generate([5, 6, 7, 8, 9], max_new_tokens=2).stats
    batch = model.generate_batch([[5, 6, 7]], max_new_tokens=2)[0].stats
    one = model.generate([5], max_new_tokens=2).stats
    assert [s.prefix_tokens for s in (first, again, batch, one)] == [model.prefix.tokens] * 4
    assert [s.prompt_tokens for s in (first, again, batch, one)] == [5, 5, 3, 1]
    assert [s.reused_tokens for s in (first, again, batch, one)] == [0, 3, 0, 0]


def test_lengths_leave_it_out_and_the_context_does_not(tiny: Pair) -> None:
    _, model, _ = tiny
    assert model.prefix is not None
    room = 64 - model.prefix.tokens
    completion = model.generate([5, 6, 7], max_length=10, min_length=9, do_sample=False).choices[0]
    assert (len(completion.token_ids), completion.finish_reason) == (7, "length")
    with pytest.raises(edgelm.ConfigError, match="max_length is 3 but the prompt already has 3 tokens"):
        model.generate([5, 6, 7], max_length=3)
    full = model.generate([5, 6, 7], max_new_tokens=100, do_sample=False, eos_token_id=()).choices[0]
    assert (len(full.token_ids), full.finish_reason) == (room + 1 - 3, "context")
    for call in (model.generate, lambda p: model.generate_batch([p])):
        with pytest.raises(ContextError, match=f"behind its prefix of {model.prefix.tokens} .* holds {room}"):
            call([5] * (room + 1))


def test_long_texts_keep_it(tiny: Pair) -> None:
    plain, model, text = tiny
    assert model.prefix is not None
    tokens = model.prefix.tokens
    long = [5 + i % 200 for i in range(90)]
    options: dict[str, Any] = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": ()}
    window: dict[str, Any] = {"context_overflow": "window"}
    completion = model.generate("The dog", **options, **window)
    prefix_ids = completion.stats.prefix_tokens  # its last space belongs to the word that follows
    assert completion.choices == plain.generate(f"{text}The dog", **options, **window, pinned_tokens=prefix_ids).choices
    truncate: dict[str, Any] = {"context_overflow": "truncate", "max_new_tokens": 10}
    for more, pinned in ((window, {"pinned_tokens": tokens}), (truncate, {})):
        cut = model.generate(long, **(options | more))
        assert cut.stats.dropped_tokens + cut.stats.prompt_tokens == 90 and cut.stats.prompt_tokens + tokens <= 64
        whole = [*model.prefix.ids, *long[cut.stats.dropped_tokens :]]
        assert cut.choices == plain.generate(whole, **(options | more | pinned)).choices
    batch = model.generate_batch([long], max_new_tokens=10, do_sample=False, context_overflow="truncate")[0]
    alone = model.generate(long, max_new_tokens=10, do_sample=False, context_overflow="truncate")
    assert batch.choices == alone.choices
    first_four = model.generate(long, **(options | window), pinned_tokens=4)
    assert first_four.stats.dropped_tokens == 90 - (64 - tokens)


def test_batches_and_the_scheduler(pair: Pair) -> None:
    plain, model, text = pair
    prompts = ["The dog", "a", "One day Rex"]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "seed": 5, "logprobs": 1}
    expected = plain.generate_batch([text + prompt for prompt in prompts], **options)
    assert [c.choices for c in model.generate_batch(prompts, **options)] == [c.choices for c in expected]
    ids = model.tokenizer.encode("One day Rex")
    scheduler = Scheduler(model.session.sibling(), max_rows=2)
    config = GenerationConfig().updated({"max_new_tokens": 8, "eos_token_id": ()})
    handles = [scheduler.submit(ids, config, 0), scheduler.submit([5, 6], config, 0)]
    got: dict[int, list[int]] = {handle: [] for handle in handles}
    while scheduler.pending:
        for turn in scheduler.step():
            if turn.step is not None and turn.step.token_id is not None:
                got[turn.handle].append(turn.step.token_id)
    alone = model.generate_batch([ids, [5, 6]], max_new_tokens=8, eos_token_id=(), do_sample=False)
    assert [tuple(got[handle]) for handle in handles] == [c.choices[0].token_ids for c in alone]


def test_scores_are_those_behind_the_text(pair: Pair) -> None:
    plain, model, text = pair
    assert model.score("The dog", " ran away") == plain.score(f"{text}The dog", " ran away")
    assert model.score("x", "y") == plain.score(f"{text}x", "y")
    options = [" ran", " sat down", "s"]
    assert model.choose("The dog", options) == plain.choose(f"{text}The dog", options)
    completion = model.choose("The dog", options, calibrate="It", length_normalization="token")
    assert completion == plain.choose(f"{text}The dog", options, calibrate=f"{text}It", length_normalization="token")
    assert model.generate("The dog", max_new_tokens=4, do_sample=False).choices  # the pool's sessions are as before


def test_perplexity_of_a_text_behind_it(tiny: Pair) -> None:
    plain, model, _ = tiny
    ids = [40, 41, 42, 43, 44, 45]
    assert model.prefix is not None
    completion = model.perplexity(ids)
    scored = plain.score([*model.prefix.ids, ids[0]], ids[1:])
    assert completion.tokens == 5 and completion.value == pytest.approx(np.exp(-scored.logprob / 5))
    many = list(range(5, 205))
    assert model.perplexity(many).value != plain.perplexity(many).value


def test_embeddings_are_of_the_text_alone(tiny: Pair) -> None:
    plain, model, _ = tiny
    assert model.prefix is not None
    session = plain.session
    _, hidden = session.step_hidden([*model.prefix.ids, 7, 8, 9])
    session.reset()
    assert np.array_equal(model.embed([7, 8, 9], pooling="last"), hidden[-1])
    assert np.allclose(model.embed([7, 8, 9]), hidden[-3:].mean(axis=0), atol=1e-5)
    assert model.embed([7]).shape == hidden[-1].shape


def test_states_go_on_from_it(tiny: Pair, tmp_path: Path) -> None:
    plain, model, text = tiny
    model.save_state(tmp_path / "state", "The dog ran")
    other = loaded(prefix=model.prefix.path if model.prefix else None)
    other.load_state(tmp_path / "state")
    completion = other.generate("The dog ran on", max_new_tokens=6, do_sample=False)
    assert completion.stats.reused_tokens > 0
    assert completion.choices == plain.generate(f"{text}The dog ran on", max_new_tokens=6, do_sample=False).choices
    other.forget()
    assert other.generate("The dog ran on", max_new_tokens=6, do_sample=False).choices == completion.choices
    plain.load_state(tmp_path / "state")  # it is a state of the text and the prompt, wherever the text comes from
    assert plain.generate(f"{text}The dog ran on", max_new_tokens=6, do_sample=False).choices == completion.choices


def test_drafts_come_from_it_too(tmp_path: Path) -> None:
    plain = loaded()
    prompt = plain.tokenizer.encode("the mat and the")
    answer = plain.generate(prompt, max_new_tokens=20, do_sample=False).choices[0].token_ids
    plain.save_prefix(tmp_path / "p", plain.tokenizer.decode(answer))
    model = loaded(prefix=tmp_path / "p")
    completion = model.generate(list(answer[:3]), max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4)
    assert completion.stats.drafted_tokens > 0


def generated(model: Model, prompt: str = "The dog") -> tuple[int, ...]:
    return model.generate(prompt, max_new_tokens=8, do_sample=False).choices[0].token_ids


@pytest.mark.parametrize("kind", ["tiny", "learned"])
def test_threads_pickles_and_streams(kind: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(kind)[1]
    expected = generated(model)
    results: list[tuple[int, ...]] = []
    threads = [threading.Thread(target=lambda: results.append(generated(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4
    assert generated(pickle.loads(pickle.dumps(model))) == expected
    chunks = list(model.stream("The dog", max_new_tokens=8, do_sample=False))
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected


def test_several_prefixes_on_one_graph(tiny: Pair, tmp_path: Path) -> None:
    plain, baked, _ = tiny
    alone = generated(plain)
    task = plain.with_prefix(tmp_path / "task.prefix")
    assert task.graph is plain.graph
    assert generated(task) == generated(baked)
    assert generated(pickle.loads(pickle.dumps(task))) == generated(baked)
    assert generated(plain) == alone
    task.close()
    assert task.closed
    assert generated(plain) == alone
    other = plain.with_prefix(tmp_path / "task.prefix", prefix_cache_bytes=10**6)
    plain.close()
    with pytest.raises(ClosedError):
        generated(other)
    with pytest.raises(ClosedError):
        plain.with_prefix(tmp_path / "task.prefix")
    with pytest.raises(PrefixError):
        baked.with_prefix(tmp_path / "missing")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kind", ["tiny", "learned"])
def test_a_forked_child_has_it(kind: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(kind)[1]
    expected = generated(model)
    child = os.fork()
    if child == 0:
        os._exit(0 if generated(model) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "seed": 4},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
        {"context_overflow": "window", "do_sample": False, "max_new_tokens": 90, "eos_token_id": ()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_learned_prefix_does_what_its_keys_and_values_do(learned: Pair, options: dict[str, Any]) -> None:
    plain, model, text = learned
    assert model.prefix is not None and (model.prefix.text, model.prefix.ids) == (None, ())
    ids, tokens = [9, 8, 7], model.prefix.tokens
    options = {"max_new_tokens": 10} | options
    more: dict[str, Any] = {"pinned_tokens": tokens} if "context_overflow" in options else {}
    expected = plain.generate([*plain.tokenizer.encode(text), *ids], **(options | more))
    completion = model.generate(ids, **options)
    assert completion.choices == expected.choices
    assert (completion.stats.prompt_tokens, completion.stats.prefix_tokens) == (3, tokens)
    assert model.generate(ids, **options).choices == expected.choices


def test_scores_batches_and_states_behind_a_learned_prefix(learned: Pair, tmp_path: Path) -> None:
    plain, model, text = learned
    prefix_ids = plain.tokenizer.encode(text)
    assert model.score([9, 8], [7, 6]).logprob == plain.score([*prefix_ids, 9, 8], [7, 6]).logprob
    assert model.choose([9, 8], [[7], [6]]).options == plain.choose([*prefix_ids, 9, 8], [[7], [6]]).options
    both = model.generate_batch([[9, 8, 7], [4, 5]], max_new_tokens=6, do_sample=False)
    expected = plain.generate_batch([[*prefix_ids, 9, 8, 7], [*prefix_ids, 4, 5]], max_new_tokens=6, do_sample=False)
    assert [c.choices for c in both] == [c.choices for c in expected]
    model.save_state(tmp_path / "state", [9, 8, 7, 6])
    model.forget()
    plain_completion = model.generate([9, 8, 7, 6, 5, 4], max_new_tokens=6, do_sample=False)
    model.forget()
    model.load_state(tmp_path / "state")
    completion = model.generate([9, 8, 7, 6, 5, 4], max_new_tokens=6, do_sample=False)
    assert completion.stats.reused_tokens == 4 and completion.choices == plain_completion.choices
    with pytest.raises(StateError, match="made with another prefix"):
        loaded(model.bundle.path).load_state(tmp_path / "state")
    with pytest.raises(ContextError, match="behind its prefix"):
        model.generate([5] * 60)
    model.save_prefix(tmp_path / "text.prefix", "The cat sat")  # as if there were no prefix
    assert generated(loaded(model.bundle.path, prefix=tmp_path / "text.prefix"), " on") == generated(
        loaded(), "The cat sat on"
    )
    assert model.generate([9, 8, 7, 6, 5, 4], max_new_tokens=6, do_sample=False).choices == plain_completion.choices


def test_float16_is_half_as_large(tiny: Pair, tmp_path: Path) -> None:
    plain, model, text = tiny
    assert model.prefix is not None
    plain.save_prefix(tmp_path / "half", text, dtype="float16")
    half = loaded(prefix=tmp_path / "half")
    assert half.prefix is not None
    assert 0.4 < (tmp_path / "half").stat().st_size / model.prefix.path.stat().st_size < 0.6
    assert np.allclose(half.prefix.content, model.prefix.content, atol=1e-2)
    assert generated(half)


@pytest.mark.parametrize(
    ("text", "words"), [("", "the prefix is empty"), ("T", "needs 2 tokens at least"), ("the cat " * 40, "at most")]
)
def test_texts_that_cannot_be_one(tiny: Pair, tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(PrefixError, match=words):
        tiny[0].save_prefix(tmp_path / "p", text)
    assert not (tmp_path / "p").exists()


def test_a_session_begins_behind_what_the_prompt_shares_with_it(tiny: Pair) -> None:
    plain, model, _ = tiny
    assert model.prefix is not None
    encoder, ids, session = PromptEncoder(plain.tokenizer, model.prefix), list(model.prefix.ids), plain.session
    for prompt, shared in [([*ids, 7, 8, 9], len(ids)), ([*ids[:5], 299, 298, 7], 5), (ids, len(ids) - 2)]:
        assert encoder.begin(session, prompt) == prompt[shared:]
        assert session.prefix is not None and session.prefix.shape[2] == shared
        assert (session.position, session.context_length) == (0, 64 - shared)
    for prompt in ([299, *ids], [ids[0], 299, 7, 8], ids[:3]):  # fewer than two tokens are shared, or none are left
        assert encoder.begin(session, prompt) == prompt
        assert (session.prefix, session.context_length) == (None, 64)


def test_a_learned_prefix_has_the_head_dim_of_the_checkpoint(learned: Pair, tmp_path: Path) -> None:
    """Heads of 6 are padded to 8 in this bundle's cache: zeros stand behind the learned numbers."""
    assert learned[1].prefix is not None
    content, bundle = learned[1].prefix.content[:, :, :3], learned[1].bundle.path
    edit_manifest(bundle, lambda m: m["architecture"].update(source_head_dim=6))
    for width in (6, 8):
        write_learned_prefix(tmp_path / f"{width}", content[..., :width], source="tiny-gpt2", body_sha256=BODY)
    prefix = read_prefix(tmp_path / "6", Bundle.read(bundle))
    assert np.array_equal(prefix.content[..., :6], content[..., :6])
    assert prefix.content.shape == (4, 4, 3, 8) and not prefix.content[..., 6:].any()
    with pytest.raises(PrefixError, match="a model of other sizes"):
        read_prefix(tmp_path / "8", Bundle.read(bundle))


def test_padded_heads_that_turn_by_hand() -> None:
    """Number i of a head of 6 turns with number i + 3, in a head of 8 with number i + 4; values do not turn."""
    head = np.arange(1, 7, dtype=np.float32)
    content = np.stack([head, 10 * head, 100 * head, 1000 * head]).reshape(4, 1, 1, 6)  # two layers
    keys, values = np.array([1, 2, 3, 0, 4, 5, 6, 0]), np.array([1, 2, 3, 4, 5, 6, 0, 0])
    turning = _padded_heads(content, 8, turns=True).reshape(4, 8)
    assert np.array_equal(turning, [keys, 10 * values, 100 * keys, 1000 * values])
    still = _padded_heads(content, 8, turns=False).reshape(4, 8)
    assert np.array_equal(still, [values, 10 * values, 100 * values, 1000 * values])
    assert _padded_heads(content, 6, turns=True) is content


def test_a_session_is_empty_after_it_computed_a_prefix(tiny: Pair, tmp_path: Path) -> None:
    with tiny[0]._sessions.borrowed() as (session, _):
        bake(session, tiny[0].tokenizer, TINY_TEXT, tmp_path / "again.prefix")
        assert session.position == 0


def test_an_empty_prompt_to_continue(tiny: Pair) -> None:
    plain, model, _ = tiny
    assert model.prefix is not None
    assert PromptEncoder(plain.tokenizer, model.prefix, 5).ids_to_continue("") == list(model.prefix.ids)
    assert PromptEncoder(plain.tokenizer, None, 5).ids_to_continue("") == [5]
    assert PromptEncoder(plain.tokenizer, None, 5).ids_to_continue("The") == plain.tokenizer.encode("The")
    with pytest.raises(PromptError, match="the prompt is empty"):
        PromptEncoder(plain.tokenizer).ids_to_continue("")


def of_tokens(content: bytes, tokens: int) -> bytes:
    """A prefix of the same bundle with another number of tokens."""
    ids, keys_values = np.zeros(tokens, np.uint32), np.zeros((4, 4, tokens, 8), np.float32)
    return saved_again(content, lambda t: t | {"token_ids": ids, "keys_values": keys_values})


def with_highest_id(content: bytes, highest: int) -> bytes:
    """The file with another id in the place of its largest."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        ids = tensors["token_ids"]
        return tensors | {"token_ids": np.where(ids == ids.max(), np.uint32(highest), ids)}

    return saved_again(content, change)


@pytest.mark.parametrize(
    "change", [lambda c: with_highest_id(c, 299), lambda c: of_tokens(c, 56), lambda c: of_tokens(c, 2)]
)
def test_the_largest_and_the_shortest_that_fit_are_taken(tiny: Pair, change: Damage) -> None:
    """The vocabulary ends with 299, and a context of 64 leaves 8 tokens beside a prefix of 56; 2 are enough."""
    assert tiny[1].prefix is not None
    path = tiny[1].prefix.path
    path.write_bytes(change(path.read_bytes()))
    with loaded(prefix=path) as model:
        assert model.generate([1, 2], max_new_tokens=1).stats.new_tokens == 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: b"", "it is no prefix file"),
        (lambda c: c[:8] + b"x" + c[9:], "it is no prefix file"),
        (lambda c: facts_changed(c, kind="state"), "it is no prefix file"),
        (lambda c: c[:2] + b"\x01" + c[3:], "its header is damaged"),
        (lambda c: c[:40], "its header is not"),
        (lambda c: c[:-1], "its tensors do not fit the file"),
        (lambda c: c + b"x", "its tensors do not fit the file"),
        (lambda c: c[:-200] + b"\x01" + c[-199:], "its content is damaged"),
        (lambda c: facts_changed(c, made_for="0" * 64), "computed with another bundle: make it again"),
        (
            lambda c: saved_again(c, lambda t: {"keys_values": t["keys_values"]}, kind="learned"),
            "it was learned with other weights",
        ),
        (lambda c: facts_changed(c, kind="other"), "its header kind"),
        (lambda c: saved_again(c, lambda t: t | {"keys_values": t["keys_values"][:, :3]}), "a model of other sizes"),
        (lambda c: with_highest_id(c, 300), "outside the vocabulary"),
        (lambda c: of_tokens(c, 57), "holds a prefix of 56 at most"),
        (lambda c: of_tokens(c, 1), "needs 2 tokens at least"),
        (lambda c: header_changed(c, "text", shape=[2**31 - 1]), "its tensors do not fit the file"),
        (lambda c: facts_changed(c, format_version=2), "this edgelm reads 1"),
        (lambda c: facts_changed(c, more=1), "its header"),
    ],
)
def test_damaged_files_are_refused(tiny: Pair, damage: Damage, words: str) -> None:
    assert tiny[1].prefix is not None
    path = tiny[1].prefix.path
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PrefixError, match=words) as refused:
        loaded(prefix=path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_others_and_missing_ones_are_refused(tiny: Pair, learned: Pair, tmp_path: Path) -> None:
    assert tiny[1].prefix is not None and learned[1].prefix is not None
    with pytest.raises(PrefixError, match="a model of other sizes"):
        loaded(default_bundle_path(), prefix=tiny[1].prefix.path)
    edit_manifest(learned[1].bundle.path, lambda m: m["source"].pop("body_sha256"))
    with pytest.raises(PrefixError, match="does not say which weights it was made of"):
        loaded(learned[1].bundle.path, prefix=learned[1].prefix.path)
    edit_manifest(learned[1].bundle.path, lambda m: m["source"].update(body_sha256="cd" * 32))
    with pytest.raises(PrefixError, match="learned with other weights"):
        loaded(learned[1].bundle.path, prefix=learned[1].prefix.path)
    for path in (tmp_path / "none", tmp_path, "a\0b"):
        with pytest.raises(PrefixError, match=r"cannot (read|use) the prefix"):
            loaded(prefix=path)
    for shape in ((3, 4, 2, 8), (4, 4, 0, 8), (4, 4, 8)):
        with pytest.raises(PrefixError, match="must be of shape"):
            write_learned_prefix(tmp_path / "x", np.zeros(shape, np.float32), source="a", body_sha256=BODY)
    with pytest.raises(PrefixError, match="does not fit into float16"):
        write_learned_prefix(
            tmp_path / "x", np.full((4, 4, 2, 8), 1e6, np.float32), source="a", body_sha256=BODY, dtype="float16"
        )
    assert not (tmp_path / "x").exists()


def add_file(bundle: Path, name: str, content: bytes) -> None:
    (bundle / name).write_bytes(content)
    fact = asdict(file_fact(bundle / name))
    edit_manifest(bundle, lambda m: m["files"].update({name: fact}))


def test_values_are_scaled_as_the_bundle_scales_its_own(learned: Pair) -> None:
    _, model, _ = learned
    assert model.prefix is not None
    bundle, path = model.bundle.path, model.prefix.path
    divisors = np.linspace(0.5, 2, 2 * 4 * 8).astype("<f4")

    def calibrated(m: dict[str, Any]) -> None:
        m["recipe"]["calibration_tokens"] = 100

    edit_manifest(bundle, calibrated)
    with pytest.raises(PrefixError, match="does not say how its values were scaled"):
        loaded(bundle, prefix=path)
    damaged = "is damaged"
    for content, words in [(divisors.tobytes(), ""), (divisors[1:].tobytes(), damaged), (b"\0" * 256, damaged)]:
        add_file(bundle, "value_divisors.bin", content)
        if words:
            with pytest.raises(PrefixError, match=words):
                loaded(bundle, prefix=path)
            continue
        scaled = loaded(bundle, prefix=path).prefix
        assert scaled is not None
        assert np.array_equal(scaled.content[::2], model.prefix.content[::2])
        assert np.allclose(scaled.content[1::2] * divisors.reshape(2, 4, 1, 8), model.prefix.content[1::2])


def add_to_bundle(bundle: Path, prefix: Path) -> None:
    add_file(bundle, "prefix.safetensors", prefix.read_bytes())
    edit_manifest(bundle, lambda m: m.update(required_features=["prefix"]))


def test_a_bundle_brings_its_own(tiny: Pair, tiny_copy: Path, tmp_path: Path) -> None:
    plain, model, text = tiny
    assert model.prefix is not None
    add_to_bundle(tiny_copy, model.prefix.path)
    baked = loaded(tiny_copy)
    assert baked.prefix is not None and baked.prefix.text == text
    assert generated(baked) == generated(model) == generated(plain, f"{text}The dog")
    assert generated(pickle.loads(pickle.dumps(baked))) == generated(baked)
    baked.save_prefix(tmp_path / "other", "and then the end")  # the graph is the same: so fits
    other = loaded(tiny_copy, prefix=tmp_path / "other")
    assert generated(other) == generated(plain, "and then the endThe dog")
    content = bytearray((tiny_copy / "prefix.safetensors").read_bytes())
    content[-3] ^= 1
    (tiny_copy / "prefix.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match=r"content of 'prefix\.safetensors' is not what"):
        loaded(tiny_copy)


def test_the_commands(edgelm_command: RunCommand, tmp_path: Path) -> None:
    text = "Tom likes Lily.\n\n"
    (tmp_path / "task.txt").write_bytes(text.encode())
    made = edgelm_command("bake", "task.txt", "-o", "task.prefix")
    assert made.status == 0 and made.stdout == ""
    options = ("--greedy", "-n", "8")
    completion = edgelm_command("run", *options, "--prefix", "task.prefix", "--stats", "Lily was")
    whole = edgelm_command("run", *options, f"{text}Lily was")
    assert (
        completion.status == 0 and text + completion.stdout == whole.stdout and completion.stderr.startswith("prefix ")
    )
    for name, *more in (("score", " ran"), ("choose", "-o", " ran", "-o", " sat")):
        behind = edgelm_command(name, "--prefix", "task.prefix", "Lily", *more)
        assert (behind.status, behind.stdout) == (0, edgelm_command(name, f"{text}Lily", *more).stdout)
    for name, *more in (("perplexity", "Lily ran to the park."), ("embed", "Lily")):
        behind, prefix_ids = edgelm_command(name, *more, "--prefix", "task.prefix"), edgelm_command(name, *more)
        assert behind.status == 0 and behind.stdout != prefix_ids.stdout
    for number in range(2):
        kept = edgelm_command("run", *options, "--prefix", "task.prefix", "--state", "kept", "--stats", "Lily was here")
        assert kept.status == 0 and ("reused" in kept.stderr) == bool(number)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    assert "is not UTF-8 text (byte 3)" in edgelm_command("bake", "latin.txt", "-o", "x").one_line()
    assert edgelm_command("run", "--prefix", "task.txt", "Hi").one_line().endswith("it is no prefix file")


def test_info_names_it_and_verify_measures_without_it(edgelm_command: RunCommand, tiny: Pair, tiny_copy: Path) -> None:
    assert tiny[1].prefix is not None
    add_to_bundle(tiny_copy, tiny[1].prefix.path)
    said = edgelm_command("info", str(tiny_copy)).stdout
    assert f"prefix        {tiny[1].prefix.tokens} tokens before every prompt, the text {json.dumps(TINY_TEXT)}" in said
    verified, plain = (edgelm_command("verify", str(folder), "--json") for folder in (tiny_copy, TINY_BUNDLE))
    assert verified.status == 0
    assert json.loads(verified.stdout)["measured"]["checks"] == json.loads(plain.stdout)["measured"]["checks"]


def test_of_a_prompt_at_least_one_token_is_not_the_prefixs() -> None:
    prefix = Prefix("x", (1, 2, 3), np.zeros((2, 1, 3, 8), np.float32), "ab" * 32, Path("x"))
    encoder = PromptEncoder(cast("Tokenizer", None), prefix)
    prompts = ([1, 2, 3, 4], [1, 2, 3], [1, 2], [1, 9], [9])
    assert [encoder.prefix_tokens(ids) for ids in prompts] == [3, 2, 1, 1, 0]
