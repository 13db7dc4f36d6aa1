"""Keys and values in a file of their own: what the formats of states and prefixes share.

A file: eight bytes that say what it is, the length of the header (uint32, little-endian), the header (JSON), and the
payload, whose parts and SHA-256 the header says. Keys and values are (2·layers, H, T, p), each layer's keys and then
its values, little-endian.
"""

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np

from edgelm.bundle.strict_json import Count, StrictJsonError, from_json, parse_json
from edgelm.errors import ConfigError
from edgelm.ids import KeysValues

KvDtype = Literal["float32", "float16"]

_MAX_HEADER_BYTES = 8192
_LENGTH = struct.Struct("<I")


class KvFileError(ValueError):
    """A file is not what it should be; the message says why and does not name it."""


@dataclass(frozen=True, slots=True)
class KvHeader:
    """What every header says."""

    format_version: Count
    tokens: Count
    dtype: KvDtype
    sha256: str
    """Of the payload."""


Header = TypeVar("Header", bound=KvHeader)


@dataclass(frozen=True, slots=True)
class KvFormat:
    """One kind of file."""

    magic: bytes
    """Eight bytes."""
    version: int
    name: str
    """What such a file is, for messages."""

    def write(self, path: str | os.PathLike[str], header: KvHeader, payload: bytes) -> None:
        """Write a file; one that is there is replaced at once, or stays as it is.

        Raises:
            OSError: it cannot be written.
        """
        text = json.dumps(asdict(header), ensure_ascii=False).encode()
        target = Path(path)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(self.magic + _LENGTH.pack(len(text)) + text + payload)
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def read(
        self, path: str | os.PathLike[str], header_class: type[Header], payload_bytes: Callable[[Header], int]
    ) -> tuple[Header, bytes]:
        """Read a file, which must be whole.

        Args:
            payload_bytes: checks a header and says how long its payload must be.

        Raises:
            KvFileError: it is another kind of file, or damaged; and what `payload_bytes` raises.
            OSError: it cannot be read.
        """
        with Path(path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(len(self.magic) + _LENGTH.size)
            if len(start) < len(self.magic) + _LENGTH.size or not start.startswith(self.magic):
                raise KvFileError(f"it is no {self.name}")
            (header_bytes,) = _LENGTH.unpack(start[len(self.magic) :])
            if header_bytes > _MAX_HEADER_BYTES:
                raise KvFileError("its header is damaged")
            header = self._header(stream.read(header_bytes), header_class)
            expected = payload_bytes(header)
            if size != len(start) + header_bytes + expected:
                raise KvFileError(f"it has {size:,} bytes instead of {len(start) + header_bytes + expected:,}")
            payload = stream.read(expected)
        if sha256_of(payload) != header.sha256:
            raise KvFileError("its content is damaged")
        return header, payload

    def _header(self, text: bytes, header_class: type[Header]) -> Header:
        try:
            content = parse_json(text)
            version = content.get("format_version") if isinstance(content, dict) else None
            if isinstance(version, int) and version != self.version:
                raise KvFileError(f"it has format_version {version}, this edgelm reads {self.version}")
            return from_json(header_class, content)
        except StrictJsonError as error:
            raise KvFileError(f"its header {error}") from None


def check_kv_dtype(dtype: object) -> None:
    """Raises ConfigError where keys and values are not stored as `dtype`."""
    if dtype not in get_args(KvDtype):
        raise ConfigError(f"dtype must be {' or '.join(map(repr, get_args(KvDtype)))}, got {dtype!r}")


def sha256_of(payload: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(payload).hexdigest()


def content_to_bytes(content: KeysValues, dtype: KvDtype) -> bytes:
    """Keys and values as they lie in a file.

    Raises:
        KvFileError: a number is none, or does not fit into `dtype`.
    """
    with np.errstate(over="ignore"):
        stored = content.astype(np.dtype(dtype).newbyteorder("<"))
    if not np.isfinite(stored).all():
        raise KvFileError(f"a number of its keys and values does not fit into {dtype}")
    return stored.tobytes()


def content_from_bytes(data: bytes, dtype: KvDtype, shape: tuple[int, int, int, int]) -> KeysValues:
    """The same back, a view of `data`.

    Raises:
        KvFileError: a number is none.
    """
    content = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    if not np.isfinite(content).all():
        raise KvFileError("its content is damaged")
    return content


def content_bytes(dtype: KvDtype, shape: tuple[int, int, int, int]) -> int:
    """How many bytes that are."""
    return int(np.prod(shape)) * np.dtype(dtype).itemsize
