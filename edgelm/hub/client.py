"""Requests to the hub through huggingface_hub: patient with cuts and rate limits, with errors in one sentence."""

import errno
import logging
import sys
import time
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TypeVar

from edgelm.bundle.cache import HubName
from edgelm.errors import HubError, install_hint, pass_interrupts_on
from edgelm.hub.failures import failure_words, is_unreachable, retry_after_seconds, status_of_answer

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Tell = Callable[[str], None]

TRIES = 5
"""How often a request is sent that finds no hub, or is cut off."""
MAX_WAIT_SECONDS = 120.0
"""A rate limit that asks for a longer wait is an error."""


def import_huggingface_hub() -> ModuleType:
    """The package huggingface_hub; raises HubError if it is not installed."""
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise HubError(f"the package huggingface_hub is not installed; {install_hint('hub')}") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # `ask` tells what happens
    if sys.stderr is None or not sys.stderr.isatty():
        import_module("huggingface_hub.utils").disable_progress_bars()
    return huggingface_hub


def ask(
    request: Callable[[], Result], name: HubName, what: str, tell: Tell, advance: Callable[[], int] = lambda: 0
) -> Result:
    """``request()``, sent again after a cut or a rate limit.

    `what` completes a sentence that begins with "cannot", as in "fetch 'a/b' from the hub". `tell` gets a line about
    each wait. Tries are counted anew whenever `advance` returns a larger number.

    Raises HubError if the request fails, and OSError if a file cannot be written.
    """
    tries, reached = 0, advance()
    while True:
        try:
            return request()
        except Exception as error:  # huggingface_hub raises its own errors, those of its HTTP library, and OSError
            pass_interrupts_on(error)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            tries = 1 if advance() > reached else tries + 1
            reached = advance()
            seconds = _wait_seconds(error, tries)
            if seconds is None:
                words = failure_words(error, name.repo, name.revision)
                raise HubError(f"cannot {what}: {words}") from None
            logger.debug("%s: %r", what, error)
            tell(f"the hub {_reason(error)}: trying again in {seconds:.0f} s")
            time.sleep(seconds)


def _wait_seconds(error: Exception, tries: int) -> float | None:
    """How long to wait before the request is sent again; None if that would not help."""
    from huggingface_hub import errors

    if tries >= TRIES or isinstance(error, errors.OfflineModeIsEnabled):
        return None
    stated = retry_after_seconds(error)
    if status_of_answer(error) == 429 or (is_unreachable(error) and stated is not None):
        seconds = float(2**tries) if stated is None else stated
        return seconds if seconds <= MAX_WAIT_SECONDS else None
    return float(2 ** (tries - 1)) if is_unreachable(error) else None


def _reason(error: Exception) -> str:
    if status_of_answer(error) == 429:
        return "asks to wait (rate limit)"
    return "does not answer, or its answer was cut off"
