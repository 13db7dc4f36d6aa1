"""Ways to alter a bundle's weights behind its back, with hashes and digest fixed up as an attacker would."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from edgelm.bundle.folder import file_fact
from tests.conftest import edit_manifest

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies in the weights file."""

    name: str
    offset: int
    length: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def stored_tensors(bundle: Path) -> list[Stored]:
    """The tensors of the weights file, in its order."""
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    found = []
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
            found.append(Stored(tensor.name, int(place["offset"]), int(place["length"]), dtype, tuple(tensor.dims)))
    return sorted(found, key=lambda stored: stored.offset)


def alter(bundle: Path, name: str, change: Callable[[Array], Array]) -> None:
    """Replace the tensor `name` by `change` of it, and make the bundle consistent again."""
    stored = next(tensor for tensor in stored_tensors(bundle) if tensor.name == name)
    path = bundle / "model.onnx.data"
    data = bytearray(path.read_bytes())
    raw = bytes(data[stored.offset : stored.offset + stored.length])
    before: Array = np.frombuffer(raw, stored.dtype).reshape(stored.shape)
    after = change(before.copy()).astype(stored.dtype)
    assert after.shape == before.shape and not np.array_equal(after, before), "the alteration changes nothing"
    data[stored.offset : stored.offset + stored.length] = after.tobytes()
    path.write_bytes(data)
    fix_up(bundle)


def fix_up(bundle: Path) -> None:
    """Hashes and digest of what the folder now holds."""

    def restate(content: dict[str, Any]) -> None:
        for name in content["files"]:
            fact = file_fact(bundle / name)
            content["files"][name] = {"size_bytes": fact.size_bytes, "sha256": fact.sha256}

    edit_manifest(bundle, restate)


def zeroed(array: Array) -> Array:
    """Every weight 0, or the code that stands for it."""
    return np.full_like(array, 128 if array.dtype == np.uint8 else 0)


def two_rows_swapped(array: Array) -> Array:
    """The first row, and the one in the middle."""
    middle = len(array) // 2
    array[[0, middle]] = array[[middle, 0]]
    return array


def scaled(array: Array) -> Array:
    """5% larger."""
    return array * np.float32(1.05)


def sign_flipped(array: Array) -> Array:
    """Of every scale."""
    return -array


def low_bits_flipped(array: Array) -> Array:
    """Of 3% of the bytes."""
    raw = array.view(np.uint8).reshape(-1)
    chosen = np.random.default_rng(0).random(len(raw)) < 0.03
    raw[chosen] ^= 1
    return raw.view(array.dtype).reshape(array.shape)
