"""The options of ``edgelm pretrain``, ``finetune`` and ``distill``: type, default, range and help of each, stated once.

The command line makes its flags from these classes, and a wrong value is refused before torch is loaded. So this file,
and all that it imports, must load without torch.
"""

# ruff: noqa: RUF009  # declare() makes a field of a dataclass, not a default

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from edgelm.errors import TrainingError
from edgelm.reuse.prefix import LEAST_ROOM_TOKENS
from edgelm_train.data.bpe import check_vocabulary_size
from edgelm_train.data.corpus import END_OF_TEXT
from edgelm_train.data.records import is_records_file
from edgelm_train.data.similarity import Pooling, SimilarityTask
from edgelm_train.data.templates import ChatTask, Task
from edgelm_train.models.sizes import SIZES, check_size

LORA_RANK = 8
ROWS_PER_STEP, PAIRS_PER_STEP = 8, 32
WINDOW_TOKENS = 512
"""The longest window of text that is taken without being asked for: longer ones need much memory."""
LATENT_SIZE, LATENT_TOKENS, FREE_BITS, KL_CYCLES = 32, 4, 0.5, 4
MAX_LATENT_SIZE, MAX_LATENT_TOKENS = 4096, 64
_OF_LATENT = ("latent_size", "latent_tokens", "free_bits", "kl_cycles", "word_dropout", "alone")
Method = Literal["full", "lora", "prefix"]
Device = Literal["auto", "cpu", "cuda"]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Option:
    """What ``--help`` shows of an option, and the values that the option takes."""

    help: str
    metavar: str | None = None
    unset: str | None = None
    """What None stands for; ``--help`` shows it as the default."""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    fraction: bool = False
    """Whether the value must be at least 0 and less than 1."""
    counted: bool = False
    """Whether the shell takes a number like 500K or 12.4M."""
    flag: str | None = None
    """Name of the flag without its dashes; None: the name of the field with hyphens."""

    def limit_broken_by(self, value: float) -> str | None:
        """The limit that `value` breaks, in words; None where it breaks none. NaN breaks every limit."""
        if self.at_least is not None and not value >= self.at_least:
            return f"at least {self.at_least:,}"
        if self.above is not None and not value > self.above:
            return f"more than {self.above:,}"
        if self.at_most is not None and not value <= self.at_most:
            return f"at most {self.at_most:,}"
        return "at least 0 and less than 1" if self.fraction and not 0 <= value < 1 else None


def declare(default: Value, option: Option) -> Value:
    """A dataclass field that carries its `Option`."""
    return field(default=default, metadata={"option": option})


@dataclass(frozen=True)
class Declaration:
    """One option, as a dataclass field declares it: the name of the field, the name of the flag, and so on."""

    name: str
    flag: str
    kind: Any  # int, float, bool, str, Path, or a Literal of the possible strings
    default: Any
    option: Option


@dataclass(frozen=True)
class TrainingOptions:
    """Options of one training run; None stands for a value that suits the model or the data.

    Raises:
        TrainingError: a value breaks its limit, or two options exclude each other.
    """

    def __post_init__(self) -> None:
        for declared in declarations(type(self)):
            value, choices = getattr(self, declared.name), get_args(declared.kind)
            if choices and value is not None and value not in choices:
                raise TrainingError(f"--{declared.flag} must be one of {', '.join(choices)}, got {value}")
            limit = None if value is None else declared.option.limit_broken_by(value)
            if limit is not None:
                raise TrainingError(f"--{declared.flag} must be {limit}, got {value}")

    def recorded(self) -> dict[str, object]:
        """The options as JSON values, by the names of their flags, because a resumed run must have equal options."""
        values = {declared.flag: getattr(self, declared.name) for declared in declarations(type(self))}
        return {flag: str(value) if isinstance(value, Path) else value for flag, value in values.items()}


def declarations(options: type[TrainingOptions]) -> list[Declaration]:
    """Every option of a class, in the order in which ``--help`` lists the flags."""
    hints, declared_options = get_type_hints(options), []
    for declared in fields(options):
        option, kind = declared.metadata["option"], hints[declared.name]
        if get_origin(kind) in (UnionType, Union):  # a Literal or None is a Union
            (kind,) = (part for part in get_args(kind) if part is not NoneType)
        flag = option.flag or declared.name.replace("_", "-")
        declared_options.append(Declaration(declared.name, flag, kind, declared.default, option))
    return declared_options


_SIZES = ", ".join(SIZES)
_TOKENS = Option("Train on N tokens, for example 12.4M.", at_least=1, at_most=10**13, counted=True)
_BATCH_TOKENS = Option("Tokens of an optimizer step.", unset="by size", at_least=2, counted=True)
_HELD_OUT_FILE = Option("Measure on this file.", "FILE", unset="a part of the data")
_LEARNING_RATE = Option("Peak learning rate.", "RATE", unset="by size", above=0)
_PATIENCE = Option("Stop after N measurements without a better held-out loss; 0: never.", "N", at_least=0)
_EVALUATIONS = Option("Measurements on held-out data during the run.", "N", at_least=1)
_DEVICE = Option("auto takes a CUDA GPU where torch finds one.")
_SEED = Option("Seed of all random numbers.", "N", at_least=0, at_most=2**32 - 1)  # numpy's limit


@dataclass(frozen=True)
class PretrainOptions(TrainingOptions):
    """How a model is trained on text alone."""

    size: str | None = declare(None, Option(f"{_SIZES}, or a GPT-2 config.json.", "SIZE", unset="6M"))
    start_from: Path | None = declare(
        None, Option("Continue from this GPT-2's weights and tokenizer.", "FOLDER", flag="from")
    )
    # Four passes teach nearly as much as new text does (Muennighoff et al. 2023).
    tokens: int | None = declare(None, replace(_TOKENS, unset="four passes over the data"))
    hours: float | None = declare(
        None, Option("Time limit, over all parts of a resumed run.", "H", above=0, at_most=10**6)
    )
    vocab_size: int | None = declare(None, Option("Size of the BPE to train.", unset="by size", counted=True))
    tokenizer: Path | None = declare(
        None, Option("Use this folder's tokenizer.json instead of training one.", "FOLDER")
    )
    separator: str = declare(END_OF_TEXT, Option(r"Text between two documents; \n is a new line.", "TEXT"))
    held_out: int | None = declare(
        None, Option("Hold out the first N documents.", unset="every 50th", at_least=1, counted=True)
    )
    # Short windows cost less.
    short_windows: float = declare(
        0.5, Option("This first part of the steps sees half the context.", "PART", at_least=0, at_most=1)
    )
    batch_tokens: int | None = declare(None, _BATCH_TOKENS)
    accumulate: int | None = declare(
        None, Option("Compute a batch in N parts.", "N", unset="as few as fit into memory", at_least=1)
    )
    learning_rate: float | None = declare(None, _LEARNING_RATE)
    warmup: float = declare(0.03, Option("The learning rate rises in this part of the steps.", "PART", fraction=True))
    optimizer: Literal["muon", "adamw"] = declare(
        "muon", Option("muon trains the matrices of the blocks with Muon, the rest with AdamW.")
    )
    weight_decay: float = declare(0.1, Option("Weight decay of matrices and tables.", "W", at_least=0))
    dropout: float = declare(0.05, Option("Probability of dropout.", "P", fraction=True))
    patience: int = declare(5, _PATIENCE)
    keep: Literal["best", "last"] = declare("best", Option("Weights of the best held-out loss, or of the last step."))
    evaluations: int = declare(40, _EVALUATIONS)
    precision: Literal["auto", "fp32", "bf16"] = declare("auto", Option("auto measures which one is faster here."))
    device: Device = declare("auto", _DEVICE)
    seed: int = declare(0, _SEED)

    def least_batch_tokens(self, context: int) -> int:
        """The tokens of which a step has a multiple: a context for each part of a batch.

        Raises:
            TrainingError: --batch-tokens is no multiple of them.
        """
        least = context * (self.accumulate or 1)
        if self.batch_tokens is not None and self.batch_tokens % least:
            given = self.batch_tokens
            raise TrainingError(f"--batch-tokens must be a multiple of {least} (context x accumulate), got {given}")
        return least

    def __post_init__(self) -> None:
        super().__post_init__()
        own = {"size": self.size, "vocab-size": self.vocab_size, "tokenizer": self.tokenizer}
        for flag, value in own.items():
            if self.start_from is not None and value is not None:
                raise TrainingError(f"--from has a shape and a tokenizer of its own; leave out --{flag}")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise TrainingError("--tokenizer and --vocab-size exclude each other; give one")
        if self.size is not None:
            check_size(self.size)
        if self.vocab_size is not None:
            check_vocabulary_size(self.vocab_size)
        if self.patience and self.keep == "last":
            raise TrainingError("--keep last needs --patience 0, because a run that stops early keeps its best weights")


@dataclass(frozen=True)
class FinetuneOptions(TrainingOptions):
    """How a checkpoint is tuned."""

    method: Method | None = declare(
        None,
        Option(
            "Train all weights, an adapter, or a prefix that stands before every prompt.",
            unset="lora; full with --latent",
        ),
    )
    prompt: str | None = declare(
        None, Option(r"The prompt, with columns in braces: 'Review: {text}\nIt was'.", "TEMPLATE")
    )
    completion: str | None = declare(None, Option("The answer, the only part that is learned: ' {label}'.", "TEMPLATE"))
    turn: str | None = declare(
        None, Option(r"Instead: a turn of a chat, '{role}: {content}\n'; what assistants say is learned.", "TEMPLATE")
    )
    epochs: float = declare(3.0, Option("Passes over the data.", "N", above=0, at_most=10**6))
    second: str | None = declare(
        None, Option("Instead: the text that is compared with --prompt; --similarity scores the two.", "TEMPLATE")
    )
    similarity: str | None = declare(
        None, Option("The column of their score; what is learned is to rank pairs by it.", "COLUMN")
    )
    pooling: Pooling | None = declare(
        None, Option("How hidden states become a vector, for --similarity.", unset=get_args(Pooling)[0])
    )
    batch_size: int | None = declare(
        None,
        Option(
            "Examples, pairs, or windows of text, in a step.",
            "N",
            unset=f"{ROWS_PER_STEP}; {PAIRS_PER_STEP} pairs",
            at_least=1,
        ),
    )
    window: int | None = declare(
        None, Option("Tokens in a window of text.", "N", unset=f"half the context, at most {WINDOW_TOKENS}")
    )
    rank: int | None = declare(
        None, Option("Rank of LoRA's matrices.", "N", unset=f"{LORA_RANK}, or that of the adapter", at_least=1)
    )
    prefix_tokens: int = declare(16, Option("Tokens of the context that a prefix takes.", "N", at_least=2))
    latent: bool = declare(
        False, Option("Learn a latent space of the lines of a text too: a variational auto-encoder (docs/latent.md).")
    )
    latent_size: int | None = declare(
        None,
        Option("Dimensions of the latent space.", "N", unset=f"{LATENT_SIZE}", at_least=1, at_most=MAX_LATENT_SIZE),
    )
    latent_tokens: int | None = declare(
        None,
        Option(
            "Tokens of the context that a latent vector takes.",
            "N",
            unset=f"{LATENT_TOKENS}",
            at_least=1,
            at_most=MAX_LATENT_TOKENS,
        ),
    )
    free_bits: float | None = declare(
        None,
        Option(
            "Nats of each latent dimension that cost nothing.", "NATS", unset=f"{FREE_BITS}", at_least=0, at_most=100
        ),
    )
    kl_cycles: int | None = declare(
        None,
        Option(
            "How often the weight of the divergence rises from 0 to 1; 0: it is always 1.",
            "N",
            unset=f"{KL_CYCLES}",
            at_least=0,
            at_most=1000,
        ),
    )
    word_dropout: float | None = declare(
        None,
        Option("Part of the words that the decoder must do without in training.", "PART", unset="0", fraction=True),
    )
    alone: bool = declare(False, Option("With --latent: also train the same model without z, to compare."))
    held_out: Path | None = declare(None, _HELD_OUT_FILE)
    learning_rate: float | None = declare(None, replace(_LEARNING_RATE, unset="by method and width"))
    patience: int = declare(3, _PATIENCE)
    evaluations: int = declare(10, _EVALUATIONS)
    device: Device = declare("auto", _DEVICE)
    seed: int = declare(0, _SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.latent:
            given = [name for name in _OF_LATENT if getattr(self, name) not in (None, False)]
            if given:
                raise TrainingError(f"--{given[0].replace('_', '-')} belongs to --latent; give both, or neither")
            return
        if self.chosen_method != "full":
            raise TrainingError(f"--latent trains all weights; leave out --method {self.method}")
        others: dict[str, object] = {"prompt": self.prompt, "completion": self.completion, "turn": self.turn}
        others |= {"second": self.second, "similarity": self.similarity, "pooling": self.pooling}
        others |= {"window": self.window, "rank": self.rank}
        for flag, value in others.items():
            if value is not None:
                raise TrainingError(f"--latent learns the lines of a plain text; leave out --{flag}")

    @property
    def chosen_method(self) -> Method:
        """What is trained: the method asked for, or the default."""
        return self.method or ("full" if self.latent else "lora")

    def task_for(self, data: Path) -> Task | ChatTask | SimilarityTask | None:
        """How rows of `data` become examples; None where the file is plain text.

        Raises:
            ConfigError: a template is missing or cannot be read.
            TrainingError: an option does not suit this kind of file, or another option.
        """
        if is_records_file(data):
            if self.latent:
                raise TrainingError(f"--latent learns the lines of a plain text, and {str(data)!r} is a file of rows")
            if self.window is not None:
                raise TrainingError("--window is for plain text; an example is never cut")
            if (self.second, self.similarity, self.pooling) != (None, None, None):
                if self.completion is not None or self.turn is not None:
                    raise TrainingError(
                        "--similarity compares --prompt with --second; leave out --completion and --turn"
                    )
                return SimilarityTask.parse(self.prompt, self.second, self.similarity, self.pooling)
            if self.turn is None:
                return Task.parse(self.prompt, self.completion)
            if self.prompt is not None or self.completion is not None:
                raise TrainingError(
                    "--turn is for chats, --prompt and --completion for other rows: give one or the other"
                )
            return ChatTask.parse(self.turn)
        if is_records_file(Path(data.stem)):
            raise TrainingError(f"{str(data)!r} seems to be compressed; decompress it to {data.stem} first")
        if (self.prompt, self.completion, self.turn, self.second, self.similarity) != (None,) * 5:
            message = f"--prompt and --completion need named columns, but {str(data)!r} is taken as plain text"
            if self.turn is not None:
                message = f"--turn needs chats, but {str(data)!r} is taken as plain text"
            raise TrainingError(f"{message}; give a .jsonl, .json, .tsv or .csv file")
        return None

    def room_in(self, context: int) -> int:
        """The tokens of an example, or of a window, that fit into a context beside the prefix.

        Raises:
            TrainingError: --prefix-tokens or --window is too large for the context.
        """
        room = context - self.prefix_tokens if self.chosen_method == "prefix" else context
        if room < LEAST_ROOM_TOKENS:
            message = f"--prefix-tokens {self.prefix_tokens} leaves no room in the context of {context}"
            raise TrainingError(f"{message}: give at most {context - LEAST_ROOM_TOKENS}")
        if self.window is not None and not 2 <= self.window <= room:
            raise TrainingError(f"--window must be 2 to {room} tokens, got {self.window}")
        return room


@dataclass(frozen=True)
class DistillOptions(TrainingOptions):
    """How a student learns from a teacher."""

    size: str = declare("1M", Option(f"A new student: {_SIZES}, or a GPT-2 config.json.", "SIZE"))
    layers: int | None = declare(
        None, Option("Instead: a student cut out of the teacher, of N of its layers.", "N", at_least=1)
    )
    tokens: int | None = declare(None, replace(_TOKENS, unset="two passes over the data"))
    batch_tokens: int | None = declare(None, _BATCH_TOKENS)
    soft: float = declare(1.0, Option("Weight of the loss against the teacher's distribution.", "W", at_least=0))
    hidden: float = declare(1.0, Option("Weight of the loss against the teacher's hidden states.", "W", at_least=0))
    hard: float = declare(0.5, Option("Weight of the loss on the text itself.", "W", at_least=0))
    temperature: float = declare(2.0, Option("Softens the distributions of teacher and student.", "T", above=0))
    alone: bool = declare(True, Option("Also train the student without a teacher, to compare."))
    held_out: Path | None = declare(None, _HELD_OUT_FILE)
    learning_rate: float | None = declare(None, _LEARNING_RATE)
    patience: int = declare(0, _PATIENCE)
    evaluations: int = declare(10, _EVALUATIONS)
    device: Device = declare("auto", _DEVICE)
    seed: int = declare(0, _SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.size)
        if self.soft == self.hidden == 0:
            raise TrainingError("--soft and --hidden are both 0: the teacher would teach nothing; use edgelm pretrain")
