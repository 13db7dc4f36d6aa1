"""The engines of the comparison, each loaded and driven by its own public API. Imports happen in the loaders only.

All decode greedily, or by beam search, with a KV cache, from token ids.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Timing:
    """One generation, from the call to its return."""

    prefill_seconds: float
    """Up to the first new token."""
    decode_seconds: float
    """From then to the return of the call: all other tokens."""
    token_ids: Sequence[int]
    """The new tokens of the first prompt."""


Prompts = Sequence[Sequence[int]]
"""Token ids, one row a sequence of the batch, all of one length."""

Generate = Callable[[Prompts, int], Timing]
"""Continues every prompt by a number of new tokens, greedily."""
BeamSearch = Callable[[Prompts, int, int], Timing]
"""The same, following a number of beams."""


def only(prompts: Prompts) -> Sequence[int]:
    """The prompt of a batch of one, for engines that are driven one sequence at a time."""
    if len(prompts) != 1:
        raise ValueError(f"this engine is driven one sequence at a time, got a batch of {len(prompts)}")
    return prompts[0]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to generate."""

    generate: Generate
    import_seconds: float
    load_seconds: float
    """Without the imports."""
    beam_search: BeamSearch | None = None
    """Where it is driven with beams too."""


def load_edgelm(folder: Path, threads: int) -> Loaded:
    """A bundle, driven by `Model.generate`."""
    started = time.perf_counter()
    import onnxruntime  # noqa: F401  # edgelm imports it in `load`; its time belongs to the imports here

    from edgelm import load

    imported = time.perf_counter()
    model = load(folder, device="cpu", threads=threads)
    loaded = time.perf_counter()

    def generate(prompts: Prompts, new_tokens: int, num_beams: int = 1) -> Timing:
        called = time.perf_counter()
        model.forget()
        if len(prompts) > 1:
            completions = model.generate_batch(
                prompts, max_rows=len(prompts), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
            )
            seconds = time.perf_counter() - called
            # The last row's: until then some rows may decode already, so that only the whole call can be compared.
            prefill = max(completion.stats.prefill_seconds for completion in completions)
            return Timing(prefill, seconds - prefill, completions[0].choices[0].token_ids)
        completion = model.generate(
            only(prompts), max_new_tokens=new_tokens, do_sample=False, num_beams=num_beams, eos_token_id=None
        )
        seconds = time.perf_counter() - called
        # Not `stats.decode_seconds`, which leaves out the detokenizing: the whole call counts here, as for the peers.
        prefill = completion.stats.prefill_seconds
        return Timing(prefill, seconds - prefill, completion.choices[0].token_ids)

    return Loaded(generate, imported - started, loaded - imported, generate)


def load_optimum(folder: Path, threads: int) -> Loaded:
    """A graph quantized by optimum, driven by `ORTModelForCausalLM.generate`."""
    started = time.perf_counter()
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    imported = time.perf_counter()
    torch.set_num_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = ORTModelForCausalLM.from_pretrained(folder, file_name="model_quantized.onnx", session_options=options)
    generate = _transformers_generate(model)
    return Loaded(generate, imported - started, time.perf_counter() - imported, generate)


def load_transformers(folder: Path, threads: int) -> Loaded:
    """The checkpoint itself in float32 with transformers' default attention, driven by `generate`."""
    started = time.perf_counter()
    import torch
    from transformers import GPT2LMHeadModel

    imported = time.perf_counter()
    torch.set_num_threads(threads)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    generate = _transformers_generate(model)
    return Loaded(generate, imported - started, time.perf_counter() - imported, generate)


class _FirstToken:
    """A streamer for transformers' `generate`: it gets the prompt, then each token, and notes when the first came."""

    def __init__(self) -> None:
        self._puts = 0
        self.at = 0.0

    def put(self, ids: Any) -> None:
        self._puts += 1
        if self._puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def _transformers_generate(model: Any) -> Callable[..., Timing]:
    import torch

    model.generation_config.eos_token_id = None  # every engine must write all the tokens it is asked for

    def generate(prompts: Prompts, new_tokens: int, num_beams: int = 1) -> Timing:
        ids = torch.tensor(prompts)  # (B, T)
        first = _FirstToken()
        called = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=num_beams,
            use_cache=True,
            streamer=first if num_beams == 1 else None,  # transformers streams no beams
        )
        returned = time.perf_counter()
        first.at = first.at if num_beams == 1 else called
        return Timing(first.at - called, returned - first.at, output[0, ids.shape[1] :].tolist())

    return generate


@dataclass(frozen=True, slots=True)
class Engine:
    """A row of the table."""

    model: str
    """The name of its model's folder; see `benchmarks.prepare.model_folder`."""
    loader: str
    """The function that loads it in its own process, "module:function" with (folder, threads) -> `Loaded`."""


ENGINES = {
    "edgelm int8": Engine("edgelm-int8", "benchmarks.engines:load_edgelm"),
    "edgelm int4": Engine("edgelm-int4", "benchmarks.engines:load_edgelm"),
    "optimum int8": Engine("optimum-int8", "benchmarks.engines:load_optimum"),
    "transformers fp32": Engine("checkpoint", "benchmarks.engines:load_transformers"),
}
BASELINE = "optimum int8"

ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "ORT_DISABLE_TELEMETRY": "1",  # edgelm sets it itself; the peer gets the same
}
"""Of every worker process."""
