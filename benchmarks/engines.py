"""The engines of the comparison, each loaded and driven by its own public API.

All engines decode greedily or by beam search, with a KV cache, from token ids. Imports happen in the loaders only,
because a process should hold one engine.
"""

import json
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
    """From the call to the first new token."""
    decode_seconds: float
    """From the first new token to the return of the call."""
    token_ids: Sequence[int]
    """The new tokens of the first prompt."""


Prompts = Sequence[Sequence[int]]
"""Token ids: one row for each sequence of the batch, all of the same length."""

ROOM_TOKENS = 2_048
"""The longest text that engines make room for where a model could take more."""

Generate = Callable[[Prompts, int], Timing]
"""Continues every prompt greedily: (prompts, number of new tokens) -> timing."""
BeamSearch = Callable[[Prompts, int, int], Timing]
"""Continues every prompt by beam search: (prompts, number of new tokens, number of beams) -> timing."""


def single_prompt(prompts: Prompts) -> Sequence[int]:
    """The prompt of a batch of one, for engines that are driven one sequence at a time.

    Raises:
        ValueError: the batch has several prompts.
    """
    if len(prompts) != 1:
        raise ValueError(f"this engine is driven one sequence at a time, got a batch of {len(prompts)}")
    return prompts[0]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to generate."""

    generate: Generate
    import_seconds: float
    load_seconds: float
    """Seconds of loading the model, without the imports."""
    beam_search: BeamSearch | None = None
    """None where the engine is not driven with beams."""


def load_edgelm(folder: Path, threads: int) -> Loaded:
    """edgelm: a bundle, driven by `Model.generate`."""
    sizes = json.loads((folder / "bundle.json").read_bytes())["architecture"]
    context = min(ROOM_TOKENS, sizes["context_length"])
    started = time.perf_counter()
    import onnxruntime  # noqa: F401  # edgelm imports it in `load`; its time belongs to the imports here

    from edgelm import load

    imported = time.perf_counter()
    model = load(folder, device="cpu", threads=threads, context=context)
    loaded = time.perf_counter()

    def generate(prompts: Prompts, new_tokens: int, num_beams: int = 1) -> Timing:
        called = time.perf_counter()
        model.forget()
        if len(prompts) > 1:
            completions = model.generate_batch(
                prompts, max_rows=len(prompts), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
            )
            seconds = time.perf_counter() - called
            # The prefill of the last row. Earlier rows may decode meanwhile, so only whole calls can be compared.
            prefill = max(completion.stats.prefill_seconds for completion in completions)
            return Timing(prefill, seconds - prefill, completions[0].choices[0].token_ids)
        completion = model.generate(
            single_prompt(prompts), max_new_tokens=new_tokens, do_sample=False, num_beams=num_beams, eos_token_id=None
        )
        seconds = time.perf_counter() - called
        # The whole call counts, as for the peers; `stats.decode_seconds` leaves out the detokenizing.
        prefill = completion.stats.prefill_seconds
        return Timing(prefill, seconds - prefill, completion.choices[0].token_ids)

    return Loaded(generate, imported - started, loaded - imported, generate)


def load_optimum(folder: Path, threads: int) -> Loaded:
    """optimum: a graph quantized by `ORTQuantizer`, driven by `ORTModelForCausalLM.generate`."""
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
    """transformers: the checkpoint in float32 with the default attention, driven by `generate`."""
    started = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM

    imported = time.perf_counter()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generate = _transformers_generate(model)
    return Loaded(generate, imported - started, time.perf_counter() - imported, generate)


class _FirstToken:
    """A streamer for transformers' `generate` that notes the time of the first new token.

    `generate` puts the prompt first, then each new token.
    """

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
    """An engine and its model, a row of the table."""

    model: str
    """Name of the model's folder, as `benchmarks.prepare.model_folder` takes it."""
    loader: str
    """Function that loads the engine in its own process, as "module:function": (folder, threads) -> `Loaded`."""


ENGINES = {
    "edgelm int8": Engine("edgelm-int8", "benchmarks.engines:load_edgelm"),
    "edgelm int4": Engine("edgelm-int4", "benchmarks.engines:load_edgelm"),
    "optimum int8": Engine("optimum-int8", "benchmarks.engines:load_optimum"),
    "transformers fp32": Engine("checkpoint", "benchmarks.engines:load_transformers"),
}
BASELINE = "optimum int8"

ENVIRONMENT = {
    # Installed packages are not compiled at every start.
    **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "ORT_DISABLE_TELEMETRY": "1",  # edgelm sets it itself, so the peers get it too
}
"""Environment variables of every worker process."""
