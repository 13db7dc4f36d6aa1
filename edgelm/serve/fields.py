"""The fields of requests that generate text: OpenAI's with OpenAI's ranges, and edgelm's own options beside them.

A field that is not declared is refused by its name, and so is a declared one that edgelm does not support.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, Field, StringConstraints

from edgelm.decoding.generation_config import OPTIONS, GenerationOptions
from edgelm.serve.constraints import ConstraintField, constraint_of_field
from edgelm.serve.errors import ApiError
from edgelm.serve.limits import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_IDS,
    MAX_LIST_ITEMS,
    MAX_PROMPT_CHARACTERS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
)
from edgelm.serve.strict import NO_EFFECT, StrictBody, in_words
from edgelm.text.prompts import Prompt

Body = TypeVar("Body", bound=BaseModel)

LEAST_TEMPERATURE = 0.001
"""Temperatures below it take the likeliest token, as 0 does."""


def own(name: str, **bounds: Any) -> Any:
    """A field that is an option of edgelm, by the option's name, described by the option's own words."""
    return Field(default=None, description=OPTIONS[name].meaning, **bounds)


TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Text = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARACTERS)]
FilledText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS)]
OnePrompt = Annotated[
    FilledText | TokenIds,
    in_words(f"a text of 1 to {MAX_PROMPT_CHARACTERS:,} characters, or a list of 1 to {MAX_IDS:,} token ids"),
]
"""One text or the token ids of one."""

PLAIN_TEXTS = "a text, a list of texts, a list of token ids, or a list of such lists"

StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[
    StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None,
    in_words(f"a text of 1 to {MAX_STOP_CHARACTERS} characters, or a list of at most {MAX_STOPS} of them"),
]
BiasKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]
Biases = Annotated[dict[BiasKey, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)]
OwnIds = Annotated[list[TokenId], Field(max_length=MAX_LIST_ITEMS)]
OwnSequence = Annotated[list[TokenId], Field(min_length=1, max_length=64)]
OwnSequences = Annotated[list[OwnSequence], Field(max_length=MAX_LIST_ITEMS)]


def prompts_of(given: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]) -> list[Prompt]:
    """The prompts of a field that holds a text, the ids of one, or a list of either."""
    several = not isinstance(given, str) and not isinstance(given[0], int)
    return list(given) if several else [given]  # type: ignore[arg-type, list-item]


class ModelField(StrictBody):
    """A request to one of the server's models."""

    model: str | None = Field(
        default=None, max_length=256, description="A name that /v1/models lists; the first of them by default."
    )


class StreamOptions(StrictBody):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(default=None, description="Send a last chunk with the token counts.")
    include_obfuscation: bool | None = Field(default=None, description=NO_EFFECT + "chunks are never padded.")


class SamplingFields(ModelField):
    """What every request that generates text may have: sampling, length and identity, without the prompt."""

    temperature: float | None = Field(default=None, ge=0, le=2, description="0 takes the likeliest token each time.")
    top_p: float | None = Field(default=None, ge=0, le=1, description=OPTIONS["top_p"].meaning)
    user: str | None = Field(
        default=None, max_length=1024, description=NO_EFFECT + "nothing is stored or counted by user."
    )


class GenerationFields(SamplingFields):
    """`SamplingFields`, with OpenAI's other options that completions and chats share, and edgelm's own options."""

    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="Number of texts.")
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description=OPTIONS["frequency_penalty"].meaning)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description=OPTIONS["presence_penalty"].meaning)
    logit_bias: Biases | None = Field(default=None, description="Numbers to add to the logits of token ids.")
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**63, description="Equal seeds give equal texts, whatever else runs."
    )
    stop: Stops = Field(default=None, description=OPTIONS["stop_strings"].meaning)
    stream: bool | None = Field(default=None, description="Send the text piece by piece, as server-sent events.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with `stream`.")

    do_sample: bool | None = own("do_sample")
    top_k: int | None = own("top_k", ge=1, lt=2**31)
    min_p: float | None = own("min_p", ge=0, le=1)
    typical_p: float | None = own("typical_p", gt=0, le=1)
    epsilon_cutoff: float | None = own("epsilon_cutoff", ge=0, lt=1)
    eta_cutoff: float | None = own("eta_cutoff", ge=0, lt=1)
    top_n_sigma: float | None = own("top_n_sigma", gt=0, le=100)
    xtc_probability: float | None = own("xtc_probability", ge=0, le=1)
    xtc_threshold: float | None = own("xtc_threshold", gt=0, le=0.5)
    mirostat_tau: float | None = own("mirostat_tau", gt=0, le=100)
    mirostat_eta: float | None = own("mirostat_eta", gt=0, le=1)
    repetition_penalty: float | None = own("repetition_penalty", gt=0, le=1000)
    no_repeat_ngram_size: int | None = own("no_repeat_ngram_size", ge=0, le=1024)
    dry_multiplier: float | None = own("dry_multiplier", ge=0, le=100)
    dry_base: float | None = own("dry_base", ge=1, le=10)
    dry_allowed_length: int | None = own("dry_allowed_length", ge=1, le=1024)
    min_new_tokens: int | None = own("min_new_tokens", ge=0, lt=2**31)
    max_time: float | None = own("max_time", gt=0, le=1e9)
    context_overflow: Literal["stop", "truncate"] | None = own("context_overflow")
    pinned_tokens: int | None = own("pinned_tokens", ge=0, lt=2**31)
    constraint: ConstraintField | None = Field(default=None, description="What the text must be.")
    eos_token_id: OwnIds | None = own("eos_token_id")
    bad_words_ids: OwnSequences | None = own("bad_words_ids")
    suppress_tokens: OwnIds | None = own("suppress_tokens")
    begin_suppress_tokens: OwnIds | None = own("begin_suppress_tokens")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def generation_options(self, max_new_tokens: int | None) -> GenerationOptions:
        """The options of `TextScheduler.submit`, without those that the client left to the bundle.

        `n` and `max_time` are left out: see `Call.ask_for_rows` and `Call.submit`. Raises ApiError.
        """
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        options: dict[str, Any] = {name: value for name in SAME_OPTIONS if (value := getattr(self, name)) is not None}
        if self.constraint is not None:
            options["constraint"] = constraint_of_field(self.constraint)
        options |= sampling_options(self)
        if self.logit_bias:
            options["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        if self.seed is not None:
            options["seed"] = self.seed % 2**64  # OpenAI's seeds may be negative
        if self.stop:
            options["stop_strings"] = self.stop
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        return cast(GenerationOptions, options)


_OTHERWISE = ("temperature", "top_p", "logit_bias", "seed", "constraint", "max_time")
"""Options of edgelm whose fields have another form or another meaning here."""
SAME_OPTIONS = tuple(name for name in GenerationFields.model_fields if name in OPTIONS and name not in _OTHERWISE)
"""Fields that are options of edgelm as they stand."""


def sampling_options(fields: SamplingFields) -> dict[str, Any]:
    """`do_sample`, `temperature` and `top_p` as edgelm's options.

    OpenAI lets temperature and top_p be 0, which leaves the likeliest token; edgelm calls that greedy decoding.
    """
    if (fields.temperature is not None and fields.temperature < LEAST_TEMPERATURE) or fields.top_p == 0:
        return {"do_sample": False}
    given = {"temperature": fields.temperature, "top_p": fields.top_p}
    return {name: value for name, value in given.items() if value is not None}
