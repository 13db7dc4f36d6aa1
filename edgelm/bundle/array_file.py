"""Files of a bundle that hold little-endian arrays, one after another, without a header.

Every size follows from ``bundle.json``, so such a file has exactly one right length.
"""

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgelm.bundle.folder import Bundle
from edgelm.bundle.small_files import SmallFileError
from edgelm.errors import BundleError, pass_interrupts_on

ArrayLayout: TypeAlias = list[tuple[str, np.dtype[Any], tuple[int, ...]]]
"""Name, type and shape of each array, in the file's order."""


def read_arrays(bundle: Bundle, file: str, layout: ArrayLayout) -> dict[str, npt.NDArray[Any]]:
    """The arrays of the file `file` by their names; raises BundleError if it cannot be read or has another size."""
    expected = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in layout)
    stated = bundle.manifest.files[file].size_bytes
    if stated != expected:
        raise BundleError(f"{file!r} has {stated:,} bytes, but bundle.json describes {expected:,}")
    try:
        raw = bundle.read_file(file, expected)
    except SmallFileError as error:
        raise BundleError(f"{file!r} {error}") from None
    except OSError as error:
        pass_interrupts_on(error)
        raise BundleError(f"cannot read {file!r} of {str(bundle.path)!r}: {error.strerror or error}") from None
    if len(raw) != expected:
        raise BundleError(f"{file!r} has {len(raw):,} bytes, but bundle.json describes {expected:,}")
    arrays: dict[str, npt.NDArray[Any]] = {}
    at = 0
    for name, dtype, shape in layout:
        count = math.prod(shape)
        arrays[name] = np.frombuffer(raw, dtype, count, at).reshape(shape)
        at += count * dtype.itemsize
    return arrays
