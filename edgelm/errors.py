"""Every error edgelm raises on purpose. Each message is one sentence that says what to do."""


class EdgelmError(Exception):
    """Base class: catch this to catch everything edgelm raises on purpose."""


class BundleError(EdgelmError):
    """A bundle folder is missing, damaged, unsafe, or needs a newer edgelm."""


class ConfigError(EdgelmError, ValueError):
    """A generation option is unknown, out of range, or contradicts another."""


class PromptError(EdgelmError, ValueError):
    """A prompt or a list of token ids cannot be used with this model."""


class ContextError(PromptError):
    """More tokens were given than the model's context has room for."""


class TokenizerError(EdgelmError):
    """A tokenizer's files cannot be read, or are of a kind edgelm does not know."""


class StateError(EdgelmError):
    """A prompt's saved state is damaged, or belongs to another bundle."""


class PrefixError(EdgelmError):
    """A prefix file is damaged, does not fit the model, or is too long for its context."""


class DeviceError(EdgelmError):
    """ONNX Runtime is missing, or the requested device cannot be used."""


class ClosedError(EdgelmError):
    """A model, or a session of it, was used after the model was closed."""


class ForkError(EdgelmError):
    """A session made before the process forked was used in the child."""


class InsufficientMemoryError(EdgelmError, MemoryError):
    """A model would not fit into the memory this process may use; it was not loaded."""


class ExportError(EdgelmError):
    """A checkpoint cannot be exported, or the result missed its quality gate."""


class TrainingError(EdgelmError):
    """A model cannot be trained so: its data, its options or a checkpoint of it do not fit."""
