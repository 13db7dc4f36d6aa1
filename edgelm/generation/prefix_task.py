"""A task goes into a prefix file, after a check that the bundle can do it behind the prefix."""

import os

from edgelm.bundle.folder import Bundle
from edgelm.bundle.task import TaskFile, read_task_file
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.generation.task_format import TaskFormat
from edgelm.reuse.prefix import copy_prefix, read_prefix
from edgelm.text.tokenizer import Tokenizer


def read_usable_task(
    file: str | os.PathLike[str], bundle: Bundle, tokenizer: Tokenizer, config: GenerationConfig
) -> TaskFile:
    """The task in `file`; raises ConfigError unless a model with these parts can do it."""
    given = read_task_file(file)
    TaskFormat.of_task(given.task, bundle, tokenizer, config, f"the task {os.fspath(file)!r}")
    return given


def give_task(
    prefix: str | os.PathLike[str], task: str | os.PathLike[str], output: str | os.PathLike[str], bundle: Bundle
) -> None:
    """Write the prefix file `prefix`, with the task in the file `task` in place of its own, to the file `output`.

    `output` may be `prefix`; it is replaced in one step. Keys and values stay as they are, so states that were saved
    behind a learned prefix still fit. The prefix must fit `bundle`, which is not loaded.

    Raises:
        PrefixError: the prefix cannot be read, or was made for another bundle or checkpoint.
        ConfigError: the task cannot be read, or the bundle cannot do it.
        BundleError, TokenizerError: a file of the bundle cannot be read.
        OSError: `output` cannot be written.
    """
    read_prefix(prefix, bundle)
    given = read_usable_task(task, bundle, Tokenizer.of_bundle(bundle), GenerationConfig.of_bundle(bundle))
    copy_prefix(prefix, output, given)
