"""The keyword options of `Model.generate` and `Model.stream`, for type checkers; meanings: `GenerationConfig`."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from edgelm.decoding.generation_config import Cancel
from edgelm.decoding.logits_processors import LogitsProcessor


class GenerationOptions(TypedDict, total=False):
    """Every option, as a caller may write it."""

    max_new_tokens: int | None
    max_length: int | None
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    num_return_sequences: int
    stop_strings: str | Sequence[str]
    eos_token_id: int | Sequence[int] | None
    seed: int | None
    logprobs: int | None
    min_new_tokens: int
    min_length: int
    max_time: float | None
    cancel: Cancel | None
    context_overflow: Literal["stop", "truncate", "window"]
    pinned_tokens: int
    typical_p: float
    epsilon_cutoff: float
    eta_cutoff: float
    top_n_sigma: float | None
    xtc_probability: float
    xtc_threshold: float
    mirostat_tau: float | None
    mirostat_eta: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_sequence_breakers: Sequence[str | int]
    logit_bias: Mapping[int, float] | None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[tuple[Sequence[int], float]] | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    renormalize_logits: bool
    num_beams: int
    num_beam_groups: int
    diversity_penalty: float
    length_penalty: float
    early_stopping: bool | Literal["never"]
    penalty_alpha: float | None
    prompt_lookup_num_tokens: int | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor]
