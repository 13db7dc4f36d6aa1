"""Processors on hand-made vectors, and their rules under any ids."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.decoding.generation_config import GenerationConfig
from edgelm.decoding.logits_processors import (
    SequenceBias,
    bias_tokens,
    dry,
    forbid_repeated_ngrams,
    force_at,
    hasten_end,
    penalize_presence_and_frequency,
    penalize_repetition,
    process,
    processors_of,
    suppress_at,
    suppress_before,
)
from edgelm.errors import ConfigError
from edgelm.ids import IdArray, Logits

IDS = st.lists(st.integers(0, 5), min_size=1, max_size=30)


def ids(*tokens: int) -> IdArray:
    return np.array(tokens, np.int64)


def row(*values: float) -> Logits:
    return np.array(values, np.float32)


def zeros(size: int = 6) -> Logits:
    return np.zeros(size, np.float32)


def masked(logits: Logits) -> list[int]:
    return np.flatnonzero(logits == -np.inf).tolist()


def test_repetition_penalty_divides_positive_and_multiplies_negative() -> None:
    logits = row(2, -2, 4)
    assert penalize_repetition(ids(0, 1, 0), logits, 2.0).tolist() == [1, -4, 4]
    assert logits.tolist() == [2, -2, 4]


def test_presence_and_frequency_count_the_new_text_only() -> None:
    logits = penalize_presence_and_frequency(ids(5, 5, 1, 2, 2), zeros(), 0.5, 0.25, 2)
    assert logits.tolist() == [0, -0.75, -1, 0, 0, 0]
    assert penalize_presence_and_frequency(ids(5), zeros(), 0.5, 0.25, 1).tolist() == [0] * 6


def test_biases() -> None:
    assert bias_tokens(ids(0), zeros(3), ids(2), row(1.5)).tolist() == [0, 0, 1.5]
    add = SequenceBias([((3,), 1.0), ((1, 2), -2.0), ((4, 1, 5), 7.0), ((0, 1, 5), 0.5)])
    assert add(ids(0, 1), zeros()).tolist() == [0, 0, -2, 1, 0, 0]  # as transformers: three need a text of three
    assert add(ids(3, 0, 1), zeros()).tolist() == [0, 0, -2, 1, 0, 0.5]
    assert add(ids(2), zeros()).tolist() == [0, 0, 0, 1, 0, 0]


def test_no_repeated_ngram() -> None:
    assert masked(forbid_repeated_ngrams(ids(1, 2, 3, 1, 2), zeros(), 3)) == [3]
    assert masked(forbid_repeated_ngrams(ids(1, 2, 1), zeros(), 1)) == [1, 2]
    assert masked(forbid_repeated_ngrams(ids(1), zeros(), 3)) == []


@given(IDS, st.integers(1, 5))
def test_no_ngram_appears_twice(start: list[int], size: int) -> None:
    """A token is forbidden exactly if it would complete a run that is already in the text."""
    text = np.array(start, np.int64)
    runs = {tuple(start[i : i + size]) for i in range(len(start) - size + 1)}
    end = tuple(start[len(start) - size + 1 :])
    expected = [t for t in range(6) if len(end) == size - 1 and (*end, t) in runs]
    assert masked(forbid_repeated_ngrams(text, zeros(), size)) == expected


def dry_by_hand(text: list[int], token: int, multiplier: float, base: float, allowed: int, breakers: set[int]) -> float:
    """The penalty by definition: the longest run without breakers at the end of the text counts, if earlier in the text
    `token` follows the same run.
    """
    longest = 0
    for end in range(1, len(text)):
        if text[end] != token:
            continue
        length = 0
        while length < end and text[end - 1 - length] == text[-1 - length] and text[-1 - length] not in breakers:
            length += 1
        longest = max(longest, length)
    return multiplier * base ** (longest - allowed) if longest >= allowed else 0.0


@given(IDS, st.integers(1, 4), st.sets(st.integers(0, 5), max_size=2))
def test_dry_is_its_definition(text: list[int], allowed: int, breakers: set[int]) -> None:
    actual = dry(np.array(text, np.int64), zeros(), 0.8, 1.75, allowed, ids(*sorted(breakers)))
    expected = [-dry_by_hand(text, token, 0.8, 1.75, allowed, breakers) for token in range(6)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_dry_on_an_endless_loop_stays_finite() -> None:
    assert np.isfinite(dry(ids(*[1] * 1000), zeros(), 100.0, 10.0, 1, ids())).any()
    assert dry(ids(*[1, 2] * 500), zeros(), 0.8, 1.75, 2, ids())[1] < -1e9


def test_suppression_by_length() -> None:
    assert masked(suppress_before(ids(1, 2), zeros(), ids(3), 3)) == [3]
    assert masked(suppress_before(ids(1, 2, 3), zeros(), ids(3), 3)) == []
    assert masked(suppress_at(ids(1), zeros(), ids(0, 2), 1)) == [0, 2]
    assert masked(suppress_at(ids(1, 1), zeros(), ids(0, 2), 1)) == []


def test_force() -> None:
    assert masked(force_at(ids(1, 1), zeros(4), ids(2), 2)) == [0, 1, 3]
    assert masked(force_at(ids(1), zeros(4), ids(2), 2)) == []


def test_the_end_grows_likelier_but_not_where_it_is_ruled_out() -> None:
    assert hasten_end(ids(1, 1, 1), row(-2, 2), ids(0, 1), 1, 2.0).tolist() == [4, 8]
    assert hasten_end(ids(1), row(-2, 2), ids(0, 1), 1, 2.0).tolist() == [-2, 2]
    assert hasten_end(ids(1, 1, 1), row(-np.inf, 2), ids(0, 1), 1, 2.0).tolist() == [-np.inf, 8]


def all_processors(**options: object) -> list[Logits]:
    config = GenerationConfig().updated(options)
    return [process(processors_of(config, 1, 6), ids(1), zeros())]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"logit_bias": {2: 1.5}}, [0, 0, 1.5, 0, 0, 0]),
        ({"sequence_bias": [[[2], -1.0], [[4, 1, 3], 2.0]]}, [0, 0, -1, 2, 0, 0]),
        ({"presence_penalty": 0.5, "frequency_penalty": 0.25}, [0, -1, 0, 0, -1.25, 0]),
        ({"dry_multiplier": 1.0, "dry_base": 2.0, "dry_allowed_length": 1}, [0, 0, 0, 0, -2, 0]),
        ({"no_repeat_ngram_size": 2}, [0, 0, 0, 0, -np.inf, 0]),
        ({"min_length": 7, "eos_token_id": 3}, [0, 0, 0, -np.inf, 0, 0]),
        ({"min_length": 6, "eos_token_id": 3}, [0] * 6),
        ({"min_new_tokens": 6, "eos_token_id": 3}, [0, 0, 0, -np.inf, 0, 0]),
        ({"min_new_tokens": 5, "eos_token_id": 3}, [0] * 6),
        ({"forced_eos_token_id": 3, "max_new_tokens": 6}, [-np.inf, -np.inf, -np.inf, 0, -np.inf, -np.inf]),
        ({"forced_eos_token_id": 3, "max_new_tokens": 7}, [0] * 6),
    ],
)
def test_every_option_has_its_processor(options: dict[str, object], expected: list[float]) -> None:
    """The prompt is 5, the new text is 4 1 4 4 1. DRY: "4 1" came before, and 4 followed."""
    config = GenerationConfig().updated(options)
    assert process(processors_of(config, 1, 6), ids(5, 4, 1, 4, 4, 1), zeros()).tolist() == expected


def test_an_end_of_text_is_no_bad_word() -> None:
    [actual] = all_processors(bad_words_ids=[[2], [3], [1, 4]], eos_token_id=3)
    assert masked(actual) == [2]  # and the pair not yet: the text has fewer tokens than it


def test_the_beginning_is_behind_a_forced_first_token() -> None:
    """As transformers' `_get_logits_processor`: a prompt of one token and a forced BOS put it one place later."""
    plain = GenerationConfig().updated({"begin_suppress_tokens": [3]})
    forced = plain.updated({"forced_bos_token_id": 2})

    def masked_at(config: GenerationConfig, prompt_tokens: int) -> list[list[int]]:
        processors = processors_of(config, prompt_tokens, 6)
        return [masked(process(processors, ids(*[1] * length), zeros())) for length in (1, 2, 3)]

    assert masked_at(plain, 1) == [[3], [], []]
    assert masked_at(plain, 2) == [[], [3], []]
    assert masked_at(forced, 1) == [[0, 1, 3, 4, 5], [3], []]
    assert masked_at(forced, 2)[1:] == [[3], []]


def test_custom_processors_run_in_order_on_copies() -> None:
    seen = []

    def first(text: IdArray, logits: Logits) -> Logits:
        seen.append(text.tolist())
        text[:] = 0
        logits += 1
        return logits

    [actual] = all_processors(logits_processor=[first, lambda text, logits: logits * 2])
    assert actual.tolist() == [2] * 6
    assert seen == [[1]]


@pytest.mark.parametrize("wrong", [lambda t, x: x[:2], lambda t, x: x * np.nan, lambda t, x: None, lambda t, x: x > 0])
def test_what_a_custom_processor_returns_is_checked(wrong: object) -> None:
    with pytest.raises(ConfigError, match="logits_processor must return 6 floats"):
        all_processors(logits_processor=wrong)


def test_ruling_everything_out_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no token is left to choose after 1 tokens"):
        all_processors(suppress_tokens=range(6))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {6: 1.0}),
        ("sequence_bias", [([1, 6], 1.0)]),
        ("bad_words_ids", [[0, 6]]),
        ("suppress_tokens", [6]),
        ("begin_suppress_tokens", [6]),
        ("forced_bos_token_id", 6),
        ("forced_eos_token_id", 6),
        ("eos_token_id", 6),
    ],
)
def test_ids_outside_the_vocabulary_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: token 6 is out of range, this model knows 0 to 5"):
        all_processors(**{name: value})
