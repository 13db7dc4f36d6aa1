"""An interrupt of a command that works in stages: a library that swallows it delays it, and does not lose it."""

import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from edgelm.cli.interrupt import unwinds

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

ENDS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """As a command finds them, whatever the test runner has set."""
    defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    previous = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    assert {number: signal.getsignal(number) for number in defaults} == defaults
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "end"), ENDS)
def test_raised_where_nobody_swallows_it(number: int, end: type[BaseException]) -> None:
    with pytest.raises(end), unwinds():
        signal.raise_signal(number)


@pytest.mark.parametrize(("number", "end"), ENDS)
def test_swallowed_and_raised_before_the_next_stage(number: int, end: type[BaseException]) -> None:
    with pytest.raises(end) as caught, unwinds() as raise_again:
        raise_again()
        with suppress(BaseException):
            signal.raise_signal(number)
        raise_again()
    assert getattr(caught.value, "code", None) == (143 if number == signal.SIGTERM else None)


@pytest.mark.parametrize(("number", "end"), ENDS)
def test_turned_into_another_error(number: int, end: type[BaseException]) -> None:
    with pytest.raises(end), unwinds():
        try:
            signal.raise_signal(number)
        except BaseException:
            raise ImportError("numpy.core.multiarray failed to import") from None


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(ImportError), unwinds():
        raise ImportError("no module")


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with unwinds() as raise_again:
        signal.raise_signal(signal.SIGINT)
        raise_again()
    assert signal.signal(signal.SIGINT, signal.default_int_handler) == signal.SIG_IGN
