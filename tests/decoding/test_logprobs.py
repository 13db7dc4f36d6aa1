"""Log-probabilities: hand-made vectors."""

import math

import numpy as np
import pytest

from edgelm import DeviceError
from edgelm.decoding.logprobs import log_softmax, logprobs_of, with_alternatives

HALVES = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))  # (V,)


def test_log_softmax_of_log_probabilities_is_themselves() -> None:
    np.testing.assert_allclose(log_softmax(HALVES), HALVES, atol=1e-6)
    np.testing.assert_allclose(log_softmax(HALVES + np.float32(500)), HALVES, atol=1e-4)
    np.testing.assert_allclose(log_softmax(np.array([1e4, -1e4], np.float32)), [0, -2e4])
    assert log_softmax(np.array([0.0, -np.inf], np.float32)).tolist() == [0, -np.inf]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_without_probabilities_are_refused(wrong: float) -> None:
    with pytest.raises(DeviceError, match="NaN or infinite logits"):
        log_softmax(np.array([0, wrong], np.float32))
    with pytest.raises(DeviceError):
        log_softmax(np.full(2, -np.inf, np.float32))


def test_each_token_under_its_own_row() -> None:
    logprobs = logprobs_of(np.stack([HALVES, HALVES[::-1]]), np.array([0, 0]))
    assert logprobs == pytest.approx([math.log(0.5), math.log(0.125)])
    assert logprobs.dtype == np.float64


def test_alternatives_come_likeliest_first_and_equals_by_id() -> None:
    assert [i for i, _ in with_alternatives(HALVES, 3, 3)] == [3, 0, 1, 2]
    ((token, logprob),) = with_alternatives(HALVES, 1, 0)
    assert token == 1 and logprob == pytest.approx(math.log(0.25))
    assert [i for i, _ in with_alternatives(HALVES, 2, 100)] == [2, 0, 1, 2, 3]
    assert with_alternatives(HALVES, 0, 1)[0] == with_alternatives(HALVES, 0, 1)[1]
