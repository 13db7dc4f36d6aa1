"""The engines of the comparison, each loaded and driven by its own public API. Imports happen in the loaders only.

All decode greedily, or by beam search, with a KV cache, from token ids, one prompt at a time.
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
    new_tokens: int


Generate = Callable[[Sequence[int], int, int], Timing]
"""Continues prompt ids by a number of new tokens, following a number of beams; 1 is greedy."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to generate."""

    generate: Generate
    import_seconds: float
    load_seconds: float
    """Without the imports."""


def load_edgelm(folder: Path, threads: int) -> Loaded:
    """A bundle, driven by `Model.generate`."""
    started = time.perf_counter()
    import onnxruntime  # noqa: F401  # edgelm imports it in `load`; its time belongs to the imports here

    from edgelm import load

    imported = time.perf_counter()
    model = load(folder, device="cpu", threads=threads)
    loaded = time.perf_counter()

    def generate(prompt: Sequence[int], new_tokens: int, num_beams: int) -> Timing:
        called = time.perf_counter()
        model.forget()
        completion = model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, num_beams=num_beams)
        seconds = time.perf_counter() - called
        # Not `stats.decode_seconds`, which leaves out the detokenizing: the whole call counts here, as for the peers.
        prefill = completion.stats.prefill_seconds
        return Timing(prefill, seconds - prefill, completion.stats.new_tokens)

    return Loaded(generate, imported - started, loaded - imported)


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
    return Loaded(_transformers_generate(model), imported - started, time.perf_counter() - imported)


def load_transformers(folder: Path, threads: int) -> Loaded:
    """The checkpoint itself in float32 with transformers' default attention, driven by `generate`."""
    started = time.perf_counter()
    import torch
    from transformers import GPT2LMHeadModel

    imported = time.perf_counter()
    torch.set_num_threads(threads)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    return Loaded(_transformers_generate(model), imported - started, time.perf_counter() - imported)


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


def _transformers_generate(model: Any) -> Generate:
    import torch

    def generate(prompt: Sequence[int], new_tokens: int, num_beams: int) -> Timing:
        ids = torch.tensor([prompt])  # (1, T)
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
        return Timing(first.at - called, returned - first.at, output.shape[1] - len(prompt))

    return generate


@dataclass(frozen=True, slots=True)
class Engine:
    """A row of the table."""

    model: str
    """The name of its model's folder; see `benchmarks.prepare.model_folder`."""
    load: Callable[[Path, int], Loaded]


ENGINES = {
    "edgelm int8": Engine("edgelm-int8", load_edgelm),
    "edgelm int4": Engine("edgelm-int4", load_edgelm),
    "optimum int8": Engine("optimum-int8", load_optimum),
    "transformers fp32": Engine("checkpoint", load_transformers),
}
BASELINE = "optimum int8"

ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "ORT_DISABLE_TELEMETRY": "1",  # edgelm sets it itself; the peer gets the same
}
"""Of every worker process."""
