"""A prefix: keys and values that stand before every prompt. Two origins, one format (`kv_file`).

- A *text* (a system prompt, few-shot examples), baked by a bundle: it fits that bundle's graph alone. Results are the
  same as with the text itself before every prompt.
- *Learned* keys and values of virtual tokens (prefix-tuning: Li and Liang, arXiv 2101.00190): they have no ids, and fit
  every bundle made of the checkpoint they were learned with.

The file of either may also state a task, so that one bundle does several jobs, one for each prefix.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from edgelm.bundle.folder import Bundle, Extent
from edgelm.bundle.manifest import PREFIX_FILE, VALUE_DIVISORS_FILE, Manifest
from edgelm.bundle.small_files import SmallFileError
from edgelm.bundle.strict_json import StrictJsonError
from edgelm.engine.session import Session
from edgelm.errors import PrefixError, PromptError, shown
from edgelm.ids import LEAST_TOKENS, KeysValues, common_prefix
from edgelm.reuse.kv_file import (
    KvDtype,
    KvFile,
    KvFileError,
    KvMetadata,
    check_type,
    file_type,
    named_errors,
    read_kv_file,
    write_kv_file,
)
from edgelm.text.prompts import Prompt, prompt_ids
from edgelm.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # few prefixes have a task
    from edgelm.bundle.manifest import CacheType
    from edgelm.bundle.task import Task, TaskFile

LEAST_ROOM_TOKENS = 8
"""A prefix leaves at least this many tokens of the context to a prompt and its continuation."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The keys and values that stand before every prompt, in the form of one bundle's cache."""

    text: str | None
    """None for a learned prefix."""
    ids: tuple[int, ...]
    """The text's T tokens; empty for a learned prefix."""
    content: KeysValues
    """(2·layers, H, T, p): float32 or float16, or int8 where the bundle's cache is."""
    sha256: str
    """SHA-256 of its file's tensors, which identifies the prefix."""
    path: Path
    """Its file, absolute."""
    task: "Task | None" = None
    """What the prefix is for, which takes the place of the bundle's task."""

    @property
    def tokens(self) -> int:
        """T: number of tokens of the context that the prefix takes."""
        return int(self.content.shape[2])

    @property
    def size_bytes(self) -> int:
        """Size of its keys and values in memory."""
        return self.content.nbytes


class PromptEncoder:
    """Token ids of prompts behind a prefix.

    Where the prefix is a text, the text and the prompt are tokenized together, and the ids begin with the prefix's.
    A learned prefix has no ids: sessions begin behind it without the encoder.
    """

    def __init__(self, tokenizer: Tokenizer, prefix: Prefix | None = None, bos_token_id: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._bos_token_id = bos_token_id
        self._prefix = prefix if prefix is not None and prefix.text is not None else None
        self.learned_tokens = 0 if prefix is None or prefix.text is not None else prefix.tokens
        """Number of virtual tokens before every prompt, which no list of ids contains."""

    def ids(self, prompt: Prompt, name: str = "prompt") -> list[int]:
        """The token ids of `prompt`, a text or a list of ids, behind the prefix's ids. Messages call it `name`.

        Raises PromptError if the prompt is empty, neither text nor ids, or contains an unknown id.
        """
        prompt_alone = prompt_ids(self.tokenizer, prompt, name)
        if self._prefix is None:
            return prompt_alone
        if isinstance(prompt, str):
            return self.tokenizer.encode_prompt(f"{self._prefix.text}{prompt}")
        return [*self._prefix.ids, *prompt_alone]

    def ids_to_continue(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt to continue, which may be an empty text, as in transformers' pipeline.

        An empty text behind a prefix's text adds nothing. Otherwise it becomes the special tokens that the tokenizer
        puts before a text; where there are none, the token BOS.

        Raises:
            PromptError: as in `ids`; or the prompt is empty, and the model has no BOS to begin with.
        """
        if not (isinstance(prompt, str) and not prompt):
            return self.ids(prompt)
        if self._prefix is not None:
            return list(self._prefix.ids)
        if begin := self.tokenizer.encode_prompt(""):
            return begin
        return self.ids(prompt) if self._bos_token_id is None else [self._bos_token_id]

    def prefix_tokens(self, ids: Sequence[int]) -> int:
        """How many of `ids` belong to the prefix; at least one id does not."""
        if self._prefix is None:
            return 0
        return min(common_prefix(self._prefix.ids, ids), len(ids) - 1)

    def begin(self, session: Session, ids: list[int], least_left: int = LEAST_TOKENS) -> list[int]:
        """Have `session` begin behind the part of the prefix's text that `ids` begin with; returns the remaining ids.

        `session` is emptied first. `ids` come from the method `ids`. At least `least_left` of them are returned.
        """
        if self._prefix is None:
            session.reset()
            return ids
        count = min(common_prefix(self._prefix.ids, ids), len(ids) - least_left)
        if count < LEAST_TOKENS:
            session.begin_after(None)
            return ids
        session.begin_after(self._prefix.content[:, :, :count])
        return ids[count:]


def bake(
    session: Session,
    tokenizer: Tokenizer,
    text: str,
    path: str | os.PathLike[str],
    dtype: KvDtype | None = None,
    task: "TaskFile | None" = None,
) -> None:
    """Write `text`, with its keys and values as `session` computes them, to the prefix file `path`.

    `session` is emptied first and at the end. Without `dtype` the file has the cache's dtype, which changes no bit;
    "float16" halves the size of float32. `task` says what the prefix is for; it is not checked against the model.

    Raises:
        ConfigError: `dtype` is neither None nor a `KvDtype`, or is given for a cache of integers.
        PrefixError: the text is empty or too short, leaves no room in the context, or has a key or value that does not
            fit into float16.
        OSError: the file cannot be written.
    """
    manifest = session.bundle.manifest
    stored_as = file_type(dtype, manifest.graph.kv_dtype)
    if not isinstance(text, str):
        raise PrefixError(f"the prefix must be a text, got {shown(text)}")
    try:
        ids = prompt_ids(tokenizer, text, "prefix")
    except PromptError as error:
        raise PrefixError(str(error)) from None
    check_length(len(ids), manifest.architecture.context_length)
    session.begin_after(None)
    session.step(ids)
    content = session.remembered(len(ids))
    session.reset()
    metadata = KvMetadata("text", manifest.source.name, graph_identity(manifest))
    stated = None if task is None else task.content
    write_kv_file(path, metadata, content, stored_as, tuple(ids), text, stated)


def write_learned_prefix(
    path: str | os.PathLike[str], keys_values: KeysValues, *, source: str, body_sha256: str, dtype: KvDtype = "float32"
) -> None:
    """Write the keys and values of T virtual tokens, to be used with every bundle of one checkpoint.

    Real tokens then have the positions T, T + 1, ...

    Args:
        path: the file to write.
        keys_values: float32 (2·layers, H, T, h): each layer's keys, then its values; h is the checkpoint's head dim.
        source: the checkpoint's name, for messages.
        body_sha256: the checkpoint's hash (`edgelm_export.source.fingerprint.body_sha256`).
        dtype: "float16" halves the file.

    Raises:
        PrefixError: the keys and values have another shape, contain NaN or infinity, or do not fit into `dtype`.
        OSError: the file cannot be written.
    """
    if keys_values.ndim != 4 or keys_values.shape[0] % 2 or 0 in keys_values.shape:
        raise PrefixError(f"keys and values must be of shape (2·layers, heads, tokens, head dim): {keys_values.shape}")
    write_kv_file(path, KvMetadata("learned", source, body_sha256), keys_values, dtype)


def copy_prefix(path: str | os.PathLike[str], output: str | os.PathLike[str], task: "TaskFile | None") -> None:
    """Write the prefix file `path` with `task` in place of its own task to the file `output`, which may be `path`.

    Raises:
        PrefixError: `path` cannot be read, or is damaged.
        OSError: `output` cannot be written.
    """
    with named_errors(PrefixError, "prefix", path):
        file = read_kv_file(path, "prefix file", "text", "learned")
    stated, stored_as = None if task is None else task.content, cast("CacheType", file.keys_values.dtype.name)
    write_kv_file(output, file.metadata, file.keys_values, stored_as, tuple(file.ids.tolist()), file.text, stated)


def task_in(file: KvFile) -> "TaskFile | None":
    """The task that a prefix file states; None where it states none. Raises KvFileError if it cannot be read."""
    if file.task is None:
        return None
    from edgelm.bundle.task import TaskFile, parse_task

    try:
        return TaskFile(parse_task(file.task), file.task)
    except StrictJsonError as error:
        raise KvFileError(f"its task {error}") from None


def read_prefix(path: str | os.PathLike[str], bundle: Bundle) -> Prefix:
    """Read a prefix file; raises PrefixError if it is missing, damaged, or made for another bundle or checkpoint."""
    return _read(Path(path).absolute(), bundle)


def _read(place: Path | Extent, bundle: Bundle) -> Prefix:
    """The prefix in a file, or in the bundle itself. Raises as `read_prefix`."""
    path = place.path if isinstance(place, Extent) else place
    facts = bundle.manifest.architecture
    with named_errors(PrefixError, "prefix", path):
        file = read_kv_file(place, "prefix file", "text", "learned")
        given = task_in(file)
        _check_fit(file, bundle.manifest)
        divisors = _value_divisors(bundle) if file.metadata.kind == "learned" else None
    content = _padded_heads(file.keys_values, facts.head_dim, turns=bundle.manifest.graph.position_ids is None)
    if divisors is not None:
        content = content.astype(np.float32)
        with np.errstate(over="ignore"):
            content[1::2] /= divisors
        if not np.isfinite(content).all():
            raise PrefixError(
                f"cannot use the prefix {os.fspath(path)!r}: its values are too large for this bundle's "
                f"{VALUE_DIVISORS_FILE}: learn it again"
            )
    task = None if given is None else given.task
    return Prefix(file.text, tuple(file.ids.tolist()), content, file.metadata.sha256, path, task)


def baked_prefix(bundle: Bundle) -> Prefix | None:
    """The prefix in the bundle's folder, or None; raises PrefixError if it does not fit the bundle."""
    return _read(bundle.extent(PREFIX_FILE), bundle) if PREFIX_FILE in bundle.manifest.files else None


def learned_sha256(prefix: Prefix | None) -> str | None:
    """SHA-256 of a learned prefix, on which a prompt's keys and values depend beside its ids; None for a text."""
    return prefix.sha256 if prefix is not None and prefix.text is None else None


def check_length(tokens: int, context_length: int) -> None:
    """Raise PrefixError where a prefix is too short or leaves too little of the context."""
    if tokens < LEAST_TOKENS:
        raise PrefixError(f"a prefix needs {LEAST_TOKENS} tokens at least, this text has {tokens}: give more")
    if tokens + LEAST_ROOM_TOKENS > context_length:
        raise PrefixError(
            f"the prefix has {tokens} tokens, but this model's context of {context_length} holds a prefix of "
            f"{max(0, context_length - LEAST_ROOM_TOKENS)} at most: shorten it"
        )


def graph_identity(manifest: Manifest) -> str:
    """SHA-256 (hex) of what decides the keys and values of a text: the graph, its weights, the tokenizer."""
    graph = manifest.graph
    names = (graph.file, graph.weights_file, "tokenizer.json")
    return hashlib.sha256("".join(manifest.files[name].sha256 for name in names).encode()).hexdigest()


def _check_fit(file: KvFile, manifest: Manifest) -> None:
    """Raise KvFileError unless the file was made for this bundle.

    The head dim of a text is the cache's, because its padding contains tiny numbers after rounding; that of a learned
    prefix is the checkpoint's.
    """
    check_type(file, manifest.graph.kv_dtype)
    metadata, facts, source = file.metadata, manifest.architecture, manifest.source
    is_text = metadata.kind == "text"
    layers, heads, tokens, head_dim = file.keys_values.shape
    bundle_head_dim = facts.head_dim if is_text else facts.source_head_dim
    if (layers, heads, head_dim) != (2 * facts.num_layers, facts.num_key_value_heads, bundle_head_dim):
        raise KvFileError(f"it was made for a model of other sizes ({metadata.source!r}), not for {source.name!r}")
    if is_text and metadata.made_for != graph_identity(manifest):
        raise KvFileError("its text was computed with another bundle: make it again with `edgelm bake`")
    if not is_text and source.body_sha256 is None:
        raise KvFileError("this bundle does not say which weights it was made of: export it again")
    if not is_text and metadata.made_for != source.body_sha256:
        raise KvFileError(f"it was learned with other weights ({metadata.source!r}) than this bundle has")
    if file.ids.max(initial=0) >= facts.vocab_size:
        raise KvFileError("it contains a token id outside the vocabulary")
    try:
        check_length(tokens if is_text else max(LEAST_TOKENS, tokens), facts.context_length)
    except PrefixError as error:
        raise KvFileError(str(error)) from None


def _padded_heads(content: KeysValues, head_dim: int, *, turns: bool) -> KeysValues:
    """The keys and values (2·layers, H, T, h) with heads of `head_dim` numbers; the new ones are zeros.

    Args:
        content: of the file.
        head_dim: of the cache.
        turns: whether the graph turns its keys by their positions. Number i of a head turns with the number half a
            head later, so the zeros of keys stand behind each half.
    """
    source_dim = content.shape[3]
    if source_dim == head_dim:
        return content
    padded = np.zeros((*content.shape[:3], head_dim), content.dtype)
    padded[..., :source_dim] = content
    if turns:
        half, second = source_dim // 2, head_dim // 2
        padded[0::2, ..., half:] = 0
        padded[0::2, ..., second : second + source_dim - half] = content[0::2, ..., half:]
    return padded


def _value_divisors(bundle: Bundle) -> KeysValues | None:
    """The numbers by which smoothing divided each layer's values, (layers, H, 1, p); None without smoothing.

    Raises KvFileError if the bundle does not state them, or if they are damaged.
    """
    manifest = bundle.manifest
    facts = manifest.architecture
    if VALUE_DIVISORS_FILE not in manifest.files:
        if manifest.recipe.calibration_tokens is None:
            return None
        raise KvFileError("this bundle does not say how its values were scaled: export it again")
    shape = facts.num_layers, facts.num_key_value_heads, 1, facts.head_dim
    size_bytes = 4 * math.prod(shape)
    if manifest.files[VALUE_DIVISORS_FILE].size_bytes != size_bytes:
        raise KvFileError(f"the bundle's {VALUE_DIVISORS_FILE} is damaged")
    try:
        divisors = np.frombuffer(bundle.read_file(VALUE_DIVISORS_FILE, size_bytes), "<f4")
    except SmallFileError as error:
        raise KvFileError(f"the bundle's {VALUE_DIVISORS_FILE} {error}") from None
    if divisors.size != math.prod(shape) or not (np.isfinite(divisors).all() and (divisors > 0).all()):
        raise KvFileError(f"the bundle's {VALUE_DIVISORS_FILE} is damaged")
    return divisors.reshape(shape)
