"""The prefix of a bundle that is being made: a text to bake, or learned keys and values."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import PREFIX_FILE, CacheType
from edgelm.bundle.small_files import MAX_TEXT_BYTES, read_small_file
from edgelm.bundle.task import TaskFile
from edgelm.engine.graph import Graph
from edgelm.errors import ExportError, PrefixError
from edgelm.reuse.kv_file import KvDtype, file_type, is_safetensors, read_kv_file
from edgelm.reuse.prefix import Prefix, bake, check_length, copy_prefix, read_prefix, task_in
from edgelm.text.prompts import prompt_ids
from edgelm.text.tokenizer import Tokenizer
from edgelm_export.source.checkpoint import Checkpoint
from edgelm_export.source.fingerprint import body_sha256


@dataclass(frozen=True)
class PrefixPlan:
    """A prefix for every prompt of a bundle, checked before the bundle is made."""

    file: Path
    text: str | None
    """None where `file` contains learned keys and values."""
    dtype: KvDtype | None
    """Type of a text's keys and values; None for the cache's type."""
    size_bytes: int
    """Approximate size of the prefix file in the bundle."""
    task: TaskFile | None = None
    """The task in a learned prefix. The bundle gets it as its own, so the bundle's prefix file has none."""

    def write(self, draft: Path, scratch: Path) -> Prefix:
        """Add the prefix file to the complete and sealed bundle in `draft`, which must be sealed again.

        Raises:
            PrefixError: the prefix does not fit the bundle.
        """
        bundle, made = Bundle.read(draft), scratch / PREFIX_FILE
        if self.text is None:
            copy_prefix(self.file, made, None)
        else:
            bake(Graph.open(bundle, device="cpu").session(), Tokenizer.of_bundle(bundle), self.text, made, self.dtype)
        prefix = read_prefix(made, bundle)
        shutil.copyfile(made, draft / PREFIX_FILE)  # with the permissions of its neighbours
        return prefix


def plan_prefix(
    file: Path, dtype: KvDtype | None, checkpoint: Checkpoint, cache_type: CacheType = "float32"
) -> PrefixPlan:
    """Read `file`: UTF-8 text, all of it to the last byte, or a learned prefix.

    Args:
        dtype: type of a text's keys and values; None for the cache's type.
        checkpoint: the model that will be exported.
        cache_type: type of the bundle's cache.

    Raises:
        ExportError: the file cannot be read, is neither text nor a learned prefix, does not fit the checkpoint, or
            leaves no room in the context; or `dtype` is given for a cache of integers.
        ConfigError: `dtype` is unknown.
    """
    sizes = checkpoint.architecture
    try:
        if file.exists() and not file.is_file():
            raise PrefixError("it is no regular file")
        with file.open("rb") as stream:
            start = stream.read(9)
        if is_safetensors(start):
            if cache_type == "int8":
                raise ExportError(f"the prefix {str(file)!r} was learned, so it has floats: drop --int8-cache")
            if dtype is not None:
                raise ExportError(f"the prefix {str(file)!r} was learned and stays as it is: drop --prefix-dtype")
            metadata = (given := read_kv_file(file, "prefix file", "text", "learned")).metadata
            if metadata.kind == "text":
                raise PrefixError("its text was computed with another bundle: give the text itself")
            if metadata.made_for != body_sha256(checkpoint.model):
                raise ExportError(f"the prefix {str(file)!r} was learned with other weights than {checkpoint.name!r}")
            return PrefixPlan(file, None, None, given.keys_values.nbytes, task_in(given))
        content = read_small_file(file, MAX_TEXT_BYTES)
        text = content.decode("utf-8")
        ids = prompt_ids(checkpoint.tokenizer, text, "prefix")
        check_length(len(ids), sizes.context_length)
    except OSError as error:
        raise ExportError(f"cannot read the prefix {str(file)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ExportError(f"the prefix {str(file)!r} is not UTF-8 text (at byte {error.start})") from None
    except (PrefixError, ValueError) as error:
        raise ExportError(f"cannot use the prefix {str(file)!r}: {error}") from None
    if cache_type == "int8" and dtype is not None:
        raise ExportError("the prefix of a bundle with an int8 cache is int8 too: drop --prefix-dtype")
    value_bytes = np.dtype(file_type(dtype, cache_type)).itemsize
    token_bytes = 4 + sizes.cache_values_per_token * value_bytes  # an id, and its keys and values
    return PrefixPlan(file, text, dtype, len(content) + len(ids) * token_bytes)
