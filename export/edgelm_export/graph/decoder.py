"""The lean graph of a decoder: ten nodes a layer, the KV cache in place, logits only for the requested rows.

Shapes: B batch, T new tokens, C cache capacity, H query heads, G key-value heads, p padded head dim, D hidden size,
F inner size, V vocabulary, N rows of logits.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgelm.bundle.graph_rules import check_graph
from edgelm.bundle.manifest import GraphFacts, Matrix
from edgelm.bundle.operators import CONTRIB
from edgelm.errors import BundleError, ExportError
from edgelm_export.graph.activations import write_activation
from edgelm_export.graph.products import Products
from edgelm_export.graph.writer import GraphWriter
from edgelm_export.model.decoder import Array, DecoderWeights, Layer, Norm
from edgelm_export.quantize.calibrate import StoredDecoder

MINIMUM_ONNXRUNTIME = "1.32"


def write_graph(model: StoredDecoder, folder: Path) -> tuple[GraphFacts, tuple[Matrix, ...]]:
    """Write ``model.onnx`` and ``model.onnx.data`` into `folder`; returns their facts and the account of matrices.

    Raises ExportError if the graph has something that readers of bundles refuse.
    """
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
    graph, weights_bytes = (folder / facts.file).read_bytes(), (folder / facts.weights_file).stat().st_size
    try:
        check_graph(graph, model.source.architecture, facts, weights_bytes)
    except BundleError as error:
        raise ExportError(f"{error}; please report this") from None
    return facts, tuple(products.matrices)


@dataclass(frozen=True)
class _Body:
    """Writes the nodes in the order in which a token passes them."""

    weights: DecoderWeights
    facts: GraphFacts
    writer: GraphWriter
    products: Products

    def write(self) -> None:
        """Write all nodes."""
        weights, names, node, products = self.weights, self.facts, self.writer.node, self.products
        assert names.position_ids is not None
        tokens = products.lookup(names.input_ids, weights.token_table, "tokens")  # (B, T, D)
        positions = products.lookup(names.position_ids, weights.position_table, "positions")  # (B, T, D)
        normed, residual = self._add_and_norm(tokens, positions, weights.layers[0].attention_norm, "h.0.attn_norm")
        for index, layer in enumerate(weights.layers):
            last = index + 1 == len(weights.layers)
            following = weights.final_norm if last else weights.layers[index + 1].attention_norm
            # The final norm itself is an output, so no node is added, and a run that does not bind it costs nothing.
            name = names.hidden_states if last else f"h.{index + 1}.attn_norm"
            normed, residual = self._layer(index, layer, normed, residual, following, name)
        flat_shape = self.writer.weight("flat_shape", np.array([-1, weights.architecture.hidden_size], np.int64))
        flat = node("Reshape", [normed, flat_shape], "final_rows")  # (B·T, D)
        requested = node("Gather", [flat, names.logits_index], "wanted_rows")  # (N, D)
        if products.dtype is np.float32:
            products.head(requested, weights.output_table, names.logits)  # (N, V)
        else:
            narrow = products.head(requested, weights.output_table, "narrow_logits")
            node("Cast", [narrow], names.logits, {"to": TensorProto.FLOAT})

    def _layer(
        self, index: int, layer: Layer, normed: str, residual: str, following: Norm, following_name: str
    ) -> tuple[str, str]:
        """Write the block `layer` and the norm `following`; returns the names of that norm's output and of the new sum.

        `normed` names the input of the block after its first norm, `residual` the residual stream, (B, T, D) each.
        """
        here, facts, products, sizes = f"h.{index}", self.facts, self.products, self.weights.architecture
        past = [name.replace("{layer}", str(index)) for name in facts.past_names]  # (B, G, C, p) each
        present = [name.replace("{layer}", str(index)) for name in facts.present_names]  # the buffers of `past`
        qkv = products.linear(normed, layer.qkv, f"{here}.qkv")  # (B, T, (H + 2·G)·p)
        # The nine inputs that are left out: rotary tables, positions, biases, scales of a quantized cache.
        inputs = [qkv, "", "", *past, facts.seqlens_k, facts.total_sequence_length, *[""] * 9, facts.query_seqlens]
        heads: dict[str, int | float] = {"num_heads": sizes.num_heads, "kv_num_heads": sizes.num_key_value_heads}
        attributes = heads | {"scale": layer.attention_scale, "do_rotary": 0}
        outputs = [f"{here}.attended", *present]  # (B, T, H·p), and the caches
        attended = self.writer.node("GroupQueryAttention", inputs, outputs, attributes, domain=CONTRIB)
        attention_out = products.linear(attended, layer.attention_out, f"{here}.attn_out")  # (B, T, D)
        normed, residual = self._add_and_norm(residual, attention_out, layer.mlp_norm, f"{here}.mlp_norm")
        inner = products.linear(normed, layer.mlp_in, f"{here}.mlp_in")  # (B, T, F)
        active = write_activation(self.writer, layer.activation, inner, f"{here}.active", products.dtype)
        mlp_out = products.linear(active, layer.mlp_out, f"{here}.mlp_out")  # (B, T, D)
        return self._add_and_norm(residual, mlp_out, following, following_name)

    def _add_and_norm(self, residual: str, x: str, norm: Norm, name: str) -> tuple[str, str]:
        """Write LayerNorm(residual + x); returns the names of its output and of the sum.

        These are two nodes, because ONNX Runtime's SkipLayerNormalization, which does both, takes more than three times
        as long on CPUs.
        """
        total = self.writer.node("Add", [residual, x], f"{name}.residual")
        inputs = [total, self._vector(f"{name}.weight", norm.weight), self._vector(f"{name}.bias", norm.bias)]
        normed = self.writer.node("LayerNormalization", inputs, name, {"axis": -1, "epsilon": self.weights.epsilon})
        return normed, total

    def _vector(self, name: str, array: Array) -> str:
        return self.writer.weight(name, array.astype(self.products.dtype))


def _signature(
    weights: DecoderWeights, facts: GraphFacts
) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """The graph's inputs and outputs with their types and shapes."""
    sizes = weights.architecture
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    info = helper.make_tensor_value_info

    def caches(names: tuple[str, ...]) -> list[onnx.ValueInfoProto]:
        shape = ["batch", sizes.num_key_value_heads, "capacity", sizes.head_dim]
        numbered = [name.replace("{layer}", str(layer)) for layer in range(sizes.num_layers) for name in names]
        return [info(name, types[facts.kv_dtype], shape) for name in numbered]

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
        info(facts.hidden_states, types[facts.dtype], ["batch", "new_tokens", sizes.hidden_size]),
        *caches(facts.present_names),
    ]
    return inputs, outputs
