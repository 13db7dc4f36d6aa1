"""edgelm: text generation for machines that cannot carry torch.

    import edgelm
    model = edgelm.load()                      # or edgelm.load("path/to/bundle")
    print(model.generate("Once upon a time"))

Names are resolved on first use, so that ``import edgelm`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgelm.bundle import Bundle
    from edgelm.completion import Choice, Chunk, Completion, Stats
    from edgelm.errors import (
        BundleError,
        ClosedError,
        ConfigError,
        ContextError,
        DeviceError,
        EdgelmError,
        ExportError,
        ForkError,
        InsufficientMemoryError,
        PrefixError,
        PromptError,
        StateError,
        TokenizerError,
    )
    from edgelm.generation_config import GenerationConfig
    from edgelm.loading import load
    from edgelm.model import Model
    from edgelm.scores import Option, Perplexity, Score, Selection, TokenLogprob, TokenLogprobs
    from edgelm.session import Session
    from edgelm.tokenizer import StreamDecoder, Tokenizer

_MODULE_OF = {
    "Bundle": "bundle",
    "BundleError": "errors",
    "Choice": "completion",
    "Chunk": "completion",
    "ClosedError": "errors",
    "Completion": "completion",
    "ConfigError": "errors",
    "ContextError": "errors",
    "DeviceError": "errors",
    "EdgelmError": "errors",
    "ExportError": "errors",
    "ForkError": "errors",
    "GenerationConfig": "generation_config",
    "InsufficientMemoryError": "errors",
    "Model": "model",
    "Option": "scores",
    "Perplexity": "scores",
    "PrefixError": "errors",
    "PromptError": "errors",
    "Score": "scores",
    "Selection": "scores",
    "Session": "session",
    "StateError": "errors",
    "Stats": "completion",
    "StreamDecoder": "tokenizer",
    "TokenLogprob": "scores",
    "TokenLogprobs": "scores",
    "Tokenizer": "tokenizer",
    "TokenizerError": "errors",
    "load": "loading",
}

__all__ = [
    "Bundle",
    "BundleError",
    "Choice",
    "Chunk",
    "ClosedError",
    "Completion",
    "ConfigError",
    "ContextError",
    "DeviceError",
    "EdgelmError",
    "ExportError",
    "ForkError",
    "GenerationConfig",
    "InsufficientMemoryError",
    "Model",
    "Option",
    "Perplexity",
    "PrefixError",
    "PromptError",
    "Score",
    "Selection",
    "Session",
    "StateError",
    "Stats",
    "StreamDecoder",
    "TokenLogprob",
    "TokenLogprobs",
    "Tokenizer",
    "TokenizerError",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'edgelm' has no attribute {name!r}")
    value = getattr(import_module(f"edgelm.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
