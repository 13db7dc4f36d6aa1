"""The reference file: tokens, and the log-probabilities that source and bundle gave them when the bundle was made.

The file holds arrays without a header (`edgelm.bundle.array_file`). T tokens, K likeliest tokens of the source at a
position, V vocabulary:

    ids          (T,)    uint16, or uint32 where V > 65,536
    top_ids      (T, K)  the type of ids; the source's likeliest token first
    source_top   (T, K)  uint16: negative log-probability in 1/1024 nat, capped at 65,535 (64 nats)
    bundle_top   (T, K)  uint16: of the same tokens
    source_next  (T,)    uint16: of the next token of the row; 0 at a row's end
    bundle_next  (T,)    uint16
    bundle_mean  (V,)    float32: the bundle's mean log-probability of every token over the T positions, in nats
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.bundle.array_file import ArrayLayout, read_arrays
from edgelm.bundle.certificate import Reference
from edgelm.bundle.folder import Bundle
from edgelm.errors import BundleError
from edgelm.ids import IdArray, Logprobs

STEPS_PER_NAT = 1024
_CAP = 65_535


@dataclass(frozen=True, slots=True)
class ReferenceData:
    """The content of a reference file. Log-probabilities are in nats."""

    ids: IdArray  # (T,)
    top_ids: IdArray  # (T, K)
    source_top: Logprobs  # (T, K)
    bundle_top: Logprobs  # (T, K)
    source_next: Logprobs  # (T,)
    bundle_next: Logprobs  # (T,)
    bundle_mean: Logprobs  # (V,)


def read_reference(bundle: Bundle) -> tuple[Reference, ReferenceData]:
    """Read the reference of `bundle`; returns its facts from ``bundle.json`` and its content.

    Raises BundleError if the bundle has no reference, or if the file has another size than stated, an id outside the
    vocabulary, or a NaN or infinity.
    """
    if bundle.manifest.certificate is None:
        raise BundleError(
            f"the bundle {str(bundle.path)!r} has no certificate, so there is nothing to measure it against; "
            "check its files alone with --hashes-only"
        )
    facts, sizes = bundle.manifest.certificate.reference, bundle.manifest.architecture
    vocab, context = sizes.vocab_size, sizes.context_length
    if facts.row_tokens > context:
        raise BundleError(f"certificate.reference.row_tokens is {facts.row_tokens}, but the context holds {context}")
    stored = read_arrays(bundle, facts.file, _layout(facts, vocab))
    arrays = {name: _decoded(name, array) for name, array in stored.items()}
    if max(arrays["ids"].max(), arrays["top_ids"].max()) >= vocab or not np.isfinite(arrays["bundle_mean"]).all():
        raise BundleError(f"{facts.file!r} holds a token id outside the vocabulary, or a NaN or infinity")
    return facts, ReferenceData(**arrays)


def encode_reference(data: ReferenceData) -> bytes:
    """The bytes of a reference file with the content `data`."""
    return b"".join(
        _encoded(name, getattr(data, name)).astype(dtype).tobytes()
        for name, dtype in _types(len(data.bundle_mean)).items()
    )


def rows_of(facts: Reference, ids: IdArray) -> Iterator[IdArray]:
    """The rows of the reference tokens `ids` (T,). Feed each of them into an empty cache."""
    for start in range(0, len(ids), facts.row_tokens):
        yield ids[start : start + facts.row_tokens]


def rounded(log_probabilities: Logprobs) -> Logprobs:
    """Log-probabilities as they come back from a reference file."""
    return _decoded("source_top", _encoded("source_top", log_probabilities))


def _layout(facts: Reference, vocab: int) -> ArrayLayout:
    tokens, top = (facts.tokens,), (facts.tokens, facts.top_count)
    shapes = {"top_ids": top, "source_top": top, "bundle_top": top, "bundle_mean": (vocab,)}
    return [(name, dtype, shapes.get(name, tokens)) for name, dtype in _types(vocab).items()]


def _types(vocab: int) -> dict[str, np.dtype[Any]]:
    ids = np.dtype("<u2" if vocab <= 65_536 else "<u4")
    special = {"ids": ids, "top_ids": ids, "bundle_mean": np.dtype("<f4")}
    return {field.name: special.get(field.name, np.dtype("<u2")) for field in fields(ReferenceData)}


def _encoded(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if name in ("ids", "top_ids", "bundle_mean"):
        return values
    capped: npt.NDArray[Any] = np.minimum(np.rint(-values * STEPS_PER_NAT), _CAP)
    return capped


def _decoded(name: str, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if name in ("ids", "top_ids"):
        return stored.astype(np.int64)
    return stored.astype(np.float64) if name == "bundle_mean" else stored / -float(STEPS_PER_NAT)
