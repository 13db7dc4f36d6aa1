"""A bundle's parts beside its graph: where the embedded one lies, its tokenizer, its generation defaults."""

import os
from importlib import import_module
from pathlib import Path

from edgelm.bundle import Bundle
from edgelm.errors import BundleError, ConfigError
from edgelm.generation_config import GenerationConfig, config_from_file
from edgelm.strict_json import StrictJsonError, parse_json
from edgelm.tokenizer import Tokenizer


def default_bundle_path() -> Path:
    """The folder of the embedded default model.

    Raises:
        BundleError: this installation has none.
    """
    try:
        folder: Path = import_module("edgelm_models").default_bundle_path()
    except ModuleNotFoundError:
        raise BundleError("this installation has no embedded model; name a bundle folder (-m/--model)") from None
    return folder


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer.json says all; the files beside it are for other tools.

    Raises:
        BundleError: it is not UTF-8 text, or has more tokens than the graph.
        TokenizerError: it cannot be read.
    """
    try:
        tokenizer = Tokenizer.from_json(bundle.file("tokenizer.json").read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise BundleError(f"tokenizer.json of {os.fspath(bundle.path)!r} is not UTF-8 text") from None
    vocab_size = bundle.manifest.architecture.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise BundleError(
            f"the tokenizer of {os.fspath(bundle.path)!r} knows {tokenizer.vocab_size} tokens but its graph only "
            f"{vocab_size}: they do not belong together"
        )
    tokenizer.pad_vocabulary(vocab_size)
    return tokenizer


def bundle_config(bundle: Bundle) -> GenerationConfig:
    """The bundle's defaults, checked against its vocabulary.

    Raises:
        BundleError: they are no valid generation options, or name an unknown token.
    """
    name = "generation_config.json"
    try:
        content = parse_json(bundle.file(name).read_bytes())
        if not isinstance(content, dict):
            raise StrictJsonError("must be an object")
        config = config_from_file(content)
    except (StrictJsonError, ConfigError) as error:
        raise BundleError(f"{name} of {os.fspath(bundle.path)!r}: {error}") from None
    wrong = [token for token in config.eos_token_id if token >= bundle.manifest.architecture.vocab_size]
    if wrong:
        raise BundleError(f"{name} of {os.fspath(bundle.path)!r}: eos_token_id {wrong[0]} is not in the vocabulary")
    return config
