"""KV files with one error, made of a correct file."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from edgelm.reuse.kv_file import _sha256

Damage = Callable[[bytes], bytes]
Tensors = dict[str, npt.NDArray[Any]]


def split(content: bytes) -> tuple[str, bytes]:
    """The header without padding, and the bytes after it."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end].decode().strip(), content[end:]


def joined(header: str, data: bytes) -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + data


def header_replaced(content: bytes, old: str, new: str) -> bytes:
    """The file with another text as its safetensors header."""
    header, data = split(content)
    assert header.count(old) == 1
    return joined(header.replace(old, new), data)


def header_changed(content: bytes, tensor: str, **fields: object) -> bytes:
    """The file with other fields of one tensor in its safetensors header."""
    text, data = split(content)
    header = json.loads(text)
    header[tensor] |= fields
    return joined(json.dumps(header), data)


def facts_changed(content: bytes, **facts: object) -> bytes:
    """The file with other facts in its metadata."""
    text, data = split(content)
    header = json.loads(text)
    said = json.loads(header["__metadata__"]["edgelm_kv"]) | facts
    return joined(json.dumps(header | {"__metadata__": {"edgelm_kv": json.dumps(said)}}), data)


def saved_again(content: bytes, change: Callable[[Tensors], Tensors], **facts: object) -> bytes:
    """The file with other tensors, whose hash is right, and other facts."""
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in change(load(content)).items()}
    metadata = json.loads(split(content)[0])["__metadata__"]
    return facts_changed(save(tensors, metadata), sha256=_sha256(tensors), **facts)
