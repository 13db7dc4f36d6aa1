"""The `tokenizers` library's tokenizer of a checked tokenizer.json.

Rust parses JSON slowly: for the 50,257 tokens of GPT-2 it takes twice as long as Python. So a BPE model, which nearly
all decoders have, is built out of what Python has parsed for the check, and only the small rest is parsed again.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from edgelm.errors import TokenizerError
from edgelm.text.rust import rust_errors
from edgelm.text.tokenizer_file import TokenizerFile, model_kind

_EMPTY_MODEL = {"type": "BPE", "vocab": {}, "merges": []}


def build_backend(text: str, content: Mapping[str, Any], file: TokenizerFile) -> Tokenizer:
    """The tokenizer that ``Tokenizer.from_str(text)`` gives.

    Args:
        text: the file.
        content: the parsed file, which passed all checks.
        file: what it says.

    Raises:
        TokenizerError: Rust refuses the file, numbers its added tokens in another way, or would find one of them
            everywhere.
    """
    with rust_errors(TokenizerError, "tokenizer.json cannot be read", "write it again with to_json or tokenizers"):
        backend = _with_bpe(content) if model_kind(content["model"]) == "BPE" else Tokenizer.from_str(text)
        added = backend.get_added_tokens_decoder()
        empty = _tokens_of_nothing(backend, added.values())
    if empty:  # Rust would find it everywhere, inside characters too, and panic
        raise TokenizerError(
            f"tokenizer.json has the added token {empty[0][:60]!r}, of which its normalizer leaves nothing: "
            "make it a token that is not normalized"
        )
    numbered = {token.content: token_id for token_id, token in added.items()}
    for token, token_id in file.added_ids.items():
        if numbered.get(token) != token_id:
            raise TokenizerError(
                f"tokenizer.json gives the added token {token[:60]!r} the id {token_id}, but the tokenizers "
                f"library reads it as {numbered.get(token)}: write it again with to_json or tokenizers"
            )
    return backend


def _with_bpe(content: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a file with a BPE model; what Rust raises is raised."""
    backend = Tokenizer.from_str(json.dumps({**content, "model": _EMPTY_MODEL, "added_tokens": []}))
    model = content["model"]
    settings = {
        name: value
        for name, value in model.items()
        if name not in ("type", "vocab", "merges") and value is not None  # Python's constructor takes no None
    }
    backend.model = models.BPE(model["vocab"], _pairs(model["merges"]), **settings)
    # Rust adds the tokens of a file in their order, and each of Python's two methods adds tokens of one kind.
    for is_special, tokens in groupby(content.get("added_tokens", []), key=lambda token: bool(token["special"])):
        add = backend.add_special_tokens if is_special else backend.add_tokens
        add([AddedToken(**{name: value for name, value in token.items() if name != "id"}) for token in tokens])
    return backend


def _pairs(merges: list[Any]) -> list[tuple[str, ...]]:
    """The merges of a BPE model as pairs, of both forms that a file may have: ["a", "b"] and "a b".

    They are a list, because Rust asks a sequence written in Python for its length, and drops what an interrupt raises
    there.
    """
    kinds = set(map(type, merges))
    if kinds <= {list}:
        return [tuple(pair) for pair in merges]
    if kinds != {str}:
        raise ValueError("a merge is neither a pair of tokens nor a text")
    # Rust skips the first line of a merges file, which tells its version, wherever it stands.
    return [tuple(pair.split(" ")) for pair in merges if not pair.startswith("#version")]


def _tokens_of_nothing(backend: Tokenizer, added: Iterable[AddedToken]) -> list[str]:
    """The added tokens that are looked for in the normalized text, and whose own normalized text is empty."""
    normalizer = backend.normalizer
    if normalizer is None:
        return []
    return [token.content for token in added if token.normalized and not normalizer.normalize_str(token.content)]
