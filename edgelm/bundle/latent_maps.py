"""The two maps of a latent part, and its reference texts: files of arrays (`edgelm.bundle.array_file`).

Z latent dimensions, E hidden size, R = 2·layers·G·N·p numbers of a vector's prefix (G key-value heads, N positions, p
cached head dim), M texts, L tokens of the longest text. The maps, of the type that the manifest states:

    posterior_weight  (2·Z, E)   mean, then log variance: W h + b of the mean h of a text's hidden states
    posterior_bias    (2·Z,)
    prefix_weight     (R, Z)     keys and values: W z + b, in the form of the cache, (2·layers, G, N, p)
    prefix_bias       (R,)

The reference texts, uint32 and float32:

    lengths              (M,)     tokens of each text, the one before it included
    ids                  (M, L)   0 behind a text's end
    z                    (M, Z)   the vector behind which log-probabilities are measured
    source_mean, source_log_variance, bundle_mean, bundle_log_variance   (M, Z)
    source_logprobs, bundle_logprobs   (M, L)   of the following token, at the end of the end token; 0 behind it
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.bundle.array_file import ArrayLayout, read_arrays
from edgelm.bundle.folder import Bundle
from edgelm.bundle.latent_facts import LatentFacts, LatentReference
from edgelm.bundle.manifest import Architecture
from edgelm.errors import BundleError
from edgelm.ids import KeysValues

Vector = npt.NDArray[np.float32]
"""(Z,)"""


@dataclass(frozen=True, slots=True)
class LatentMaps:
    """The maps of a latent part, float32."""

    posterior_weight: npt.NDArray[np.float32]
    posterior_bias: npt.NDArray[np.float32]
    prefix_weight: npt.NDArray[np.float32]
    prefix_bias: npt.NDArray[np.float32]
    prefix_shape: tuple[int, int, int, int]
    """(2·layers, G, N, p)"""

    def posterior(self, hidden: npt.NDArray[np.float64]) -> tuple[Vector, Vector]:
        """Mean and log variance of q(z|x), (Z,) each, of a text's pooled hidden states, (E,)."""
        with np.errstate(over="ignore", invalid="ignore"):
            both = (self.posterior_weight @ hidden + self.posterior_bias).astype(np.float32)
        mean, log_variance = np.split(both, 2)
        return mean, log_variance

    def keys_values(self, z: Vector) -> KeysValues:
        """What `z` (Z,) puts before every layer, float32 (2·layers, G, N, p); infinite where `z` is too large."""
        with np.errstate(over="ignore", invalid="ignore"):
            rows = self.prefix_weight @ z + self.prefix_bias
        return rows.reshape(self.prefix_shape)


@dataclass(frozen=True, slots=True)
class LatentReferenceData:
    """The content of a file of reference texts; see the module."""

    lengths: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    z: npt.NDArray[np.float32]
    source_mean: npt.NDArray[np.float32]
    source_log_variance: npt.NDArray[np.float32]
    bundle_mean: npt.NDArray[np.float32]
    bundle_log_variance: npt.NDArray[np.float32]
    source_logprobs: npt.NDArray[np.float32]
    bundle_logprobs: npt.NDArray[np.float32]

    def text_ids(self, text: int) -> list[int]:
        """The ids of a text with the token before it, and without the end token."""
        ids: list[int] = self.ids[text, : self.lengths[text]].tolist()
        return ids


def prefix_shape(facts: LatentFacts, sizes: Architecture) -> tuple[int, int, int, int]:
    """Shape of a vector's prefix in the cache, (2·layers, G, N, p)."""
    return 2 * sizes.num_layers, sizes.num_key_value_heads, facts.prefix_tokens, sizes.head_dim


def read_latent_maps(bundle: Bundle) -> tuple[LatentFacts, LatentMaps]:
    """The latent part of `bundle`; raises BundleError if it has none, or if its file is damaged."""
    facts, sizes = _facts_of(bundle), bundle.manifest.architecture
    rows = math.prod(prefix_shape(facts, sizes))
    kind = np.dtype("<f4" if facts.dtype == "float32" else "<f2")
    shapes = {
        "posterior_weight": (2 * facts.size, sizes.hidden_size),
        "posterior_bias": (2 * facts.size,),
        "prefix_weight": (rows, facts.size),
        "prefix_bias": (rows,),
    }
    arrays = _read(bundle, facts.file, [(name, kind, shape) for name, shape in shapes.items()])
    numbers = {name: array.astype(np.float32) for name, array in arrays.items()}
    return facts, LatentMaps(**numbers, prefix_shape=prefix_shape(facts, sizes))


def read_latent_reference(bundle: Bundle) -> tuple[LatentReference, LatentReferenceData]:
    """The reference texts of a bundle's latent part; raises BundleError if it has none, or if their file is damaged."""
    facts, sizes = _facts_of(bundle), bundle.manifest.architecture
    reference = facts.reference
    if reference is None:
        raise BundleError(f"the latent part of {str(bundle.path)!r} has no reference to measure it against")
    arrays = _read(bundle, reference.file, _reference_layout(reference.texts, reference.longest, facts.size))
    lengths, ids = arrays["lengths"].astype(np.int64), arrays["ids"].astype(np.int64)
    longest = min(reference.longest, sizes.context_length - facts.prefix_tokens)
    if lengths.min() < 2 or lengths.max() > longest or ids.max() >= sizes.vocab_size:
        raise BundleError(f"{reference.file!r} holds a text of a wrong length, or a token id outside the vocabulary")
    return reference, LatentReferenceData(**{**arrays, "lengths": lengths, "ids": ids})


def encode_numbers(arrays: dict[str, npt.NDArray[Any]], dtype: str) -> bytes:
    """The bytes of `arrays`, one after another, as little-endian numbers of `dtype`."""
    return b"".join(array.astype(np.dtype(dtype).newbyteorder("<")).tobytes() for array in arrays.values())


def encode_latent_reference(data: LatentReferenceData) -> bytes:
    """The bytes of a file of reference texts with the content `data`."""
    texts, longest = data.ids.shape
    layout = _reference_layout(texts, longest, data.z.shape[1])
    return b"".join(getattr(data, name).astype(kind).tobytes() for name, kind, _ in layout)


def _reference_layout(texts: int, longest: int, size: int) -> ArrayLayout:
    whole, number = np.dtype("<u4"), np.dtype("<f4")
    shapes = {"lengths": (texts,), "ids": (texts, longest)}
    shapes |= {"source_logprobs": (texts, longest), "bundle_logprobs": (texts, longest)}
    names = [field.name for field in fields(LatentReferenceData)]
    return [(name, whole if name in ("lengths", "ids") else number, shapes.get(name, (texts, size))) for name in names]


def _facts_of(bundle: Bundle) -> LatentFacts:
    facts = bundle.manifest.latent
    if facts is None:
        raise BundleError(
            f"the bundle {str(bundle.path)!r} has no latent part: train a checkpoint with `edgelm finetune --latent`, "
            "and export it"
        )
    if facts.prefix_tokens + 2 > bundle.manifest.architecture.context_length:
        raise BundleError(
            f"the latent vectors of {str(bundle.path)!r} take {facts.prefix_tokens} tokens, which leaves no room in a "
            f"context of {bundle.manifest.architecture.context_length}: load it with a longer one"
        )
    return facts


def _read(bundle: Bundle, name: str, layout: ArrayLayout) -> dict[str, npt.NDArray[Any]]:
    """The arrays of the file `name`; raises BundleError if it has another size or a number that is not finite."""
    arrays = read_arrays(bundle, name, layout)
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise BundleError(f"{name!r} holds a NaN or infinity: it is damaged")
    return arrays
