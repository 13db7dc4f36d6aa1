"""Time of attention alone with keys and values in float32 and in 8 bits: what an int8 cache gains or costs.

    python -m benchmarks.quantized_cache

Runs twelve GroupQueryAttention nodes of GPT-2 124M's shape, each with its own cache and a scale for each channel.
Prints a Markdown table of milliseconds for all twelve nodes, medians over interleaved rounds. Nothing is downloaded.
"""

import argparse
import time
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

LAYERS, HEADS, HEAD_DIM, CAPACITY = 12, 12, 64, 1024
KINDS = {"float32": np.float32, "int8": np.int8}
CASES = [(16, 1), (128, 1), (512, 1), (896, 1), (512, 5), (512, 9), (0, 128), (0, 256), (256, 256), (640, 256)]
"""Pairs of cached tokens and new tokens."""
CACHES = [f"{part}.{layer}" for layer in range(LAYERS) for part in ("key", "value")]


def graph(kind: str) -> bytes:
    """A serialized model of the twelve nodes. All nodes take the same activations, which are float32 for every kind."""
    info, node_inputs = helper.make_tensor_value_info, ["qkv", "", "", "", "", "seqlens_k", "total", *[""] * 9, "new"]
    cache_type = helper.np_dtype_to_tensor_dtype(np.dtype(KINDS[kind]))
    attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": HEADS}
    scales = []
    if kind == "int8":
        node_inputs[12] = node_inputs[13] = "scale"
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        scales = [numpy_helper.from_array(np.full((1, HEADS, 1, HEAD_DIM), 4 / 127, np.float32), "scale")]
    nodes = []
    for layer in range(LAYERS):
        node_inputs[3:5] = [f"past_key.{layer}", f"past_value.{layer}"]
        outputs = [f"out.{layer}", f"present_key.{layer}", f"present_value.{layer}"]
        nodes.append(
            helper.make_node("GroupQueryAttention", node_inputs, outputs, domain="com.microsoft", **attributes)
        )
    cache = ["batch", HEADS, "capacity", HEAD_DIM]
    inputs = [
        info("qkv", TensorProto.FLOAT, ["batch", "new_tokens", 3 * HEADS * HEAD_DIM]),
        *(info(name, TensorProto.INT32, ["batch"]) for name in ("seqlens_k", "new")),
        info("total", TensorProto.INT32, []),
        *(info(f"past_{name}", cache_type, cache) for name in CACHES),
    ]
    outputs_info = [
        *(info(f"out.{layer}", TensorProto.FLOAT, None) for layer in range(LAYERS)),
        *(info(f"present_{name}", cache_type, cache) for name in CACHES),
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(nodes, "attention", inputs, outputs_info, scales)
    serialized: bytes = helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()
    return serialized


class Attention:
    """A session with one kind of cache, filled with random numbers."""

    def __init__(self, kind: str, threads: int, rng: np.random.Generator) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(graph(kind), options, providers=["CPUExecutionProvider"])
        numbers = rng.standard_normal((1, HEADS, CAPACITY, HEAD_DIM))
        content = (numbers * 127 / 4).clip(-127, 127).astype(np.int8) if kind == "int8" else numbers.astype(np.float32)
        self._caches = {name: onnxruntime.OrtValue.ortvalue_from_numpy(content) for name in CACHES}
        self._rng = rng

    def milliseconds(self, past: int, new: int, repeats: int) -> float:
        """Time of one pass through the twelve nodes, the mean of `repeats` passes.

        Args:
            past: tokens in the cache.
            new: new tokens.
            repeats: number of passes.
        """
        binding = self._session.io_binding()
        binding.bind_cpu_input("qkv", self._rng.standard_normal((1, new, 3 * HEADS * HEAD_DIM)).astype(np.float32))
        binding.bind_cpu_input("seqlens_k", np.array([past + new - 1], np.int32))
        binding.bind_cpu_input("total", np.array(past + new, np.int32))
        binding.bind_cpu_input("new", np.array([new], np.int32))
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)
        for layer in range(LAYERS):
            binding.bind_output(f"out.{layer}")
        self._session.run_with_iobinding(binding)
        started = time.perf_counter()
        for _ in range(repeats):
            self._session.run_with_iobinding(binding)
        return 1e3 * (time.perf_counter() - started) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description="Time attention with a cache of float32 and of 8 bits.")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default %(default)s")
    options = parser.parse_args()
    engines = {kind: Attention(kind, options.threads, np.random.default_rng(0)) for kind in KINDS}
    print(f"| in the cache, new | {' | '.join(f'{kind} ms' for kind in KINDS)} | x |\n|---|--:|--:|--:|")
    for past, new in CASES:
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(options.rounds):
            for kind, engine in engines.items():
                times[kind].append(engine.milliseconds(past, new, 20 if new < 16 else 2))
        ratio = median(a / b for a, b in zip(times["int8"], times["float32"], strict=True))
        cells = " | ".join(f"{median(times[kind]):.2f}" for kind in KINDS)
        print(f"| {past}, {new} | {cells} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
