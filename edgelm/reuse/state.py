"""A prompt's keys and values in a file, so that another process need not compute them."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgelm.bundle.manifest import Manifest
from edgelm.errors import StateError
from edgelm.ids import KeysValues, shared_tokens
from edgelm.reuse.kv_file import (
    KvDtype,
    KvFileError,
    KvMetadata,
    check_type,
    file_type,
    named_errors,
    read_kv_file,
    write_kv_file,
)


@dataclass(frozen=True, slots=True)
class PromptState:
    """Token ids (T,) and their keys and values, (2·layers, H, T, p)."""

    ids: tuple[int, ...]
    content: KeysValues


def write_state(
    path: str | os.PathLike[str],
    manifest: Manifest,
    state: PromptState,
    dtype: KvDtype | None = None,
    prefix: str | None = None,
) -> None:
    """Write a state, computed by the bundle of `manifest` behind the learned prefix with the SHA-256 `prefix`.

    An existing file is replaced in one step, or stays unchanged. Without `dtype` the file has the cache's type. Raises
    ConfigError as `file_type`, StateError if a key or value does not fit into `dtype`, and OSError if the file cannot
    be written.
    """
    metadata = KvMetadata("state", manifest.source.name, manifest.digest, prefix)
    write_kv_file(path, metadata, state.content, file_type(dtype, manifest.graph.kv_dtype), state.ids)


def read_state(path: str | os.PathLike[str], manifest: Manifest, prefix: str | None = None) -> PromptState:
    """Read a state that the bundle of `manifest` wrote behind the learned prefix with the SHA-256 `prefix`.

    Raises StateError if the file is missing, damaged, or was made with another bundle or learned prefix.
    """
    facts = manifest.architecture
    with named_errors(StateError, "state", path, "; remove it and save it again"):
        file = read_kv_file(path, "state of a prompt", "state")
        if file.metadata.made_for != manifest.digest:
            raise KvFileError("it was made with another bundle")
        if file.metadata.prefix != prefix:
            raise KvFileError("it was made with another prefix, or with none")
        check_type(file, manifest.graph.kv_dtype)
        tokens = len(file.ids)
        if tokens > facts.context_length:
            raise KvFileError(f"it has {tokens} tokens, more than the context of {facts.context_length} holds")
        if file.keys_values.shape != (2 * facts.num_layers, facts.num_key_value_heads, tokens, facts.head_dim):
            raise KvFileError("its keys and values do not have this bundle's sizes")
        if file.ids.max() >= facts.vocab_size:
            raise KvFileError("it contains a token id outside the vocabulary")
    return PromptState(tuple(file.ids.tolist()), file.keys_values)


def most_shared(states: Iterable[PromptState], prompt: Sequence[int]) -> tuple[KeysValues | None, int]:
    """The keys and values of the first n tokens of `prompt`, from the state that shares most tokens with it, and n.

    They are None and 0 where no state shares a token.
    """
    best = max(states, key=lambda state: shared_tokens(state.ids, prompt), default=None)
    count = 0 if best is None else shared_tokens(best.ids, prompt)
    return (best.content[:, :, :count], count) if best is not None and count else (None, 0)
