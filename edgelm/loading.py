"""From a bundle's folder to a `Model`: reads, checks, loads; and what a pickled model becomes."""

import os
import time
from typing import TypedDict

from edgelm.bundle import Bundle
from edgelm.bundle_parts import bundle_config, bundle_tokenizer, default_bundle_path
from edgelm.errors import ConfigError
from edgelm.generation_config import GenerationConfig
from edgelm.memory_forecast import refuse_if_too_large
from edgelm.model import Model
from edgelm.prefix_file import baked_prefix, read_prefix
from edgelm.session import Session


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    shared_threads: bool = False,
    prefix_cache_bytes: int = 0,
    prefix: str | os.PathLike[str] | None = None,
    batch_invariant: bool = False,
) -> Model:
    """Load a bundle.

    Args:
        path: the bundle's folder; None for the model embedded in the package.
        device: "auto", "cpu", "cuda" or "cuda:N"; an explicit device never falls back.
        threads: CPU threads; None for all CPUs this process may use.
        shared_threads: whether to run on threads that all models of the process share (all or none must): fewer
            threads, but slower, and no use after a fork.
        prefix_cache_bytes: a prompt that begins like an earlier one is computed from where they differ. The last
            prompt is kept in any case, others while all take no more memory than this.
        prefix: a file of keys and values to stand before every prompt (docs/embedding.md), instead of the one that
            lies in the bundle, if any.
        batch_invariant: whether `generate` computes as `generate_batch` and the scheduler do, to the same bits in
            every recipe; a text alone is then slower (docs/embedding.md has by how much). CPU only.

    Raises:
        BundleError: the folder is no valid bundle, or its parts disagree.
        DeviceError: ONNX Runtime is missing or the device cannot be used.
        TokenizerError: the bundle's tokenizer cannot be read.
        PrefixError: the prefix cannot be read, or was made for another model.
        InsufficientMemoryError: the model would not fit into the memory this process may use.
        ConfigError: `prefix_cache_bytes` is no number of bytes.
    """
    if isinstance(prefix_cache_bytes, bool) or not (isinstance(prefix_cache_bytes, int) and prefix_cache_bytes >= 0):
        raise ConfigError(f"prefix_cache_bytes must be a whole number from 0, got {prefix_cache_bytes!r}")
    started = time.perf_counter()
    bundle = Bundle.read(default_bundle_path() if path is None else path)
    before = baked_prefix(bundle) if prefix is None else read_prefix(prefix, bundle)
    refuse_if_too_large(bundle, 0 if before is None else before.size_bytes)
    tokenizer = bundle_tokenizer(bundle)
    config = bundle_config(bundle)
    session = Session.open(
        bundle, device=device, threads=threads, shared_threads=shared_threads, batch_invariant=batch_invariant
    )
    seconds = time.perf_counter() - started
    return Model(
        bundle, tokenizer, session, config, load_seconds=seconds, prefix_cache_bytes=prefix_cache_bytes, prefix=before
    )


class LoadOptions(TypedDict):
    """The options of `load`, which a pickled model carries."""

    device: str
    threads: int
    shared_threads: bool
    prefix_cache_bytes: int
    prefix: str | None
    batch_invariant: bool


def loaded_as(path: str, options: LoadOptions, config: GenerationConfig) -> Model:
    """What a pickled model becomes."""
    model = load(path, **options)
    model.generation_config = config
    return model
