"""What transformers generates from a checkpoint, and what edgelm generates from its bundle."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

import edgelm
from edgelm_export.pipeline import export
from tests.against_transformers.combinations.combination import Combination, Prompt
from tests.export.checkpoints import FOOTPRINT

NEW_TOKENS = 8
MOST_TOKENS = 40
"""More new tokens than settings ask for, except where they set no limit."""
DRAWN_TOKENS = 64
"""Length of the text on which the export measures."""

Rows = list[tuple[list[int], str]]
"""New ids without the token that ends the text, and their text, of each returned sequence."""


@dataclass(frozen=True)
class Failed:
    """There is no text, and why."""

    reason: str


@dataclass(frozen=True)
class Generated:
    """A row for each returned sequence."""

    rows: Rows


Outcome = Failed | Generated


class Transformers:
    """GPT2LMHeadModel and AutoTokenizer of a folder."""

    def __init__(self, folder: Path) -> None:
        """Load them; raises whatever transformers raises, and ValueError where weights are missing."""
        with _quiet():
            self.model, info = transformers.GPT2LMHeadModel.from_pretrained(
                folder,
                attn_implementation="eager",
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
            if info["missing_keys"]:
                raise ValueError(f"missing weights: {sorted(info['missing_keys'])[:3]}")
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            self.model.eval()
            with suppress(Exception):  # this settles which settings count, those of config.json or those of the file
                self._try()
            self.config = self.model.generation_config
            self._read_as_documented()
            self._try()

    def _try(self) -> None:
        """Generate with the settings as they are, sampling included: some fail at the first token only."""
        self.model.generate(torch.tensor([[0]]), attention_mask=torch.ones(1, 1), max_time=0.0)

    def _read_as_documented(self) -> None:
        """Change settings at which transformers fails to what docs/compatibility.md says that edgelm makes of them."""
        size, config = self.model.config.vocab_size, self.config
        for name in ("bos_token_id", "forced_bos_token_id", "forced_eos_token_id"):
            value = getattr(config, name)
            if isinstance(value, int) and value >= size:
                setattr(config, name, None)
        for name in ("bad_words_ids", "sequence_bias", "eos_token_id"):
            if getattr(config, name) in ([], {}):
                setattr(config, name, None)
        biases = config.sequence_bias
        if isinstance(biases, list) and any(0 in tokens for tokens, _ in biases):  # a list must not have the token 0
            config.sequence_bias = {tuple(tokens): bias for tokens, bias in biases}
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            if isinstance(value := getattr(config, name), int):
                setattr(config, name, [value])
        if not config.do_sample and isinstance(config.top_k, str) and not config.penalty_alpha:
            config.top_k = 50
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if not any(isinstance(end, int) and 0 <= end < size for end in ends):
            config.exponential_decay_length_penalty = None
            if (config.prompt_lookup_num_tokens or 0) > 0:
                config.prompt_lookup_num_tokens = None

    @property
    def context(self) -> int:
        """The positions of the model."""
        return int(self.model.config.n_positions)

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids that a prompt begins with: those of a text without the special tokens behind it."""
        if not isinstance(prompt, str):
            return prompt
        whole, places = self._around(prompt)
        if len(places) > 1:  # no ids, or those of a special token that stands around texts: where another text would be
            _, others = self._around("a")
            places = [place for place in others if place in places]
        plain = self.tokenizer(prompt, add_special_tokens=False).input_ids
        before = places[0]
        ids = whole[: before + len(plain)]
        if not prompt and not ids and self.config.bos_token_id is not None:
            ids = [self.config.bos_token_id]
        return list(ids)

    def _around(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text with special tokens, and the places where its ids without them may begin."""
        whole, plain = (self.tokenizer(text, add_special_tokens=flag).input_ids for flag in (True, False))
        return whole, [i for i in range(len(whole) + 1) if whole[i : i + len(plain)] == plain]

    def generate(self, prompt: Prompt) -> Outcome:
        """Continue a prompt greedily or by beams, up to the end of the context."""
        try:
            with _quiet():
                return self._generate(self.ids(prompt))
        except Exception as error:
            return Failed(f"{type(error).__name__}: {error}")
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            return Failed(f"panic: {error}")

    def options(self, prompt_tokens: int) -> dict[str, Any]:
        """Options for both sides: greedy where the settings sample, and a limit where they have none."""
        options: dict[str, Any] = {"do_sample": False} if self.config.do_sample else {}
        if self._new_tokens(prompt_tokens) is None:
            options["max_new_tokens"] = NEW_TOKENS
        return options

    def _new_tokens(self, prompt_tokens: int) -> int | None:
        """How many new tokens the settings ask for, if it is a reasonable number."""
        config = self.config
        if config.max_new_tokens is not None:
            count = config.max_new_tokens
        elif config.max_length in (None, 20):  # 20 is the default, which edgelm does not have
            return None
        else:
            count = config.max_length - prompt_tokens
        return count if count <= MOST_TOKENS else None

    def _limit(self, prompt_tokens: int, room: int) -> dict[str, Any]:
        """A limit of new tokens where the context would end before the text does."""
        count = self._new_tokens(prompt_tokens)
        count = NEW_TOKENS if count is None else count
        # At the last token of its limit transformers forces the end; a full context is no such limit.
        return {"max_new_tokens": room, "forced_eos_token_id": None} if count > room else {}

    def _generate(self, ids: list[int]) -> Outcome:
        if len(ids) > self.context:
            return Failed("the prompt is longer than the context")
        options = self.options(len(ids)) | self._limit(len(ids), self.context + 1 - len(ids))
        inputs = torch.tensor([ids], dtype=torch.long)
        output = self.model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        end = self.config.eos_token_id
        ends = [] if end is None else end if isinstance(end, list) else [end]
        before = len(self._text(ids))
        rows = []
        for row in sequences[:, len(ids) :].tolist():
            new = row[: next((place for place, token in enumerate(row) if token in ends), len(row))]
            rows.append((new, self._text([*ids, *new])[before:]))
        return Generated(rows)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class Edgelm:
    """The bundle of a checkpoint. `refusal` is the error of the export, if there is one."""

    def __init__(self, source: Path, output: Path) -> None:
        """Export the checkpoint `source` into the folder `output`, and load the bundle."""
        with (
            mock.patch("edgelm_export.pipeline.EVALUATION_TOKENS", DRAWN_TOKENS),
            mock.patch("edgelm_export.certify.certificate.measure_footprint", lambda bundle: FOOTPRINT),
            # Threads that wait for each other spin, and on a busy machine take most of an export's time.
            mock.patch("edgelm_export.pipeline.default_threads", lambda: 1),
            mock.patch("edgelm_export.certify.optimum_graph.default_threads", lambda: 1),
        ):
            self.exported = export(str(source), output, "fp32")
        self.model = edgelm.load(output, device="cpu", threads=1)

    def generate(self, prompt: Prompt, options: dict[str, Any]) -> Outcome:
        """Continue a prompt; raises everything but an EdgelmError."""
        try:
            completion = self.model.generate(prompt, **options)
        except edgelm.EdgelmError as error:
            return Failed(str(error))
        return Generated([(list(choice.token_ids), choice.text) for choice in completion.choices])


# What Python and other libraries say about their own troubles; a refusal says what is wrong with the checkpoint.
_FOREIGN = re.compile(
    r"NoneType|object has no attribute|unexpected keyword|not subscriptable|not iterable|not supported between|"
    r"positional argument|index out of range|KeyError|Traceback|\.py\b|please report|invalid literal|unhashable|"
    r"size mismatch|Error\(|must be str|concatenate|trust_remote_code|from_tf"
)


_RULED_OUT = re.compile(r"no token is left to choose|no beam can go on")
"""Where the settings rule out every token, transformers writes one of those tokens, and edgelm says so."""


def complaint(sentence: str) -> str | None:
    """What is wrong with a refusal, if anything."""
    if "\n" in sentence.strip() or not sentence.strip():
        return "is not one line"
    if found := _FOREIGN.search(sentence):
        return f"does not name the cause ({found[0]!r})"
    return "is too long" if len(sentence) > 700 else None


def differences(combination: Combination, output: Path) -> tuple[str, list[str]]:
    """Whether a combination was "equal" or "refused", and what is wrong with it: a line for each fault."""
    try:
        theirs: Transformers | None = Transformers(combination.reference)
        cause = ""
    except Exception as error:
        theirs, cause = None, f"{type(error).__name__}: {error}"[:300]
    try:
        ours = Edgelm(combination.source, output)
    except edgelm.EdgelmError as error:
        return f"refused: {error}", list(_refusal_faults(combination, theirs, str(error)))
    except BaseException as error:
        return "failed", [f"export raised {type(error).__name__}: {error}"[:500]]
    with ours.model:
        if theirs is None:
            # Settings that rule out every token end in a sentence when a text begins, not at the export.
            outcome = ours.generate([0], {"max_new_tokens": NEW_TOKENS})
            if isinstance(outcome, Failed) and not complaint(outcome.reason):
                return f"refused: {outcome.reason}", []
            return "failed", [f"exported, but transformers cannot use it: {cause}"]
        return "equal", list(_generation_faults(combination.prompts(), theirs, ours))


def _refusal_faults(combination: Combination, theirs: Transformers | None, sentence: str) -> Iterator[str]:
    if theirs is not None and not any(part in sentence for part in combination.refused):
        yield f"refused, but transformers generates: {sentence}"
    if wrong := complaint(sentence):
        yield f"the refusal {wrong}: {sentence}"


def _generation_faults(prompts: Sequence[Prompt], theirs: Transformers, ours: Edgelm) -> Iterator[str]:
    for prompt in prompts:
        expected = theirs.generate(prompt)
        try:
            options = theirs.options(len(theirs.ids(prompt)))
        except BaseException:  # it has no ids: `generate` failed
            options = {"max_new_tokens": NEW_TOKENS}
        try:
            actual = ours.generate(prompt, options)
        except BaseException as error:
            yield f"{prompt!r:.200} raised {type(error).__name__}: {error}"[:700]
            continue
        if isinstance(actual, Failed) and (wrong := complaint(actual.reason)):
            yield f"the refusal of {prompt!r:.80} {wrong}: {actual.reason}"
        if isinstance(actual, Failed) and (isinstance(expected, Failed) or _RULED_OUT.match(actual.reason)):
            continue
        if actual != expected:
            yield f"{prompt!r:.200} gives {actual} instead of {expected}"[:1200]


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers says much about odd settings."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
