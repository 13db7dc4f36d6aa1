"""Baking: the keys and values of a text, computed once, in a file that stands before every prompt."""

import os

from edgelm.engine.session import Session
from edgelm.errors import PrefixError, PromptError
from edgelm.reuse.kv_file import KvDtype, check_kv_dtype
from edgelm.reuse.prefix import check_length, write_text_prefix
from edgelm.text.prompts import prompt_ids
from edgelm.text.tokenizer import Tokenizer


def bake(
    session: Session, tokenizer: Tokenizer, text: str, path: str | os.PathLike[str], dtype: KvDtype | None = None
) -> None:
    """Write `text`, with its keys and values as `session` computes them, to the prefix file `path`.

    Args:
        session: nothing it holds matters, and nothing stays.
        dtype: None for the cache's own, which changes no bit; "float16" halves what float32 takes.

    Raises:
        ConfigError: `dtype` is another.
        PrefixError: the text is empty or too short, leaves no room in the context, or its numbers do not fit into
            float16.
        OSError: the file cannot be written.
    """
    if dtype is not None:
        check_kv_dtype(dtype)
    try:
        ids = prompt_ids(tokenizer, text, "prefix")
    except PromptError as error:
        raise PrefixError(str(error)) from None
    manifest = session.bundle.manifest
    check_length(len(ids), manifest.architecture.context_length)
    session.begin_after(None)
    session.step(ids)
    content = session.remembered(len(ids))
    session.reset()
    write_text_prefix(path, manifest, text, tuple(ids), content, dtype or manifest.graph.kv_dtype)
