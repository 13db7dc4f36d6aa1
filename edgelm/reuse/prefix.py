"""A prefix: keys and values that stand before every prompt, in a file. Two origins, one format.

- A *text* (a system prompt, few-shot examples), computed by a bundle: it fits that bundle's graph alone, and is as good
  as the text itself put before every prompt.
- *Learned* keys and values of virtual tokens (prefix-tuning: Li and Liang, arXiv 2101.00190): they have no ids, and fit
  every bundle made of the checkpoint they were learned with.

The payload (see `kv_file`; `docs/bundle-format.md` has the header): of a text the token ids (uint32) first, then
keys and values, and then of a text its UTF-8 bytes.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import PREFIX_FILE, VALUE_DIVISORS_FILE, Manifest
from edgelm.bundle.strict_json import Bytes, Count
from edgelm.errors import PrefixError
from edgelm.ids import LEAST_TOKENS, KeysValues
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

PREFIX_MAGIC = b"EDGELMPX"
_FORMAT = KvFormat(PREFIX_MAGIC, 1, "prefix file")

_SHOWN_CHARACTERS = 60

LEAST_ROOM_TOKENS = 8
"""A prefix leaves at least so much of the context to a prompt and its continuation."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """What stands before every prompt, as one bundle's cache takes it."""

    text: str | None
    """None where it was learned."""
    ids: tuple[int, ...]
    """The text's tokens; none where it was learned."""
    content: KeysValues
    """(2·layers, H, T, p)."""
    sha256: str
    """Of its file's payload: tells prefixes apart."""
    path: Path
    """Its file, absolute."""

    @property
    def tokens(self) -> int:
        """T: how much of the context it takes."""
        return int(self.content.shape[2])

    @property
    def size_bytes(self) -> int:
        """What its keys and values take in memory."""
        return self.content.nbytes


@dataclass(frozen=True, slots=True)
class _Header(KvHeader):
    kind: Literal["text", "learned"]
    num_layers: Count
    num_heads: Count
    head_dim: Count
    """Of a text the cache's, whose padding holds tiny numbers after rounding; of a learned one the checkpoint's."""
    source: str
    """Name of the checkpoint."""
    made_for: str
    """SHA-256: of a text's `graph_identity`, of a learned prefix's `Source.body_sha256`."""
    text_bytes: Bytes

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 2 * self.num_layers, self.num_heads, self.tokens, self.head_dim


def write_learned_prefix(
    path: str | os.PathLike[str],
    keys_values: KeysValues,
    *,
    source: str,
    body_sha256: str,
    dtype: KvDtype = "float32",
) -> None:
    """Write the keys and values of virtual tokens, to be used with every bundle of one checkpoint.

    Real tokens then have the positions T, T + 1, ...

    Args:
        keys_values: float32 (2·layers, H, T, h): each layer's keys and then its values, h the checkpoint's head dim.
        source: the checkpoint's name, for messages.
        body_sha256: of the checkpoint (`edgelm_export.source.fingerprint.body_sha256`).
        dtype: "float16" halves the file.

    Raises:
        PrefixError: the shape is another, or a number is none or does not fit.
        OSError: the file cannot be written.
    """
    if keys_values.ndim != 4 or keys_values.shape[0] % 2 or 0 in keys_values.shape:
        raise PrefixError(f"keys and values must be of shape (2·layers, heads, tokens, head dim): {keys_values.shape}")
    _write(path, keys_values, "learned", (), None, source, body_sha256, dtype)


def write_text_prefix(
    path: str | os.PathLike[str],
    manifest: Manifest,
    text: str,
    ids: tuple[int, ...],
    content: KeysValues,
    dtype: KvDtype,
) -> None:
    """Write a text with its token ids (T,) and what the bundle of `manifest` made of them, (2·layers, H, T, p).

    Raises:
        PrefixError: a number does not fit into `dtype`.
        OSError: the file cannot be written.
    """
    _write(path, content, "text", ids, text, manifest.source.name, graph_identity(manifest), dtype)


def read_prefix(path: str | os.PathLike[str], bundle: Bundle) -> Prefix:
    """Read a prefix file, which must be whole and made for this bundle.

    Raises:
        PrefixError: it is not.
    """
    manifest = bundle.manifest
    try:
        header, payload = _FORMAT.read(path, _Header, lambda header: _payload_bytes(header, manifest))
        id_bytes = 4 * header.tokens if header.kind == "text" else 0
        ids = np.frombuffer(payload, "<u4", id_bytes // 4)
        content_end = len(payload) - header.text_bytes
        content = content_from_bytes(payload[id_bytes:content_end], header.dtype, header.shape)
        text = payload[content_end:].decode("utf-8") if header.kind == "text" else None
        if len(ids) and ids.max() >= manifest.architecture.vocab_size:
            raise KvFileError("its content is damaged")
        divisors = _value_divisors(bundle) if header.kind == "learned" else None
    except (KvFileError, UnicodeDecodeError) as error:
        reason = str(error) if isinstance(error, KvFileError) else "its text is damaged"
        raise PrefixError(f"cannot use the prefix {os.fspath(path)!r}: {reason}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise PrefixError(f"cannot read the prefix {os.fspath(path)!r}: {reason}") from None
    padding = manifest.architecture.head_dim - header.head_dim
    content = np.pad(content, [(0, 0)] * 3 + [(0, padding)])
    if divisors is not None:
        content = content.astype(np.float32)
        content[1::2] /= divisors
    return Prefix(text, tuple(ids.tolist()), content, header.sha256, Path(path).absolute())


def learned_for(path: str | os.PathLike[str]) -> str:
    """The `Source.body_sha256` that the learned prefix in the file `path` fits.

    Raises:
        PrefixError: it is damaged, or a text's.
        OSError: it cannot be read.
    """
    try:
        header, _ = _FORMAT.read(path, _Header, _said_bytes)
    except KvFileError as error:
        raise PrefixError(str(error)) from None
    if header.kind == "text":
        raise PrefixError("its text was computed with another bundle: give the text itself")
    return header.made_for


def baked_prefix(bundle: Bundle) -> Prefix | None:
    """The bundle's own prefix; None where it has none.

    Raises:
        PrefixError: it does not fit the bundle.
    """
    return read_prefix(bundle.file(PREFIX_FILE), bundle) if PREFIX_FILE in bundle.manifest.files else None


def shortened(text: str) -> str:
    """A text on one line, quoted, for people to know it by."""
    return json.dumps(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...", ensure_ascii=False)


def learned_sha256(prefix: Prefix | None) -> str | None:
    """What tells apart the learned prefixes that a prompt's keys and values depend on beside its ids."""
    return prefix.sha256 if prefix is not None and prefix.text is None else None


def check_length(tokens: int, context_length: int) -> None:
    """Raises PrefixError where a prefix is too short or leaves no room."""
    if tokens < LEAST_TOKENS:
        raise PrefixError(f"a prefix needs {LEAST_TOKENS} tokens at least, this text has {tokens}: give more")
    if tokens + LEAST_ROOM_TOKENS > context_length:
        raise PrefixError(
            f"the prefix has {tokens} tokens, but this model's context of {context_length} holds a prefix of "
            f"{max(0, context_length - LEAST_ROOM_TOKENS)} at most: shorten it"
        )


def graph_identity(manifest: Manifest) -> str:
    """SHA-256 of what decides the keys and values of a text: the graph, its weights, the tokenizer."""
    graph = manifest.graph
    names = (graph.file, graph.weights_file, "tokenizer.json")
    return hashlib.sha256("".join(manifest.files[name].sha256 for name in names).encode()).hexdigest()


def _write(
    path: str | os.PathLike[str],
    content: KeysValues,
    kind: Literal["text", "learned"],
    ids: tuple[int, ...],
    text: str | None,
    source: str,
    made_for: str,
    dtype: KvDtype,
) -> None:
    encoded = (text or "").encode()
    try:
        payload = np.array(ids, "<u4").tobytes() + content_to_bytes(content, dtype) + encoded
    except KvFileError as error:
        raise PrefixError(f"cannot write the prefix {os.fspath(path)!r}: {error}") from None
    layers, heads, tokens, head_dim = content.shape
    header = _Header(
        _FORMAT.version,
        tokens,
        dtype,
        sha256_of(payload),
        kind=kind,
        num_layers=layers // 2,
        num_heads=heads,
        head_dim=head_dim,
        source=source,
        made_for=made_for,
        text_bytes=len(encoded),
    )
    _FORMAT.write(path, header, payload)


def _payload_bytes(header: _Header, manifest: Manifest) -> int:
    """The length a header says, once it fits the bundle."""
    facts, source = manifest.architecture, manifest.source
    head_dim = facts.head_dim if header.kind == "text" else facts.source_head_dim
    of_bundle = facts.num_layers, facts.num_key_value_heads, head_dim
    if (header.num_layers, header.num_heads, header.head_dim) != of_bundle:
        raise KvFileError(f"it was made for a model of other sizes ({header.source!r}), not for {source.name!r}")
    if header.kind == "text" and header.made_for != graph_identity(manifest):
        raise KvFileError("its text was computed with another bundle: make it again with `edgelm bake`")
    if header.kind == "learned" and source.body_sha256 is None:
        raise KvFileError("this bundle does not say which weights it was made of: export it again")
    if header.kind == "learned" and header.made_for != source.body_sha256:
        raise KvFileError(f"it was learned with other weights ({header.source!r}) than this bundle has")
    try:
        check_length(header.tokens if header.kind == "text" else max(LEAST_TOKENS, header.tokens), facts.context_length)
    except PrefixError as error:
        raise KvFileError(str(error)) from None
    return _said_bytes(header)


def _said_bytes(header: _Header) -> int:
    ids_bytes = 4 * header.tokens if header.kind == "text" else 0
    return ids_bytes + content_bytes(header.dtype, header.shape) + header.text_bytes


def _value_divisors(bundle: Bundle) -> KeysValues | None:
    """What smoothing divided the values of each layer by, (layers, H, 1, p); None where it did not.

    Raises:
        KvFileError: the bundle does not say it.
    """
    manifest = bundle.manifest
    facts = manifest.architecture
    if VALUE_DIVISORS_FILE not in manifest.files:
        if manifest.recipe.calibration_tokens is None:
            return None
        raise KvFileError("this bundle does not say how its values were scaled: export it again")
    divisors = np.frombuffer(bundle.file(VALUE_DIVISORS_FILE).read_bytes(), "<f4")
    shape = facts.num_layers, facts.num_key_value_heads, 1, facts.head_dim
    if divisors.size != np.prod(shape) or not (np.isfinite(divisors).all() and (divisors > 0).all()):
        raise KvFileError(f"the bundle's {VALUE_DIVISORS_FILE} is damaged")
    return divisors.reshape(shape)
