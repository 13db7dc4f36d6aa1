"""The lean GPT-2 graph: ten nodes a layer, KV cache in place, logits only for the rows asked for.

Shapes: B batch, T new tokens, C cache capacity, H heads, p padded head dim, D hidden size, V vocabulary, N rows.
"""

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from edgelm.bundle.manifest import GraphFacts, Matrix
from edgelm_export.graph.activations import write_activation
from edgelm_export.graph.products import Products
from edgelm_export.graph.writer import CONTRIB, GraphWriter
from edgelm_export.model.gpt2 import Array, Gpt2Weights, Layer, Linear, Norm
from edgelm_export.quantize.calibrate import StoredGpt2
from edgelm_export.quantize.recipe import POSITION_TABLE
from edgelm_export.quantize.storage import FLOAT16

MINIMUM_ONNXRUNTIME = "1.32"


def write_graph(model: StoredGpt2, folder: Path) -> tuple[GraphFacts, tuple[Matrix, ...]]:
    """Write ``model.onnx`` and ``model.onnx.data`` into `folder`; returns their facts and the account of matrices."""
    half = model.stored[POSITION_TABLE].storage == FLOAT16
    facts = GraphFacts(
        file="model.onnx",
        weights_file="model.onnx.data",
        minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
        devices=("cpu", "cuda") if half else ("cpu",),
        input_ids="input_ids",
        position_ids="position_ids",
        seqlens_k="seqlens_k",
        total_sequence_length="total_sequence_length",
        query_seqlens="query_seqlens",
        logits_index="logits_index",
        logits="logits",
        hidden_states="hidden_states",
        dtype="float16" if half else "float32",
        past_names=("past_key_values.{layer}.key", "past_key_values.{layer}.value"),
        present_names=("present.{layer}.key", "present.{layer}.value"),
        kv_layout="BHCD",
        kv_dtype="float16" if half else "float32",
    )
    writer = GraphWriter(folder, facts.file, facts.weights_file)
    products = Products(writer, model.stored, np.float16 if half else np.float32)
    _Body(model.source, facts, writer, products).write()
    writer.save("gpt2", *_signature(model.source, facts))
    return facts, tuple(products.matrices)


class _Body:
    """Writes the nodes in the order a token passes them."""

    def __init__(self, weights: Gpt2Weights, facts: GraphFacts, writer: GraphWriter, products: Products) -> None:
        self._weights = weights
        self._facts = facts
        self._writer = writer
        self._products = products
        self._node = writer.node

    def write(self) -> None:
        weights, names, node = self._weights, self._facts, self._node
        tokens = self._products.token_lookup(names.input_ids, weights.token_table, "tokens")  # (B, T, D)
        assert names.position_ids is not None  # GPT-2 takes positions as an input
        positions = self._products.position_lookup(names.position_ids, weights.position_table, "positions")  # (B, T, D)
        normed, residual = self._add_and_norm(tokens, positions, weights.layers[0].attention_norm, "h.0.attn_norm")
        for index, layer in enumerate(weights.layers):
            last = index + 1 == len(weights.layers)
            following = weights.final_norm if last else weights.layers[index + 1].attention_norm
            # The final norm itself is an output: no node is added, and a run that does not bind it does nothing more.
            name = names.hidden_states if last else f"h.{index + 1}.attn_norm"
            normed, residual = self._layer(index, layer, normed, residual, following, name)
        flat_shape = self._writer.weight("flat_shape", np.array([-1, weights.architecture.hidden_size], np.int64))
        flat = node("Reshape", [normed, flat_shape], "final_rows")  # (B·T, D)
        wanted = node("Gather", [flat, names.logits_index], "wanted_rows")  # (N, D)
        if self._products.dtype is np.float32:
            self._products.head(wanted, weights.head, names.logits)  # (N, V)
        else:
            narrow = self._products.head(wanted, weights.head, "narrow_logits")
            node("Cast", [narrow], names.logits, {"to": TensorProto.FLOAT})

    def _layer(
        self, index: int, layer: Layer, normed: str, residual: str, following: Norm, following_name: str
    ) -> tuple[str, str]:
        """One block; returns the norm that follows it and the residual stream, (B, T, D) each."""
        here, node, facts, heads = f"h.{index}", self._node, self._facts, self._weights.architecture.num_heads
        past = [name.replace("{layer}", str(index)) for name in facts.past_names]  # (B, H, C, p) each
        present = [name.replace("{layer}", str(index)) for name in facts.present_names]  # the same buffers
        qkv = self._linear(normed, layer.qkv, f"{here}.qkv")  # (B, T, 3·H·p)
        attended = node(
            "GroupQueryAttention",
            [
                *(qkv, "", "", *past, facts.seqlens_k, facts.total_sequence_length),
                *[""] * 9,  # rotary tables, positions, biases, scales of a quantized cache
                facts.query_seqlens,
            ],
            [f"{here}.attended", *present],
            {"num_heads": heads, "kv_num_heads": heads, "scale": layer.attention_scale, "do_rotary": 0},
            domain=CONTRIB,
        )  # (B, T, H·p)
        attention_out = self._linear(attended, layer.attention_out, f"{here}.attn_out")  # (B, T, D)
        normed, residual = self._add_and_norm(residual, attention_out, layer.mlp_norm, f"{here}.mlp_norm")
        inner = self._linear(normed, layer.mlp_in, f"{here}.mlp_in")  # (B, T, F)
        active = write_activation(self._writer, layer.activation, inner, f"{here}.active", self._products.dtype)
        mlp_out = self._linear(active, layer.mlp_out, f"{here}.mlp_out")  # (B, T, D)
        return self._add_and_norm(residual, mlp_out, following, following_name)

    def _linear(self, x: str, linear: Linear, out: str) -> str:
        return self._products.linear(x, linear.name, linear.weight, linear.bias, out)

    def _add_and_norm(self, residual: str, x: str, norm: Norm, name: str) -> tuple[str, str]:
        """LayerNorm(residual + x) and the sum itself.

        Two nodes: on CPUs ONNX Runtime's SkipLayerNormalization, which is both, takes three times as long and more.
        """
        total = self._node("Add", [residual, x], f"{name}.residual")
        inputs = [total, self._vector(f"{name}.weight", norm.weight), self._vector(f"{name}.bias", norm.bias)]
        return self._node("LayerNormalization", inputs, name, {"axis": -1, "epsilon": self._weights.epsilon}), total

    def _vector(self, name: str, array: Array) -> str:
        return self._writer.weight(name, array.astype(self._products.dtype))


def _signature(weights: Gpt2Weights, facts: GraphFacts) -> tuple[list[Any], list[Any]]:
    """The graph's inputs and outputs with their types and shapes."""
    sizes = weights.architecture
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    hidden: list[str | int] = ["batch", "new_tokens", sizes.hidden_size]
    cache: list[str | int] = ["batch", sizes.num_heads, "capacity", sizes.head_dim]
    info = helper.make_tensor_value_info

    def caches(names: tuple[str, ...]) -> list[Any]:
        return [
            info(name.replace("{layer}", str(layer)), types[facts.kv_dtype], cache)
            for layer in range(sizes.num_layers)
            for name in names
        ]

    inputs = [
        info(facts.input_ids, TensorProto.INT64, ["batch", "new_tokens"]),
        info(facts.position_ids, TensorProto.INT64, ["batch", "new_tokens"]),
        info(facts.seqlens_k, TensorProto.INT32, ["batch"]),
        info(facts.total_sequence_length, TensorProto.INT32, []),
        info(facts.query_seqlens, TensorProto.INT32, ["batch"]),
        info(facts.logits_index, TensorProto.INT64, ["rows"]),
        *caches(facts.past_names),
    ]
    outputs = [
        info(facts.logits, TensorProto.FLOAT, ["rows", sizes.vocab_size]),
        info(facts.hidden_states, types[facts.dtype], hidden),
        *caches(facts.present_names),
    ]
    return inputs, outputs
