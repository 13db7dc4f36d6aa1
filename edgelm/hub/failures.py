"""What went wrong on the hub, or on the way to it, in words. Also `edgelm export` says it so."""

import email.utils
import time

from edgelm.errors import pass_interrupts_on

_HTTP_LIBRARIES = frozenset({"requests", "urllib3", "httpx", "httpcore", "httpx2", "httpcore2"})
"""Those that huggingface_hub has used so far. The base class of their errors is Exception."""


def status_of_answer(error: BaseException) -> int | None:
    """The HTTP status of the answer that `error` is about; None if there was no answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def is_unreachable(error: BaseException) -> bool:
    """Whether the hub did not answer, or said that it cannot answer now."""
    from huggingface_hub import errors

    status = status_of_answer(error)
    if status is not None:
        return status >= 500
    library = type(error).__module__.partition(".")[0]
    kinds = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    return isinstance(error, kinds) or library in _HTTP_LIBRARIES


def retry_after_seconds(error: BaseException) -> float | None:
    """How long the hub asks to wait (RFC 9110, Retry-After); None if it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    text = str(headers.get("Retry-After", ""))
    if text.isdecimal() and len(text) < 9:
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError) as error:
        pass_interrupts_on(error)
        return None


def failure_words(error: BaseException, repo: str, revision: str | None) -> str:
    """A sentence about an exception of huggingface_hub, or of its HTTP library, and what to do."""
    from huggingface_hub import constants, errors

    status, page = status_of_answer(error), f"{constants.ENDPOINT}/{repo}"
    log_in = "run `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set and the cache does not have this model at this revision; unset it"
    if isinstance(error, errors.GatedRepoError):
        return f"access to this model is restricted; accept its terms on {page}, then {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the model has no revision {revision!r}; check the revision"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return f"the hub has no public model of this name; for a private one {log_in}, otherwise check the name"
    if status in (401, 403):
        return f"the hub refused access (status {status}); check your access token with `hf auth whoami`, or {log_in}"
    if status == 429:
        seconds = retry_after_seconds(error)
        wait = "a while" if seconds is None else f"{seconds:.0f} s"
        return f"the hub asks to wait {wait} (rate limit); try again then, or {log_in} for a higher limit"
    if status is not None:
        return f"the hub answered with status {status}; try again later"
    if is_unreachable(error):
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}); check the network and the proxy"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    advice = "try again later" if isinstance(error, OSError) else "check the name"
    return f"{lines[0] if lines else type(error).__name__}; {advice}"
