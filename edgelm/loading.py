"""The public door: `load` joins a bundle's graph, tokenizer and defaults into a `Model`."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from edgelm.bundle.folder import Bundle, default_bundle_path
from edgelm.bundle.manifest import TASK_FEATURE
from edgelm.bundle.small_files import check_path
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.engine.graph import Graph
from edgelm.engine.memory import fitting_piece
from edgelm.errors import BundleError, ConfigError
from edgelm.model import Model
from edgelm.reuse.pool import check_limit_bytes
from edgelm.reuse.prefix import Prefix, baked_prefix, read_prefix
from edgelm.text.tokenizer import Tokenizer


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    shared_threads: bool = False,
    prefix_cache_bytes: int = 0,
    prefix: str | os.PathLike[str] | None = None,
    task: str | os.PathLike[str] | None = None,
    batch_invariant: bool = False,
    context: int | None = None,
    draft: str | os.PathLike[str] | Literal[False] | None = None,
) -> Model:
    """Load a bundle.

    Args:
        path: the bundle: its folder, its packed file, the name of an installed package, or "owner/name" of what was
            pulled (`edgelm.bundle.locate`); None for the model embedded in the package.
        device: "auto", "cpu", "cuda" or "cuda:N"; an explicit device never falls back.
        threads: number of CPU threads; None for all CPUs that this process may use. Where the system refuses that many,
            the model runs on fewer, and a warning says so.
        shared_threads: whether to run on threads that all models of the process share: fewer threads, but slower, and
            unusable after a fork. Either all models of a process share threads or no model does.
        prefix_cache_bytes: memory for the keys and values of earlier prompts. A prompt that begins like an earlier one
            is computed from where they differ. The last prompt is kept even if it takes more memory.
        prefix: a file of keys and values that stand before every prompt (docs/embedding.md); it replaces the prefix
            in the bundle, if any. A task in the file replaces the bundle's task.
        task: a file that says what `Model.task` does (docs/tasks.md), in place of a task in the prefix or the bundle.
        batch_invariant: whether `generate` computes the same bits as `generate_batch` and the scheduler in every
            recipe; a text alone is then slower (docs/batches.md says by how much). CPU only.
        context: the longest text, in tokens; None for the bundle's own context. A shorter one needs less memory for
            keys and values, and the results stay the same.
        draft: a bundle, given as `path`, of a much smaller model with the same vocabulary; None for the one in the
            bundle, if any; False for none. `generate` and `stream` have it guess tokens, and check several guesses in
            one call: faster, with the text of the large model (docs/batches.md). Not with searches, prompt lookup, a
            window, a latent vector or `batch_invariant`.

    Raises:
        BundleError: there is no such bundle, it is not valid, or its parts disagree.
        DeviceError: ONNX Runtime is missing, or the device cannot be used.
        TokenizerError: the bundle's tokenizer cannot be read.
        PrefixError: the prefix cannot be read, was made for another model, or has a task that cannot be used.
        InsufficientMemoryError: the model would not fit into the memory that this process may use.
        ConfigError: `prefix_cache_bytes` is not a number of bytes, `path`, `prefix` or `task` is no path, the task
            cannot be used, `context` is longer than the bundle's own, or the vocabulary of `draft` is another one.
    """
    check_limit_bytes("prefix_cache_bytes", prefix_cache_bytes)
    other_draft = None if draft is False else draft
    for name, place in (("path", path), ("prefix", prefix), ("task", task), ("draft", other_draft)):
        if place is not None:
            check_path(name, place)
    started = time.perf_counter()
    bundle = Bundle.read(default_bundle_path() if path is None else path)
    if context is not None:
        bundle = bundle.with_context(context)
    kept = baked_prefix(bundle) if prefix is None else read_prefix(prefix, bundle)
    piece_tokens = fitting_piece(bundle, 0 if kept is None else kept.size_bytes)
    tokenizer = Tokenizer.of_bundle(bundle)
    config = GenerationConfig.of_bundle(bundle)
    task_format, of_prefix = None, kept is not None and kept.task is not None
    if task is not None or of_prefix or TASK_FEATURE in bundle.manifest.required_features:
        from edgelm.generation.task_format import TaskFormat

        task_format = TaskFormat.of_bundle(bundle, tokenizer, config, task, kept)
    graph = Graph.open(
        bundle,
        device=device,
        threads=threads,
        shared_threads=shared_threads,
        batch_invariant=batch_invariant,
        piece_tokens=piece_tokens,
    )
    drafting = _open_draft(None if draft is False else bundle.draft, other_draft, graph, tokenizer)
    drafts_again: str | Literal[False] | None = False if draft is False else None
    if other_draft is not None and drafting is not None:
        drafts_again = os.fspath(drafting.bundle.path)
    arguments = LoadArguments(
        path=None if path is None else os.fspath(bundle.path),
        device=device,
        threads=threads,
        shared_threads=shared_threads,
        prefix_cache_bytes=prefix_cache_bytes,
        prefix=None if prefix is None or kept is None else os.fspath(kept.path),
        task=None if task is None else os.fspath(Path(task).absolute()),
        batch_invariant=batch_invariant,
        context=context,
        draft=drafts_again,
    )
    seconds = time.perf_counter() - started
    return Model(
        graph,
        tokenizer,
        config,
        load_seconds=seconds,
        prefix_cache_bytes=prefix_cache_bytes,
        prefix=kept,
        task_format=task_format,
        draft=drafting,
        loaded_as=arguments,
    )


def _open_draft(
    own: Bundle | None, path: str | os.PathLike[str] | None, target: Graph, tokenizer: Tokenizer
) -> Graph | None:
    """Load the graph that drafts for `target`: that of the bundle at `path`, or else `own`, which is in the target's.

    One thread is enough for a small model. Two graphs with threads of their own would wait for work on the same CPUs.
    Raises as `load`.
    """
    try:
        bundle = own if path is None else Bundle.read(path)
        if bundle is None:
            return None
        if path is not None and Tokenizer.of_bundle(bundle).vocabulary() != tokenizer.vocabulary():
            raise ConfigError(
                f"draft is {os.fspath(path)!r}, whose vocabulary is another one than that of {target.bundle.name!r}: "
                "give a bundle whose model was trained with the same tokenizer"
            )
        return Graph.open(
            bundle,
            device=str(target.device),
            threads=1,
            shared_threads=target.shared_threads,
            piece_tokens=fitting_piece(bundle),
        )
    except BaseException:
        target.close()
        raise


@dataclass(frozen=True, slots=True)
class LoadArguments:
    """The arguments of `load`, with absolute paths."""

    path: str | None
    device: str
    threads: int | None
    shared_threads: bool
    prefix_cache_bytes: int
    prefix: str | None
    task: str | None
    batch_invariant: bool
    context: int | None
    draft: str | Literal[False] | None

    def again(self, digest: str, config: GenerationConfig) -> Model:
        """The model that a pickle describes; raises BundleError if there is another bundle now, of another `digest`."""
        model = load(
            self.path,
            device=self.device,
            threads=self.threads,
            shared_threads=self.shared_threads,
            prefix_cache_bytes=self.prefix_cache_bytes,
            prefix=self.prefix,
            task=self.task,
            batch_invariant=self.batch_invariant,
            context=self.context,
            draft=self.draft,
        )
        if model.bundle.manifest.digest != digest:
            place = os.fspath(model.bundle.path)
            model.close()
            raise BundleError(f"{place!r} is not the bundle of the pickled model: load it here, or pickle it again")
        model.generation_config = config
        return model

    def behind(self, prefix: Prefix, prefix_cache_bytes: int, task: str | os.PathLike[str] | None) -> "LoadArguments":
        """The arguments of the model that `Model.with_prefix` makes; `task` None leaves the task to the prefix."""
        kept = self.task if prefix.task is None else None
        return replace(
            self,
            prefix=os.fspath(prefix.path),
            prefix_cache_bytes=prefix_cache_bytes,
            task=kept if task is None else os.fspath(Path(task).absolute()),
        )
