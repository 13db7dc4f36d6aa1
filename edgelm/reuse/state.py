"""A prompt's keys and values in a file, so that another process need not compute them.

The payload (see `edgelm.reuse.kv_file`): the token ids (uint32), and keys and values.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edgelm.bundle.manifest import Manifest
from edgelm.errors import StateError
from edgelm.ids import KeysValues, shared_tokens
from edgelm.reuse.kv_file import (
    KvDtype,
    KvFileError,
    KvFormat,
    KvHeader,
    content_bytes,
    content_from_bytes,
    content_to_bytes,
    sha256_of,
)

_FORMAT = KvFormat(b"EDGELMPS", 1, "state of a prompt")


@dataclass(frozen=True, slots=True)
class PromptState:
    """Token ids and their keys and values, (2·layers, H, T, p)."""

    ids: tuple[int, ...]
    content: KeysValues


@dataclass(frozen=True, slots=True)
class _Header(KvHeader):
    digest: str
    """Of the bundle."""
    prefix: str | None = None
    """Of the learned prefix that stood before it (`edgelm.reuse.prefix.Prefix.sha256`)."""


def write_state(
    path: str | os.PathLike[str], manifest: Manifest, state: PromptState, dtype: KvDtype, prefix: str | None = None
) -> None:
    """Write a state file; a file that is there is replaced at once, or stays as it is.

    Args:
        prefix: SHA-256 of the learned prefix before the state.

    Raises:
        StateError: a number does not fit into float16.
        OSError: the file cannot be written.
    """
    try:
        payload = np.array(state.ids, "<u4").tobytes() + content_to_bytes(state.content, dtype)
    except KvFileError:
        raise StateError("this prompt's numbers do not fit into float16: save the state as float32") from None
    header = _Header(_FORMAT.version, len(state.ids), dtype, sha256_of(payload), manifest.digest, prefix)
    _FORMAT.write(path, header, payload)


def read_state(path: str | os.PathLike[str], manifest: Manifest, prefix: str | None = None) -> PromptState:
    """Read a state file, which must be whole and made with this very bundle and learned prefix.

    Raises:
        StateError: it is not.
    """

    def payload_bytes(header: _Header) -> int:
        if header.digest != manifest.digest:
            raise KvFileError("it was made with another bundle")
        if header.prefix != prefix:
            raise KvFileError("it was made with another prefix, or with none")
        if header.tokens > manifest.architecture.context_length:
            raise KvFileError(f"it has {header.tokens} tokens, more than the context holds")
        return 4 * header.tokens + content_bytes(header.dtype, _shape(header, manifest))

    try:
        header, payload = _FORMAT.read(path, _Header, payload_bytes)
        ids = np.frombuffer(payload, "<u4", header.tokens)
        content = content_from_bytes(payload[4 * header.tokens :], header.dtype, _shape(header, manifest))
        if ids.max() >= manifest.architecture.vocab_size:
            raise KvFileError("its content is damaged")
    except KvFileError as error:
        raise StateError(f"cannot use the state {os.fspath(path)!r}: {error}; remove it and save it again") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise StateError(f"cannot read the state {os.fspath(path)!r}: {reason}") from None
    return PromptState(tuple(ids.tolist()), content)


def most_shared(states: Iterable[PromptState], prompt: Sequence[int]) -> tuple[KeysValues | None, int]:
    """Keys and values of the first n tokens of `prompt`, from the state that has most of them, and n; None and 0
    where none has any."""
    best = max(states, key=lambda state: shared_tokens(state.ids, prompt), default=None)
    count = 0 if best is None else shared_tokens(best.ids, prompt)
    return (best.content[:, :, :count], count) if best is not None and count else (None, 0)


def _shape(header: _Header, manifest: Manifest) -> tuple[int, int, int, int]:
    facts = manifest.architecture
    return 2 * facts.num_layers, facts.num_key_value_heads, header.tokens, facts.head_dim
