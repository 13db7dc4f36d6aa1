"""Every error that edgelm raises on purpose. Each message is one sentence that says what to do."""

import reprlib

_SHORT = reprlib.Repr()
_SHOWN_CHARACTERS = 60
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _SHOWN_CHARACTERS

UPGRADE_HINT = "run: pip install -U edgelm (in a clone: git pull)"
"""How to get a newer edgelm, at the end of a message."""


def install_hint(extras: str) -> str:
    """How to install edgelm with `extras`, such as "cpu,export", at the end of a message."""
    return f"run: pip install 'edgelm[{extras}]' (in a clone: pip install '.[{extras}]')"


def pass_interrupts_on(error: BaseException) -> None:
    """Raise `error` again, as it is, if a signal handler raised it in the middle of our code.

    A handler may raise an exception of any class (Celery's soft time limit; often a TimeoutError, which is an OSError).
    So this comes first wherever a broad class is caught and then hidden or turned into another error. Python gives a
    handler the frame that it interrupted, so a handler is a frame that holds its caller's frame as an argument.
    """
    entry = error.__traceback__
    while entry is not None and entry.tb_next is not None:
        interrupted, entry = entry.tb_frame, entry.tb_next
        for value in entry.tb_frame.f_locals.values():
            if value is interrupted or (isinstance(value, tuple) and any(item is interrupted for item in value)):
                raise error


def shown(value: object) -> str:
    """`value` in a message: short and on one line, whatever it is."""
    if isinstance(value, int) and abs(value) >> 200:  # Python refuses to print integers of more than 4,300 digits
        return f"a number of {value.bit_length():,} bits"
    try:
        return " ".join(_SHORT.repr(value).split())
    except Exception as error:  # its __repr__ fails, or it contains such a number
        pass_interrupts_on(error)
        return f"a value of the type {type(value).__name__}"


def shortened(text: str) -> str:
    """The beginning of a text on one line, in quotes, so that people recognize the text."""
    import json  # slow to import, and rarely needed

    return json.dumps(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...", ensure_ascii=False)


class EdgelmError(Exception):
    """Base class of all errors that edgelm raises on purpose."""


class BundleError(EdgelmError):
    """A bundle is missing, damaged, unsafe or of an earlier format, needs a newer edgelm, or changed after loading."""


class HubError(EdgelmError):
    """The hub cannot be reached, refuses, or has no such bundle; or the cache cannot be written."""


class ConfigError(EdgelmError, ValueError):
    """An option is unknown, of a wrong type or out of range, or it contradicts another option."""


class PromptError(EdgelmError, ValueError):
    """A prompt or a list of token ids cannot be used with this model."""


class ContextError(PromptError):
    """The tokens do not fit into the model's context."""


class TokenizerError(EdgelmError):
    """A tokenizer's files cannot be read, or edgelm does not support their kind."""


class StateError(EdgelmError):
    """A saved prompt state is damaged, or it belongs to another bundle."""


class PrefixError(EdgelmError):
    """A prefix file is damaged, was made for another model, or is too long for the context."""


class DeviceError(EdgelmError):
    """ONNX Runtime is missing, it cannot use the requested device, or the model computed NaN there."""


class ClosedError(EdgelmError):
    """A model, a session of it or a scheduler was used after it was closed; or a scheduler after it was interrupted."""


class QueueFullError(EdgelmError):
    """A scheduler refuses a generation because too many wait already.

    Attributes:
        retry_after_seconds: when to try again: about how long half of the waiting ones take at the recent speed.
    """

    def __init__(self, message: str, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ForkError(EdgelmError):
    """A forked child process used a session, a stream or a submission of its parent."""


class InsufficientMemoryError(EdgelmError, MemoryError):
    """A model was not loaded, because it would not fit into the memory that this process may use."""


class ExportError(EdgelmError):
    """A checkpoint cannot be exported, or the exported bundle missed its quality gate."""


class TrainingError(EdgelmError):
    """A model cannot be trained with the given data, options or checkpoint."""
