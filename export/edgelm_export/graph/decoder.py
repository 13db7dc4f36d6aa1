"""The lean graph of a decoder: ten nodes a layer, the KV cache in place, logits only for the requested rows.

Shapes: B batch, T new tokens, C cache capacity, H query heads, G key-value heads, p padded head dim, D hidden size,
F inner size, V vocabulary, N rows of logits.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgelm.bundle.manifest import GraphFacts, Matrix
from edgelm_export.graph.activations import write_activation
from edgelm_export.graph.products import Products
from edgelm_export.graph.writer import CONTRIB, GraphWriter
from edgelm_export.model.decoder import Array, DecoderWeights, Layer, Norm
from edgelm_export.quantize.calibrate import StoredDecoder

MINIMUM_ONNXRUNTIME = "1.32"


def write_graph(model: StoredDecoder, folder: Path) -> tuple[GraphFacts, tuple[Matrix, ...]]:
    """Write ``model.onnx`` and ``model.onnx.data`` into `folder`; returns their facts and the account of matrices."""
    dtype = model.recipe.dtype
    facts = GraphFacts(
        file="model.onnx",
        weights_file="model.onnx.data",
        minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
        devices=("cpu", "cuda") if dtype == "float16" else ("cpu",),
        input_ids="input_ids",
        position_ids="position_ids",
        seqlens_k="seqlens_k",
        total_sequence_length="total_sequence_length",
        query_seqlens="query_seqlens",
        logits_index="logits_index",
        logits="logits",
        hidden_states="hidden_states",
        dtype=dtype,
        past_names=("past_key_values.{layer}.key", "past_key_values.{layer}.value"),
        present_names=("present.{layer}.key", "present.{layer}.value"),
        kv_layout="BHCD",
        kv_dtype=dtype,
    )
    writer = GraphWriter(folder, facts.file, facts.weights_file)
    products = Products(writer, model.stored, np.float16 if dtype == "float16" else np.float32)
    _Body(model.source, facts, writer, products).write()
    writer.save(model.source.model_type, *_signature(model.source, facts))
    return facts, tuple(products.matrices)


class _Body:
    """Writes the nodes in the order in which a token passes them."""

    def __init__(self, weights: DecoderWeights, facts: GraphFacts, writer: GraphWriter, products: Products) -> None:
        self._weights = weights
        self._facts = facts
        self._writer = writer
        self._products = products
        self._node = writer.node

    def write(self) -> None:
        """Write all nodes."""
        weights, names, node = self._weights, self._facts, self._node
        tokens = self._products.token_lookup(names.input_ids, weights.token_table, "tokens")  # (B, T, D)
        assert names.position_ids is not None
        positions = self._products.position_lookup(names.position_ids, weights.position_table, "positions")  # (B, T, D)
        normed, residual = self._add_and_norm(tokens, positions, weights.layers[0].attention_norm, "h.0.attn_norm")
        for index, layer in enumerate(weights.layers):
            last = index + 1 == len(weights.layers)
            following = weights.final_norm if last else weights.layers[index + 1].attention_norm
            # The final norm itself is an output, so no node is added, and a run that does not bind it costs nothing.
            name = names.hidden_states if last else f"h.{index + 1}.attn_norm"
            normed, residual = self._layer(index, layer, normed, residual, following, name)
        flat_shape = self._writer.weight("flat_shape", np.array([-1, weights.architecture.hidden_size], np.int64))
        flat = node("Reshape", [normed, flat_shape], "final_rows")  # (B·T, D)
        requested = node("Gather", [flat, names.logits_index], "wanted_rows")  # (N, D)
        if self._products.dtype is np.float32:
            self._products.head(requested, weights.output_table, names.logits)  # (N, V)
        else:
            narrow = self._products.head(requested, weights.output_table, "narrow_logits")
            node("Cast", [narrow], names.logits, {"to": TensorProto.FLOAT})

    def _layer(
        self, index: int, layer: Layer, normed: str, residual: str, following: Norm, following_name: str
    ) -> tuple[str, str]:
        """Write one block and the norm that follows it.

        Args:
            index: of the layer.
            layer: its weights.
            normed: name of the layer's input after its first norm, (B, T, D).
            residual: name of the residual stream, (B, T, D).
            following: weights of the norm that follows.
            following_name: name of that norm's output.

        Returns:
            The names of that norm's output and of the residual stream, (B, T, D) each.
        """
        here, node, facts, sizes = f"h.{index}", self._node, self._facts, self._weights.architecture
        products = self._products
        past = [name.replace("{layer}", str(index)) for name in facts.past_names]  # (B, G, C, p) each
        present = [name.replace("{layer}", str(index)) for name in facts.present_names]  # the same buffers
        qkv = products.linear(normed, layer.qkv, f"{here}.qkv")  # (B, T, (H + 2·G)·p)
        attended = node(
            "GroupQueryAttention",
            [
                *(qkv, "", "", *past, facts.seqlens_k, facts.total_sequence_length),
                *[""] * 9,  # rotary tables, positions, biases, scales of a quantized cache
                facts.query_seqlens,
            ],
            [f"{here}.attended", *present],
            {
                "num_heads": sizes.num_heads,
                "kv_num_heads": sizes.num_key_value_heads,
                "scale": layer.attention_scale,
                "do_rotary": 0,
            },
            domain=CONTRIB,
        )  # (B, T, H·p)
        attention_out = products.linear(attended, layer.attention_out, f"{here}.attn_out")  # (B, T, D)
        normed, residual = self._add_and_norm(residual, attention_out, layer.mlp_norm, f"{here}.mlp_norm")
        inner = products.linear(normed, layer.mlp_in, f"{here}.mlp_in")  # (B, T, F)
        active = write_activation(self._writer, layer.activation, inner, f"{here}.active", products.dtype)
        mlp_out = products.linear(active, layer.mlp_out, f"{here}.mlp_out")  # (B, T, D)
        return self._add_and_norm(residual, mlp_out, following, following_name)

    def _add_and_norm(self, residual: str, x: str, norm: Norm, name: str) -> tuple[str, str]:
        """Write LayerNorm(residual + x); returns the names of its output and of the sum.

        These are two nodes, because ONNX Runtime's SkipLayerNormalization, which does both, takes more than three times
        as long on CPUs.
        """
        total = self._node("Add", [residual, x], f"{name}.residual")
        inputs = [total, self._vector(f"{name}.weight", norm.weight), self._vector(f"{name}.bias", norm.bias)]
        return self._node("LayerNormalization", inputs, name, {"axis": -1, "epsilon": self._weights.epsilon}), total

    def _vector(self, name: str, array: Array) -> str:
        return self._writer.weight(name, array.astype(self._products.dtype))


def _signature(
    weights: DecoderWeights, facts: GraphFacts
) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """The graph's inputs and outputs with their types and shapes."""
    sizes = weights.architecture
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    hidden: list[str | int] = ["batch", "new_tokens", sizes.hidden_size]
    cache: list[str | int] = ["batch", sizes.num_key_value_heads, "capacity", sizes.head_dim]
    info = helper.make_tensor_value_info

    def caches(names: tuple[str, ...]) -> list[onnx.ValueInfoProto]:
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
