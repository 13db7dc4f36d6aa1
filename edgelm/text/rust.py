"""Errors of the `tokenizers` library, which is written in Rust, become errors of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgelm.errors import EdgelmError

_HERE = str(Path(__file__).parent)


@contextmanager
def rust_errors(error: type[EdgelmError], what: str, advice: str) -> Iterator[None]:
    """Turn what Rust raises into one sentence; every other exception passes unchanged.

    Rust raises Exception itself, or a built-in error for a wrong argument. A panic is a BaseException. An exception
    that a signal handler raises meanwhile is none of these, or comes from a function outside this folder.

    Args:
        error: class of the error to raise instead.
        what: what failed, the beginning of the sentence.
        advice: what to do about it, the end of the sentence.
    """
    try:
        yield
    except BaseException as exc:
        if not _is_of_rust(exc):
            raise
        reason = (str(exc) or type(exc).__name__).splitlines()[0][:200]
        raise error(f"{what} ({reason}); {advice}") from None


def is_panic(error: BaseException) -> bool:
    """Whether `error` is a panic of Rust, whose class no module exports."""
    return type(error).__name__ == "PanicException"


def _is_of_rust(error: BaseException) -> bool:
    if is_panic(error):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    is_ours = frame is not None and frame.tb_frame.f_code.co_filename.startswith(_HERE)
    return is_ours and type(error) in (Exception, ValueError, TypeError, OverflowError, UnicodeEncodeError)
