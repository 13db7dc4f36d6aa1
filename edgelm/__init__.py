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
    from edgelm.bundle.folder import Bundle
    from edgelm.decoding.generation_config import GenerationConfig
    from edgelm.engine.session import Session
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
    from edgelm.generation.results import Choice, Chunk, Completion, Stats
    from edgelm.model import Model, load
    from edgelm.scoring.results import Option, Perplexity, Score, Selection, TokenLogprob, TokenLogprobs
    from edgelm.text.stream_decoder import StreamDecoder
    from edgelm.text.tokenizer import Tokenizer

_MODULE_OF = {
    "Bundle": "bundle.folder",
    "BundleError": "errors",
    "Choice": "generation.results",
    "Chunk": "generation.results",
    "ClosedError": "errors",
    "Completion": "generation.results",
    "ConfigError": "errors",
    "ContextError": "errors",
    "DeviceError": "errors",
    "EdgelmError": "errors",
    "ExportError": "errors",
    "ForkError": "errors",
    "GenerationConfig": "decoding.generation_config",
    "InsufficientMemoryError": "errors",
    "Model": "model",
    "Option": "scoring.results",
    "Perplexity": "scoring.results",
    "PrefixError": "errors",
    "PromptError": "errors",
    "Score": "scoring.results",
    "Selection": "scoring.results",
    "Session": "engine.session",
    "StateError": "errors",
    "Stats": "generation.results",
    "StreamDecoder": "text.stream_decoder",
    "TokenLogprob": "scoring.results",
    "TokenLogprobs": "scoring.results",
    "Tokenizer": "text.tokenizer",
    "TokenizerError": "errors",
    "load": "model",
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
