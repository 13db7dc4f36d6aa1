"""The one file format of keys and values that are already computed, on safetensors.

Three kinds: the state of a prompt, a baked text, and a learned prefix. Files are read without the package safetensors,
which knows no files inside others, and which accepts repeated names and unknown fields of a tensor.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from edgelm.bundle.folder import Extent
from edgelm.bundle.manifest import MAX_TASK_BYTES, CacheType
from edgelm.bundle.small_files import SmallFileError, check_small_file
from edgelm.bundle.strict_json import Bytes, Count, StrictJsonError, from_json, parse_json
from edgelm.bundle.whole_file import write_whole_file
from edgelm.errors import ConfigError, EdgelmError, PrefixError, StateError, pass_interrupts_on, shown
from edgelm.ids import KeysValues

KvDtype = Literal["float32", "float16"]
"""Types in which floats of a cache can be stored."""
KvKind = Literal["state", "text", "learned"]

_FORMAT_VERSION = 1
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header, uint64
_MAX_HEADER_BYTES = 32768
_MAX_FILE_BYTES = 2**40
_DTYPES = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U32": "<u4", "U8": "u1"}


class KvFileError(ValueError):
    """The file is not a valid KV file of the requested kind. The message gives the reason, not the file's name."""


@dataclass(frozen=True, slots=True)
class KvMetadata:
    """The facts that a file states about itself."""

    kind: KvKind
    source: str
    """Name of the checkpoint, for messages."""
    made_for: str
    """What the keys and values fit: a state the bundle with this digest, a text the bundle with this
    `prefix.graph_identity`, a learned prefix every bundle with this `Source.body_sha256`."""
    prefix: str | None = None
    """SHA-256 of the learned prefix that stood before a state (`Prefix.sha256`)."""
    sha256: str = ""
    """SHA-256 (hex) of the tensors' bytes without the task's, in the alphabetical order of their names."""
    format_version: Count = _FORMAT_VERSION
    task_sha256: str | None = None
    """SHA-256 (hex) of the task. It is apart because `sha256` identifies a prefix: a state that was saved behind it
    fits, whatever the prefix is for."""


@dataclass(frozen=True, slots=True)
class KvFile:
    """The content of a file."""

    metadata: KvMetadata
    keys_values: KeysValues
    """float32, float16 or int8 (2·layers, H, T, p), read-only: each layer's keys and then its values. On POSIX a view
    of the mapped file, whose pages the system can drop and read again. Replace such a file, and never write into it."""
    ids: npt.NDArray[np.uint32]
    """(T,); (0,) for a learned prefix, whose virtual tokens have no ids."""
    text: str | None
    """The baked text; None for the other kinds."""
    task: bytes | None = None
    """What a prefix is for, as the content of a task file (docs/tasks.md), which `edgelm.bundle.task` reads."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: Literal["F32", "F16", "I8", "U32", "U8"]
    shape: tuple[Count, ...]
    data_offsets: tuple[Bytes, ...]
    """Its first byte and the one behind its last, counted from the end of the header."""


@dataclass(frozen=True, slots=True)
class _Header:
    __metadata__: dict[str, str]
    """One string, `edgelm_kv`: `KvMetadata` in JSON. safetensors writes several strings in random order."""
    keys_values: _Tensor
    token_ids: _Tensor | None = None
    text: _Tensor | None = None
    """UTF-8 bytes. A tensor, because a text may be longer than a header should be."""
    task: _Tensor | None = None
    """The bytes of a task file. A tensor for the same reason."""

    def fits(self, metadata: KvMetadata) -> bool:
        """Whether the tensors are those of the kind, with its dtypes and shapes."""
        kind, shape, ids, text = metadata.kind, self.keys_values.shape, self.token_ids, self.text
        stated = metadata.task_sha256 is not None
        return (
            (ids is not None, text is not None) == (kind != "learned", kind == "text")
            and (metadata.prefix is None or kind == "state")
            and (self.keys_values.dtype in ("F32", "F16", "I8") and len(shape) == 4 and shape[0] % 2 == 0)
            and (ids is None or (ids.dtype, ids.shape) == ("U32", shape[2:3]))
            and (text is None or (text.dtype, len(text.shape)) == ("U8", 1))
            and (self.task is not None) == stated
            and (self.task is None or (self.task.dtype, len(self.task.shape), kind != "state") == ("U8", 1, True))
        )

    def fills(self, size_bytes: int) -> bool:
        """Whether the tensors lie behind each other without gap or overlap in `size_bytes`."""
        end = 0
        tensors = (self.keys_values, self.token_ids, self.text, self.task)
        for tensor in sorted(filter(None, tensors), key=lambda tensor: tensor.data_offsets):
            length = math.prod(tensor.shape) * np.dtype(_DTYPES[tensor.dtype]).itemsize
            if tensor.data_offsets != (end, end + length):
                return False
            end += length
        return end == size_bytes


def write_kv_file(
    path: str | os.PathLike[str],
    metadata: KvMetadata,
    keys_values: KeysValues,
    dtype: CacheType,
    ids: tuple[int, ...] = (),
    text: str | None = None,
    task: bytes | None = None,
) -> None:
    """Write a `KvFile`. An existing file is replaced in one step, or stays unchanged.

    Args:
        path: the file to write.
        metadata: all but the hashes, which are computed here.
        keys_values: (2·layers, H, T, p).
        dtype: type in which the keys and values are stored.
        ids: T token ids; empty for a learned prefix.
        text: the baked text; None for the other kinds.
        task: what a prefix is for, the content of a task file; None for none, and for states.

    Raises:
        StateError, PrefixError: a key or value is NaN, infinite, or too large for `dtype`; a state's is a StateError.
        OSError: the file cannot be written.
    """
    from safetensors.numpy import save

    with np.errstate(over="ignore"):
        # safetensors would write the memory of an array that is not contiguous as it lies.
        stored = np.ascontiguousarray(keys_values, np.dtype(dtype).newbyteorder("<"))
    if not _all_finite(stored):
        error = StateError if metadata.kind == "state" else PrefixError
        advice = ": use float32" if dtype == "float16" else ""
        raise error(f"cannot write {os.fspath(path)!r}: a key or value is NaN or does not fit into {dtype}{advice}")
    tensors: dict[str, npt.NDArray[Any]] = {"keys_values": stored}
    if ids:
        tensors["token_ids"] = np.array(ids, "<u4")
    if text is not None:
        tensors["text"] = np.frombuffer(text.encode(), np.uint8)
    stated = asdict(replace(metadata, sha256=_sha256(tensors), task_sha256=None))
    if task is None:
        del stated["task_sha256"]  # so that readers that know no tasks read the file
    else:
        tensors["task"] = np.frombuffer(task, np.uint8)
        stated["task_sha256"] = hashlib.sha256(task).hexdigest()
    facts = json.dumps(stated, ensure_ascii=False)
    content = save(tensors, {"edgelm_kv": facts})
    try:
        write_whole_file(Path(path), content)
    except OSError as error:  # it names the temporary file
        pass_interrupts_on(error)
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def read_kv_file(place: str | os.PathLike[str] | Extent, name: str, *kinds: KvKind) -> KvFile:
    """Read a file of one of `kinds`, which messages call `name`; check everything that needs no bundle.

    `place` is a path, or where the file lies in a bundle. Only the header, of a bounded length, is read before the
    sizes of the tensors are known to fit the file. Raises KvFileError if the file is of another kind or damaged, and
    OSError if it cannot be read.
    """
    path = place.path if isinstance(place, Extent) else Path(place)
    try:
        info = path.stat()
        check_small_file(info, _MAX_FILE_BYTES)
    except SmallFileError as error:
        raise KvFileError(f"it {error}") from None
    begin, size_bytes = (place.offset, place.size_bytes) if isinstance(place, Extent) else (0, info.st_size)
    with path.open("rb") as stream:
        stream.seek(begin)
        start = stream.read(_LENGTH_BYTES + 1)
        if not is_safetensors(start):
            raise KvFileError(f"it is no {name}")
        header_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise KvFileError("its header is damaged")
        stream.seek(begin + _LENGTH_BYTES)
        header, metadata = _header(stream.read(header_bytes), name)
        if metadata.kind not in kinds:
            raise KvFileError(f"it is no {name}")
        if not header.fits(metadata):
            raise KvFileError("its header describes other tensors than such a file has")
        if header.task is not None and header.task.shape[0] > MAX_TASK_BYTES:
            raise KvFileError(f"its task has {header.task.shape[0]:,} bytes, more than {MAX_TASK_BYTES:,}")
        if not header.fills(size_bytes - _LENGTH_BYTES - header_bytes):
            raise KvFileError("its tensors do not fit the file")
        skipped = begin % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(stream.fileno(), skipped + size_bytes, access=mmap.ACCESS_READ, offset=begin - skipped)
        data = mapped if os.name == "posix" else mapped[:]  # Windows does not let a mapped file be replaced
    tensors: dict[str, npt.NDArray[Any]] = {}
    for key in ("keys_values", "token_ids", "text", "task"):
        if (tensor := getattr(header, key)) is not None:
            offset = skipped + _LENGTH_BYTES + header_bytes + tensor.data_offsets[0]
            array = np.frombuffer(data, _DTYPES[tensor.dtype], math.prod(tensor.shape), offset)
            tensors[key] = array.reshape(tensor.shape)
    if _sha256(tensors) != metadata.sha256 or not _all_finite(tensors["keys_values"]):
        raise KvFileError("its content is damaged")
    try:
        text = tensors["text"].tobytes().decode("utf-8") if "text" in tensors else None
    except UnicodeDecodeError:
        raise KvFileError("its text is damaged") from None
    task = tensors["task"].tobytes() if "task" in tensors else None
    if task is not None and hashlib.sha256(task).hexdigest() != metadata.task_sha256:
        raise KvFileError("its task is damaged")
    return KvFile(metadata, tensors["keys_values"], tensors.get("token_ids", np.empty(0, np.uint32)), text, task)


def is_safetensors(start: bytes) -> bool:
    """Whether a file that begins with `start`, its first 9 bytes or more, is a safetensors file, damaged or not.

    A text is never mistaken for one: the length of a header of less than 4 GiB ends with four zero bytes.
    """
    return start[4:9] == b"\0\0\0\0{"


@contextmanager
def named_errors(error: type[EdgelmError], name: str, path: str | os.PathLike[str], advice: str = "") -> Iterator[None]:
    """Turn the errors of `read_kv_file` into `error`, with the file's kind `name`, its path and `advice`."""
    try:
        yield
    except KvFileError as reason:
        raise error(f"cannot use the {name} {os.fspath(path)!r}: {reason}{advice}") from None
    except (OSError, ValueError) as reason:  # ValueError: a NUL byte in the path
        pass_interrupts_on(reason)
        words = (isinstance(reason, OSError) and reason.strerror) or reason
        raise error(f"cannot read the {name} {os.fspath(path)!r}: {words}") from None


def file_type(dtype: KvDtype | None, cache_type: CacheType) -> CacheType:
    """The type of keys and values in a file: `dtype`, or for None that of the cache, which changes no bit.

    Raises ConfigError if `dtype` is no `KvDtype`, or is given for a cache of integers.
    """
    if dtype is None:
        return cache_type
    if not isinstance(dtype, str) or dtype not in get_args(KvDtype):
        raise ConfigError(f"dtype must be {' or '.join(map(repr, get_args(KvDtype)))}, got {shown(dtype)}")
    if cache_type == "int8":
        raise ConfigError(f"this bundle's keys and values are int8, and stay so in a file: leave out dtype={dtype!r}")
    return dtype


def check_type(file: KvFile, cache_type: CacheType) -> None:
    """Raise KvFileError if the file has floats and the cache integers, or the other way round."""
    if (file.keys_values.dtype == np.int8) == (cache_type == "int8"):
        return
    if cache_type == "int8":
        raise KvFileError("it has floats, and this bundle's cache has integers: use one made without --int8-cache")
    raise KvFileError("it has integers, and this bundle's cache has floats")


def _header(text: bytes, name: str) -> tuple[_Header, KvMetadata]:
    try:
        content = parse_json(text)
        strings = content.get("__metadata__") if isinstance(content, dict) else None
        if not (isinstance(strings, dict) and strings.keys() == {"edgelm_kv"}):
            raise KvFileError(f"it is no {name}")
        header = from_json(_Header, content)
        facts = parse_json(header.__metadata__["edgelm_kv"].encode(errors="surrogatepass"))
        version = facts.get("format_version") if isinstance(facts, dict) else None
        if isinstance(version, int) and version != _FORMAT_VERSION:
            raise KvFileError(f"it has format_version {version}, this edgelm reads {_FORMAT_VERSION}")
        return header, from_json(KvMetadata, facts)
    except StrictJsonError as error:
        raise KvFileError(f"its header {error}") from None


def _sha256(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """Of all tensors but the task."""
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - {"task"}):
        digest.update(tensors[name].data)
    return digest.hexdigest()


def _all_finite(keys_values: KeysValues) -> bool:
    """Layer by layer, because a mask of all keys and values would take memory."""
    return all(bool(np.isfinite(layer).all()) for layer in keys_values)
