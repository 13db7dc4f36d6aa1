"""A prompt's keys and values in a file, so that another process need not compute them.

The file: ``EDGELMPS``, the length of the header (uint32, little-endian), the header (JSON), and the payload: the
token ids (uint32) and keys and values, (2·layers, H, T, p) float32 or float16, little-endian.
"""

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edgelm.errors import StateError
from edgelm.graph_call import KeysValues
from edgelm.manifest import Manifest
from edgelm.prefix import shared_tokens
from edgelm.strict_json import Count, StrictJsonError, from_json, parse_json

StateDtype = Literal["float32", "float16"]

_MAGIC = b"EDGELMPS"
_FORMAT_VERSION = 1
_MAX_HEADER_BYTES = 4096
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class PromptState:
    """Token ids and their keys and values, (2·layers, H, T, p)."""

    ids: tuple[int, ...]
    content: KeysValues


@dataclass(frozen=True, slots=True)
class _Header:
    format_version: Count
    digest: str
    """Of the bundle."""
    tokens: Count
    dtype: StateDtype
    sha256: str
    """Of the payload."""


def write_state(path: str | os.PathLike[str], manifest: Manifest, state: PromptState, dtype: StateDtype) -> None:
    """Write a state file; a file that is there is replaced at once, or stays as it is.

    Raises:
        StateError: a number does not fit into float16.
        OSError: the file cannot be written.
    """
    content = state.content.astype(np.dtype(dtype).newbyteorder("<"))
    if not np.isfinite(content).all():
        raise StateError("this prompt's numbers do not fit into float16: save the state as float32")
    payload = np.array(state.ids, "<u4").tobytes() + content.tobytes()
    header = _Header(_FORMAT_VERSION, manifest.digest, len(state.ids), dtype, hashlib.sha256(payload).hexdigest())
    text = json.dumps(asdict(header)).encode()
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(_MAGIC + _LENGTH.pack(len(text)) + text + payload)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_state(path: str | os.PathLike[str], manifest: Manifest) -> PromptState:
    """Read a state file, which must be whole and made with this very bundle.

    Raises:
        StateError: it is not.
    """
    try:
        with Path(path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(len(_MAGIC) + _LENGTH.size)
            if len(start) < len(_MAGIC) + _LENGTH.size or not start.startswith(_MAGIC):
                raise StateError("it is no state of a prompt")
            (header_bytes,) = _LENGTH.unpack(start[len(_MAGIC) :])
            if header_bytes > _MAX_HEADER_BYTES:
                raise StateError("its header is damaged")
            header = _read_header(stream.read(header_bytes), manifest)
            shape = _shape(header, manifest)
            expected = 4 * header.tokens + int(np.prod(shape)) * np.dtype(header.dtype).itemsize
            if size != len(start) + header_bytes + expected:
                raise StateError(f"it has {size:,} bytes instead of {len(start) + header_bytes + expected:,}")
            payload = stream.read(expected)
    except StateError as error:
        raise StateError(f"cannot use the state {os.fspath(path)!r}: {error}; remove it and save it again") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise StateError(f"cannot read the state {os.fspath(path)!r}: {reason}") from None
    ids = np.frombuffer(payload, "<u4", header.tokens)
    content = np.frombuffer(payload, np.dtype(header.dtype).newbyteorder("<"), offset=4 * header.tokens).reshape(shape)
    damaged = hashlib.sha256(payload).hexdigest() != header.sha256
    if damaged or ids.max() >= manifest.architecture.vocab_size or not np.isfinite(content).all():
        raise StateError(
            f"cannot use the state {os.fspath(path)!r}: its content is damaged; remove it and save it again"
        )
    return PromptState(tuple(ids.tolist()), content)


def most_shared(states: Iterable[PromptState], prompt: Sequence[int]) -> tuple[KeysValues | None, int]:
    """Keys and values of the first n tokens of `prompt`, from the state that has most of them, and n; None and 0
    where none has any."""
    best = max(states, key=lambda state: shared_tokens(state.ids, prompt), default=None)
    count = 0 if best is None else shared_tokens(best.ids, prompt)
    return (best.content[:, :, :count], count) if best is not None and count else (None, 0)


def _read_header(text: bytes, manifest: Manifest) -> _Header:
    try:
        header = from_json(_Header, parse_json(text))
    except StrictJsonError as error:
        raise StateError(f"its header {error}") from None
    if header.format_version != _FORMAT_VERSION:
        raise StateError(f"it has format_version {header.format_version}, this edgelm reads {_FORMAT_VERSION}")
    if header.digest != manifest.digest:
        raise StateError("it was made with another bundle")
    if header.tokens > manifest.architecture.context_length:
        raise StateError(f"it has {header.tokens} tokens, more than the context holds")
    return header


def _shape(header: _Header, manifest: Manifest) -> tuple[int, int, int, int]:
    facts = manifest.architecture
    return 2 * facts.num_layers, facts.num_heads, header.tokens, facts.head_dim
