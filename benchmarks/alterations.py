"""Ways to alter the weights of a bundle, after which its hashes and its digest are updated, as an attacker would."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from edgelm.bundle.folder import file_fact
from edgelm.bundle.manifest import digest_of

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """The place of a tensor in the weights file, in bytes."""

    name: str
    offset: int
    length: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def stored_tensors(bundle: Path) -> list[Stored]:
    """The tensors of the weights file, in the order of the file."""
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    tensors = []
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
            tensors.append(Stored(tensor.name, int(place["offset"]), int(place["length"]), dtype, tuple(tensor.dims)))
    return sorted(tensors, key=lambda stored: stored.offset)


def alter(bundle: Path, name: str, change: Callable[[Array], Array]) -> None:
    """Replace the tensor `name` by what `change` makes of it, then update hashes and digest."""
    stored = next(tensor for tensor in stored_tensors(bundle) if tensor.name == name)
    path = bundle / "model.onnx.data"
    data = bytearray(path.read_bytes())
    raw = bytes(data[stored.offset : stored.offset + stored.length])
    original: Array = np.frombuffer(raw, stored.dtype).reshape(stored.shape)
    altered = change(original.copy()).astype(stored.dtype)
    assert altered.shape == original.shape and not np.array_equal(altered, original), "the alteration changes nothing"
    data[stored.offset : stored.offset + stored.length] = altered.tobytes()
    path.write_bytes(data)
    fix_up(bundle)


def fix_up(bundle: Path) -> None:
    """Update sizes, hashes and digest in ``bundle.json`` after files have changed."""
    path = bundle / "bundle.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name in content["files"]:
        fact = file_fact(bundle / name)
        content["files"][name] = {"size_bytes": fact.size_bytes, "sha256": fact.sha256}
    content["digest"] = digest_of(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def zeroed(array: Array) -> Array:
    """All weights zero; in unsigned 8-bit storage 128 stands for zero."""
    return np.full_like(array, 128 if array.dtype == np.uint8 else 0)


def two_rows_swapped(array: Array) -> Array:
    """The first row and the middle row swapped."""
    middle = len(array) // 2
    array[[0, middle]] = array[[middle, 0]]
    return array


def scaled(array: Array) -> Array:
    """All values times 1.05."""
    return array * np.float32(1.05)


def sign_flipped(array: Array) -> Array:
    """All values negated."""
    return -array


def low_bits_flipped(array: Array) -> Array:
    """The lowest bit of 3% of the bytes flipped, always the same ones."""
    raw = array.view(np.uint8).reshape(-1)
    chosen = np.random.default_rng(0).random(len(raw)) < 0.03
    raw[chosen] ^= 1
    return raw.view(array.dtype).reshape(array.shape)
