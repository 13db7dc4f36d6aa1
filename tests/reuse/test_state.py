"""A saved prompt gives what a computed prompt gives, or is refused in one sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgelm
from edgelm import Model, PromptError, StateError
from edgelm.bundle.folder import default_bundle_path
from edgelm.reuse.state import PromptState, most_shared
from tests.conftest import TINY_BUNDLE, RunCommand
from tests.reuse.kv_files import Damage, facts_changed, header_changed, saved_again

PROMPT = list(range(20, 50))


@pytest.fixture
def model() -> Model:
    return edgelm.load(TINY_BUNDLE, device="cpu", threads=1)


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    model.save_state(tmp_path / "state", PROMPT)
    return tmp_path / "state"


@pytest.mark.parametrize("bundle", [TINY_BUNDLE, default_bundle_path()])
def test_a_restored_state_changes_no_bit(bundle: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "logprobs": 3, "do_sample": False}
    first, second, third = (edgelm.load(bundle, device="cpu", threads=1) for _ in range(3))
    first.save_state(tmp_path / "state", PROMPT)
    assert second.load_state(tmp_path / "state").ids == tuple(PROMPT)
    for prompt, reused in [([*PROMPT, 7, 8], 30), (PROMPT, 28), ([*PROMPT[:12], 5, 6, 7], 12), ([9, 8, 7], 0)]:
        third.forget()
        completion = second.generate(prompt, **options)
        assert completion.stats.reused_tokens == reused
        assert completion.choices == third.generate(prompt, **options).choices
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_state_serves_every_session_until_it_is_forgotten(model: Model, saved: Path) -> None:
    model.load_state(saved)
    streams = [model.stream([*PROMPT, 60 + i, 61], max_new_tokens=4) for i in range(3)]
    for stream in streams:
        next(stream)
    assert [list(stream)[-1].stats.reused_tokens for stream in streams] == [30, 30, 30]  # type: ignore[union-attr]
    model.forget()
    assert model.generate(PROMPT, max_new_tokens=2).stats.reused_tokens == 0


def test_batches_start_from_it_too(model: Model, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[*PROMPT, 7, 8, 9], [1, 2, 3], [*PROMPT[:20], 4, 5]]
    expected = [completion.choices for completion in model.generate_batch(prompts, max_new_tokens=4, logprobs=1)]
    computed: list[int] = []
    step = edgelm.Session.step

    def counted(session: edgelm.Session, ids: Any, **options: Any) -> Any:
        computed.append(len(ids))
        return step(session, ids, **options)

    monkeypatch.setattr(edgelm.Session, "step", counted)
    model.load_state(saved)
    completions = model.generate_batch(prompts, max_new_tokens=4, logprobs=1)
    assert [completion.choices for completion in completions] == expected
    assert computed == [3, 3, 2]


def test_float16_is_half_as_large(model: Model, saved: Path, tmp_path: Path) -> None:
    model.save_state(tmp_path / "half", PROMPT, dtype="float16")
    assert 0.4 < (tmp_path / "half").stat().st_size / saved.stat().st_size < 0.6
    half, whole = model.load_state(tmp_path / "half").content, model.load_state(saved).content
    assert np.allclose(half, whole, atol=1e-2) and not np.array_equal(half, whole)
    assert model.generate([*PROMPT, 1, 2], max_new_tokens=2).stats.reused_tokens == 30


def test_a_state_is_replaced_whole_or_not_at_all(model: Model, saved: Path) -> None:
    content = saved.read_bytes()
    with pytest.raises(PromptError):
        model.save_state(saved, [1, 999])
    with pytest.raises(OSError):
        model.save_state(saved / "below" / "a file", PROMPT)
    assert saved.read_bytes() == content
    model.save_state(saved, [*PROMPT, 3])
    assert len(model.load_state(saved).ids) == 31


def of_tokens(content: bytes, tokens: int) -> bytes:
    """A state of the same bundle with another number of tokens."""
    ids, keys_values = np.zeros(tokens, np.uint32), np.zeros((4, 4, tokens, 8), np.float32)
    return saved_again(content, lambda _: {"token_ids": ids, "keys_values": keys_values})


def with_highest_id(content: bytes, highest: int) -> bytes:
    """The file with another id in the place of its largest."""
    return saved_again(content, lambda t: t | {"token_ids": np.where(t["token_ids"] == 49, highest, t["token_ids"])})


def test_the_last_id_of_the_vocabulary_is_one(model: Model, saved: Path) -> None:
    saved.write_bytes(with_highest_id(saved.read_bytes(), 299))
    assert max(model.load_state(saved).ids) == model.session.vocab_size - 1 == 299


def test_the_state_that_shares_most(model: Model) -> None:
    content = np.arange(4 * 4 * 6 * 8, dtype=np.float32).reshape(4, 4, 6, 8)
    short, long = PromptState((1, 2, 3), content[:, :, :3]), PromptState((1, 2, 3, 4, 5, 6), content)
    for prompt, states, count in [
        ([1, 2, 3, 4, 9, 9, 9], [short, long], 4),
        ([1, 2, 3, 4, 5, 6, 7, 8], [long, short], 6),
        ([1, 2, 3, 4, 9, 9, 9], [short], 3),
    ]:
        kept, shared = most_shared(states, prompt)
        assert shared == count and kept is not None and np.array_equal(kept, content[:, :, :count])
    assert most_shared([short, long], [9, 9, 9, 9]) == (None, 0)
    assert most_shared([], [1, 2, 3]) == (None, 0)


def test_a_state_may_fill_the_context(model: Model, saved: Path) -> None:
    saved.write_bytes(of_tokens(saved.read_bytes(), 64))
    assert len(model.load_state(saved).ids) == model.session.context_length == 64


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: b"", "it is no state of a prompt"),
        (lambda c: c[:8] + b"PK" + c[10:], "it is no state of a prompt"),
        (lambda c: c[:2] + b"\x01" + c[3:], "its header is damaged"),
        (lambda c: c[:20], "its header is not"),
        (lambda c: c[:-1], "its tensors do not fit the file"),
        (lambda c: c + b"x", "its tensors do not fit the file"),
        (lambda c: c[:-5] + b"\x01" + c[-4:], "its content is damaged"),
        (lambda c: facts_changed(c, made_for="0" * 64), "it was made with another bundle"),
        (lambda c: facts_changed(c, prefix="0" * 64), "it was made with another prefix, or with none"),
        (lambda c: header_changed(c, "keys_values", shape=[4, 4, 31, 8]), "its header describes other tensors"),
        (lambda c: of_tokens(c, 65), "more than the context of 64 holds"),
        (lambda c: of_tokens(c, 0), "its header keys_values"),
        (lambda c: header_changed(c, "keys_values", dtype="F64"), r"its header keys_values\.dtype"),
        (lambda c: saved_again(c, lambda t: t | {"keys_values": t["keys_values"][:2]}), "this bundle's sizes"),
        (lambda c: with_highest_id(c, 300), "outside the vocabulary"),
        (lambda c: facts_changed(c, format_version=2), "this edgelm reads 1"),
        (lambda c: facts_changed(c, more=1), "its header"),
    ],
)
def test_damaged_files_are_refused(model: Model, saved: Path, damage: Damage, words: str) -> None:
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(StateError, match=words) as refused:
        model.load_state(saved)
    assert str(saved) in str(refused.value) and "\n" not in str(refused.value)


def test_missing_files_are_refused(model: Model, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, "a\0b"):
        with pytest.raises(StateError, match=r"cannot (read|use) the state"):
            model.load_state(path)


def test_the_command_creates_extends_and_keeps(edgelm_command: RunCommand, tmp_path: Path) -> None:
    def run(prompt: str) -> tuple[str, str, int]:
        done = edgelm_command("run", "--greedy", "-n", "6", "--stats", "--state", "kept", prompt)
        assert done.status == 0, done.stderr
        plain = edgelm_command("run", "--greedy", "-n", "6", prompt)
        assert done.stdout == plain.stdout
        return done.stdout, done.stderr, (tmp_path / "kept").stat().st_size

    _, said, size = run("Once upon a time there was a girl")
    assert "reused" not in said
    _, said, longer = run("Once upon a time there was a girl who had a dog")
    assert "reused" in said and longer > size
    _, said, same = run("Once upon a time there was a girl")
    assert "reused" in said and same == longer
    _, said, same = run("Once upon a time there was no king")
    assert "reused" in said and "does not continue the text in 'kept'" in said and same == longer
    (tmp_path / "kept").write_bytes(b"x")
    refused = edgelm_command("run", "--state", "kept", "Hi")
    assert refused.status == 1 and "it is no state of a prompt" in refused.one_line()


def test_a_prompt_that_was_cut_has_no_state(edgelm_command: RunCommand, tmp_path: Path) -> None:
    long = "Once upon a time there was a dog. " * 100 + "One"
    done = edgelm_command("run", "-n", "2", "--context-overflow", "truncate", "--state", "kept", long)
    assert (
        done.status == 0 and done.stderr == "edgelm: the prompt is longer than the context, so its state is not kept\n"
    )
    assert not (tmp_path / "kept").exists()
