"""Errors of the `tokenizers` library, which is written in Rust, become errors of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

from edgelm.errors import EdgelmError, pass_interrupts_on


@contextmanager
def rust_errors(error: type[EdgelmError], what: str, advice: str) -> Iterator[None]:
    """Turn whatever Rust raises into one sentence. A panic is a BaseException, not an Exception.

    What signal handlers and other libraries raise in the meantime passes unchanged.

    Args:
        error: class of the error to raise instead; an EdgelmError passes unchanged.
        what: what failed, the beginning of the sentence.
        advice: what to do about it, the end of the sentence.
    """
    try:
        yield
    except (EdgelmError, MemoryError):
        raise
    except BaseException as exc:
        pass_interrupts_on(exc)
        if not (isinstance(exc, Exception) or is_panic(exc)):
            raise
        reason = (str(exc) or type(exc).__name__).splitlines()[0][:200]
        raise error(f"{what} ({reason}); {advice}") from None


def is_panic(error: BaseException) -> bool:
    """Whether `error` is a panic of Rust, whose class no module exports."""
    return type(error).__name__ == "PanicException"
