"""edgelm: text generation for machines that cannot carry torch.

    import edgelm
    model = edgelm.load()                      # or edgelm.load("path/to/bundle")
    print(model.generate("Once upon a time"))

Names are resolved on first use, so that ``import edgelm`` costs nothing.
"""

import os
import sys

__version__ = "0.1.0"

TYPE_CHECKING = False  # as in `typing`, without its import

_TELEMETRY = "ORT_DISABLE_TELEMETRY"
"""Read once, when ``onnxruntime`` is imported; without it ONNX Runtime's wheels report usage since 1.29."""

telemetry_came_first = "onnxruntime" in sys.modules and _TELEMETRY not in os.environ
"""Whether this program imported onnxruntime before edgelm could turn its telemetry off."""
os.environ.setdefault(_TELEMETRY, "1")

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
        HubError,
        InsufficientMemoryError,
        PrefixError,
        PromptError,
        QueueFullError,
        StateError,
        TokenizerError,
    )
    from edgelm.generation.results import Choice, Chunk, Completion, Stats
    from edgelm.generation.submission import Submission
    from edgelm.generation.task_format import TaskFormat, TaskLabel, TaskText, TaskVector
    from edgelm.generation.text_scheduler import SchedulerLoad, TextScheduler
    from edgelm.latent import Latent, Posterior
    from edgelm.loading import load
    from edgelm.model import Model
    from edgelm.scoring.explanation import ExplainedToken, Explanation
    from edgelm.scoring.results import Option, Perplexity, Score, Selection, TokenLogprob, TokenLogprobs
    from edgelm.text.constraints import Choices, Grammar, JsonSchema, Regex, ToolUse
    from edgelm.text.messages import ChatMessage
    from edgelm.text.stream_decoder import StreamDecoder
    from edgelm.text.tokenizer import Tokenizer
    from edgelm.text.tools import Tool, ToolCall, ToolChoice

__all__ = ["Bundle", "ChatMessage", "GenerationConfig", "Model", "Session", "StreamDecoder", "Tokenizer", "load"]
__all__ += ["Choice", "Chunk", "Completion", "Stats"]
__all__ += ["Choices", "Grammar", "JsonSchema", "Regex"]
__all__ += ["Tool", "ToolCall", "ToolChoice", "ToolUse"]
__all__ += ["TaskFormat", "TaskLabel", "TaskText", "TaskVector"]
__all__ += ["SchedulerLoad", "Submission", "TextScheduler"]
__all__ += ["ExplainedToken", "Explanation", "Option", "Perplexity", "Score", "Selection"]
__all__ += ["TokenLogprob", "TokenLogprobs"]
__all__ += ["Latent", "Posterior"]
__all__ += ["BundleError", "ClosedError", "ConfigError", "ContextError", "DeviceError", "EdgelmError", "ExportError"]
__all__ += ["ForkError", "HubError", "InsufficientMemoryError", "PrefixError", "PromptError"]
__all__ += ["QueueFullError", "StateError", "TokenizerError"]

_MODULE_OF = {
    "Bundle": "bundle.folder",
    "GenerationConfig": "decoding.generation_config",
    "Session": "engine.session",
    "Submission": "generation.submission",
    **dict.fromkeys(["SchedulerLoad", "TextScheduler"], "generation.text_scheduler"),
    "ChatMessage": "text.messages",
    **dict.fromkeys(["Choices", "Grammar", "JsonSchema", "Regex", "ToolUse"], "text.constraints"),
    **dict.fromkeys(["Tool", "ToolCall", "ToolChoice"], "text.tools"),
    **dict.fromkeys(["TaskFormat", "TaskLabel", "TaskText", "TaskVector"], "generation.task_format"),
    "StreamDecoder": "text.stream_decoder",
    "Tokenizer": "text.tokenizer",
    **dict.fromkeys(["Latent", "Posterior"], "latent"),
    "load": "loading",
    "Model": "model",
    **dict.fromkeys(["Choice", "Chunk", "Completion", "Stats"], "generation.results"),
    **dict.fromkeys(["ExplainedToken", "Explanation"], "scoring.explanation"),
    **dict.fromkeys(["Option", "Perplexity", "Score", "Selection", "TokenLogprob", "TokenLogprobs"], "scoring.results"),
}
"""The module of each public name; names that are not listed are errors."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'edgelm' has no attribute {name!r}")
    from importlib import import_module

    module = _MODULE_OF.get(name, "errors")
    if module != "errors":
        import_module("edgelm.engine.interpreter").require_main_interpreter()  # before numpy is imported
    value = getattr(import_module(f"edgelm.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
