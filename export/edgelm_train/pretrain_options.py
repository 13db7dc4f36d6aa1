"""The options of ``edgelm pretrain``, checked once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgelm.errors import TrainingError
from edgelm_train.data.corpus import END_OF_TEXT
from edgelm_train.run_options import check_limits, check_positive, recorded

Size = str
"""A name in `edgelm_train.models.sizes.SIZES`, or the path of a GPT-2 config.json."""


@dataclass(frozen=True)
class PretrainOptions:
    """How a model is trained from text alone; None takes what suits the size or the data."""

    size: Size | None = None
    """None: 6M, or the shape of `start_from`."""
    start_from: Path | None = None
    """A GPT-2 in Hugging Face layout whose weights and tokenizer to go on from, instead of random weights."""
    tokens: int | None = None
    """Budget; None: four passes over the data (Muennighoff et al. 2023: nearly as good as new text), or what `hours`
    has time for."""
    hours: float | None = None
    """Wall time, over all parts of a resumed run."""
    vocab_size: int | None = None
    tokenizer: Path | None = None
    """A folder whose tokenizer.json is used instead of training one."""
    separator: str = END_OF_TEXT
    held_out: int | None = None
    """Documents at the start to hold out; None: see `edgelm_train.data.corpus.read_corpus`."""
    short_windows: float = 0.5
    """The first part of the steps, which sees windows of half the context: they cost less."""
    batch_tokens: int | None = None
    accumulate: int | None = None
    """Micro-batches a batch is computed in; None: as few as fit into memory."""
    learning_rate: float | None = None
    warmup: float = 0.03
    """Part of the steps."""
    weight_decay: float = 0.1
    dropout: float = 0.05
    patience: int = 5
    """Measurements in a row without a better held-out loss that end the run; 0: never."""
    keep: Literal["best", "last"] = "best"
    """The weights of the best held-out loss, or those of the last step."""
    evaluations: int = 40
    """Measurements on held-out text over the run."""
    optimizer: Literal["muon", "adamw"] = "muon"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"tokens": 1, "held_out": 1, "batch_tokens": 2, "accumulate": 1, "weight_decay": 0}
        check_limits(self, least | {"patience": 0, "evaluations": 1, "seed": 0})
        check_positive(self, "hours", "learning_rate")
        for name, part in {"short-windows": self.short_windows, "warmup": self.warmup, "dropout": self.dropout}.items():
            if not 0 <= part < 1 and not (name == "short-windows" and part == 1):
                raise TrainingError(f"--{name} must be at least 0 and less than 1, got {part}")

        fixed = {"size": self.size, "vocab-size": self.vocab_size, "tokenizer": self.tokenizer}
        for name, given in fixed.items():
            if self.start_from is not None and given is not None:
                raise TrainingError(f"--from has a shape and a tokenizer of its own; leave out --{name}")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise TrainingError("--tokenizer and --vocab-size exclude each other; give one")
        if self.patience and self.keep == "last":
            raise TrainingError("--keep last needs --patience 0: a run that ends early is to keep its best weights")

    def recorded(self) -> dict[str, object]:
        """What must stay the same when a run is resumed, by option name."""
        fields = recorded(self)
        fields["from"] = fields.pop("start-from")
        return fields
