"""Nothing but edgelm's own errors leaves the API, whatever values its options and arguments have."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgelm
from edgelm import Model
from edgelm.decoding.generation_config import OPTIONS, GenerationConfig
from edgelm.errors import ConfigError, EdgelmError, PromptError, shown
from tests.conftest import TINY_BUNDLE

few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


class Unprintable:
    """An object whose repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


SPECIAL: list[Any] = [
    *(10**400, -(10**400), 2**31, 2**63, 2**64, 10**5000, 0, -1, 1, True, False, None),
    *(float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, 0.5, 1j),
    *("", "a", "9" * 5000, "\0", "\ud800", "\x1b[31m", "never", "²", b"", b"a", bytearray(b"a")),
    *([], (), {}, set(), range(3), [[]], [None], [10**400], {"9" * 5000: 1.0}, {"1": 10**400}, {1: float("nan")}),
    *({(1, 2): 10**400}, [[1, 2], 3.0], [([1], float("inf"))], {None: 1}, {"²": 1.0}, [[10**5000]]),
    *(np.float32("nan"), np.int64(3), np.array([1, 2]), np.array(2.5), np.array([[1.5]]), np.array("a")),
    *(object(), Unprintable(), [Unprintable()], len, int, Path("a")),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
values = st.one_of(st.sampled_from(SPECIAL), JSON)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with edgelm.load(TINY_BUNDLE, threads=1) as loaded:
        yield loaded


def only_ours(call: Callable[[], object], *errors: type[EdgelmError]) -> None:
    """Call something, which may raise `errors` in one line."""
    try:
        call()
    except EdgelmError as error:
        assert isinstance(error, errors or EdgelmError)
        assert str(error) and "\n" not in str(error) and len(str(error)) < 10_000


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("value", SPECIAL, ids=range(len(SPECIAL)))
def test_an_option_of_a_strange_value(name: str, value: Any) -> None:
    only_ours(lambda: GenerationConfig().updated({name: value}), ConfigError)
    only_ours(lambda: GenerationConfig(**{name: value}), ConfigError)


@few
@given(options=st.dictionaries(st.sampled_from(sorted(OPTIONS)), values, max_size=4))
def test_options_of_any_values(options: dict[str, Any]) -> None:
    only_ours(lambda: GenerationConfig().updated(options), ConfigError)


@pytest.mark.parametrize("name", ["", "top_q", "a" * 10**6, 5, None, Unprintable()], ids=range(6))
def test_an_unknown_option(name: Any) -> None:
    with pytest.raises(ConfigError, match="unknown generation option") as caught:
        GenerationConfig().updated({name: 1})
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", ["stop_strings", "suppress_tokens", "logit_bias", "bad_words_ids", "logits_processor"])
def test_an_endless_option(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        GenerationConfig().updated({name: itertools.repeat(1) if name != "logits_processor" else itertools.count()})


def test_a_wrong_type_is_named() -> None:
    with pytest.raises(ConfigError, match=r"temperature must be in .*, got a number of 1,329 bits"):
        GenerationConfig(temperature=10**400)
    with pytest.raises(ConfigError, match=r"path must be a path, got 5"):
        edgelm.load(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"prefix must be a path, got b'a'"):
        edgelm.load(TINY_BUNDLE, prefix=b"a")  # type: ignore[arg-type]


def _load_and_close(**options: Any) -> None:
    edgelm.load(**options).close()


@pytest.mark.parametrize(
    "name", ["path", "device", "threads", "shared_threads", "prefix_cache_bytes", "prefix", "batch_invariant"]
)
def test_load_with_a_strange_value(name: str) -> None:
    for value in SPECIAL:
        if name == "shared_threads" and value is True:
            continue  # would decide for the whole process
        given_path = {} if name == "path" else {"path": TINY_BUNDLE}
        if value is None and name == "path":
            continue  # the embedded model
        only_ours(partial(_load_and_close, **given_path, **{name: value}))


def test_calls_with_strange_values(model: Model, tmp_path: Path) -> None:
    calls: list[Callable[[Any], object]] = [
        lambda v: model.generate(v, max_new_tokens=1),
        lambda v: model.generate_batch(v, max_new_tokens=1),
        lambda v: model.generate_batch([v, "a"], max_new_tokens=1),
        lambda v: model.generate_batch(["a"], max_rows=v, max_new_tokens=1),
        lambda v: model.generate_batch(["a"], each=v, max_new_tokens=1),
        lambda v: model.generate_batch(["a"], each=[v], max_new_tokens=1),
        lambda v: model.score(v, "a"),
        lambda v: model.score("a", v),
        lambda v: model.choose(v, ["a", "b"]),
        lambda v: model.choose("a", v),
        lambda v: model.choose("a", [v, "b"]),
        lambda v: model.choose("a", ["c", "b"], length_normalization=v),
        lambda v: model.choose("a", ["c", "b"], calibrate=v),
        lambda v: model.perplexity(v),
        lambda v: model.perplexity("abc", stride=v),
        lambda v: model.embed(v),
        lambda v: model.embed("abc", pooling=v),
        lambda v: model.embed("abc", normalize=v),
        lambda v: model.load_state(v),
        lambda v: model.tokenizer.encode(v),
        lambda v: model.tokenizer.decode(v),
        lambda v: model.tokenizer.token_id(v),
        lambda v: model.session.step(v),
        lambda v: model.save_state(tmp_path / "s", v),
        lambda v: model.save_state(tmp_path / "s", "a b", dtype=v),
        lambda v: model.save_prefix(tmp_path / "p", v),
    ]
    scheduler = model.scheduler()
    calls += [
        lambda v: model.scheduler(max_rows=v),
        lambda v: model.scheduler(max_waiting=v),
        lambda v: model.scheduler(prefix_cache_bytes=v),
        lambda v: model.scheduler().close(drain_seconds=v),
        lambda v: scheduler.submit(v, max_new_tokens=1).completion(),
        lambda v: scheduler.submit("a", max_new_tokens=1, key=v).completion(),
        lambda v: scheduler.submit("a", max_new_tokens=1, deadline_seconds=v).completion(),
    ]
    for number, call in enumerate(calls):
        for value in SPECIAL:
            try:
                only_ours(partial(call, value))
            except Exception as error:
                raise AssertionError(f"call {number} with {shown(value)}") from error


def test_shown_is_short_and_safe() -> None:
    assert shown(10**5000) == "a number of 16,610 bits"
    assert shown([10**5000]) in ("a value of the type list", f"[{shown(10**5000)}]")
    assert "Unprintable" in shown(Unprintable())
    assert len(shown("a" * 10**6)) < 100
    assert "\x1b" not in shown("\x1b") and "\n" not in shown("a\nb")
    with pytest.raises(PromptError):
        raise PromptError(shown(5))
