"""The lean graph of a decoder: the KV cache in place, logits only for the requested rows.

A layer of GPT-2 has ten nodes, a layer of a Llama-like model twelve.

Shapes: B batch, T new tokens, C cache capacity, H query heads, G key-value heads, p padded head dim, D hidden size,
F inner size, V vocabulary, N rows of logits.
"""

from collections.abc import Sequence
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
from edgelm_export.model.decoder import Array, DecoderWeights, Layer, Norm, qkv_widths
from edgelm_export.quantize.cache_scales import CacheScales
from edgelm_export.quantize.calibrate import StoredDecoder
from edgelm_export.quantize.recipe import EXACT_LOGITS
from edgelm_export.quantize.storage import BlockQuantized

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
        # Attention counts the positions of rotary embeddings itself.
        position_ids=None if model.source.position_table is None else "position_ids",
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
        kv_dtype=dtype if model.cache_scales is None else "int8",
        exact_logits=None if model.coarse_head is None else EXACT_LOGITS,
    )
    writer = GraphWriter(folder, facts.file, facts.weights_file)
    products = Products(writer, model.stored, np.float16 if dtype == "float16" else np.float32)
    _Body(model.source, facts, writer, products, model.coarse_head, model.cache_scales).write()
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
    coarse_head: BlockQuantized | None
    cache_scales: tuple[CacheScales, ...] | None

    def write(self) -> None:
        """Write all nodes."""
        weights, names, node, products = self.weights, self.facts, self.writer.node, self.products
        tokens = products.lookup(names.input_ids, weights.token_table, "tokens")  # (B, T, D)
        residual = self._scaled(tokens, weights.token_factors, "scaled_tokens")
        if weights.position_table is not None:
            assert names.position_ids is not None
            positions = products.lookup(names.position_ids, weights.position_table, "positions")  # (B, T, D)
            residual = node("Add", [residual, positions], "h.0.attn_norm.residual")
        normed = self._norm(residual, weights.layers[0].attention_norm, "h.0.attn_norm")
        for index, layer in enumerate(weights.layers):
            last = index + 1 == len(weights.layers)
            following = weights.final_norm if last else weights.layers[index + 1].attention_norm
            # The final norm itself is an output, so no node is added, and a run that does not bind it costs nothing.
            name = names.hidden_states if last else f"h.{index + 1}.attn_norm"
            normed, residual = self._layer(index, layer, normed, residual, following, name)
        flat_shape = self.writer.weight("flat_shape", np.array([-1, weights.architecture.hidden_size], np.int64))
        flat = node("Reshape", [normed, flat_shape], "final_rows")  # (B·T, D)
        requested = node("Gather", [flat, names.logits_index], "wanted_rows")  # (N, D)
        requested = self._scaled(requested, weights.head_factors, "scaled_rows")
        if self.coarse_head is not None:
            assert names.exact_logits is not None
            products.head_of_two_stages(
                requested, weights.output_table, self.coarse_head, names.exact_logits, names.logits
            )
        elif products.dtype is np.float32:
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
        here, products = f"h.{index}", self.products
        attended = self._attention(index, layer, normed)  # (B, T, H·p)
        attention_out = products.linear(attended, layer.attention_out, f"{here}.attn_out")  # (B, T, D)
        if layer.attention_out_norm is not None:
            attention_out = self._norm(attention_out, layer.attention_out_norm, f"{here}.attn_out_norm")
        normed, residual = self._add_and_norm(residual, attention_out, layer.mlp_norm, f"{here}.mlp_norm")
        inner = products.linear(normed, layer.mlp_in, f"{here}.mlp_in")  # (B, T, F) or (B, T, 2·F)
        if layer.is_gated:
            gate, up = self._split(inner, [layer.mlp_out.weight.shape[0]] * 2, [f"{here}.gate", f"{here}.up"])
            opened = write_activation(self.writer, layer.activation, gate, f"{here}.opened", products.dtype)
            active = self.writer.node("Mul", [opened, up], f"{here}.active")
        else:
            active = write_activation(self.writer, layer.activation, inner, f"{here}.active", products.dtype)
        mlp_out = products.linear(active, layer.mlp_out, f"{here}.mlp_out")  # (B, T, D)
        if layer.mlp_out_norm is not None:
            mlp_out = self._norm(mlp_out, layer.mlp_out_norm, f"{here}.mlp_out_norm")
        return self._add_and_norm(residual, mlp_out, following, following_name)

    def _attention(self, index: int, layer: Layer, normed: str) -> str:
        """Write the attention of `layer` up to its output product; returns the name of the attended values."""
        here, facts, sizes = f"h.{index}", self.facts, self.weights.architecture
        past = [name.replace("{layer}", str(index)) for name in facts.past_names]  # (B, G, C, p) each
        present = [name.replace("{layer}", str(index)) for name in facts.present_names]  # the buffers of `past`
        qkv = self.products.linear(normed, layer.qkv, f"{here}.qkv")  # (B, T, (H + 2·G)·p)
        new = [qkv, "", ""]  # query, key and value in one
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key, value = self._split(qkv, qkv_widths(sizes), [f"{here}.{part}" for part in ("q", "k", "v")])
            query = self._norm_of_heads(query, layer.query_norm, sizes.num_heads, f"{here}.q_norm")
            new = [query, self._norm_of_heads(key, layer.key_norm, sizes.num_key_value_heads, f"{here}.k_norm"), value]
        rotary = ["", ""]
        if layer.rotary is not None:
            tables = (("cos", layer.rotary.cos), ("sin", layer.rotary.sin))
            rotary = [self._vector(f"{layer.rotary.name}.{part}", table) for part, table in tables]
        scales = ["", ""]
        attributes: dict[str, int | float | str] = {
            "num_heads": sizes.num_heads,
            "kv_num_heads": sizes.num_key_value_heads,
            "scale": layer.attention_scale,
            "do_rotary": int(layer.rotary is not None),
        }
        if self.cache_scales is not None:
            of_layer = self.cache_scales[index]
            parts = (("keys", of_layer.key), ("values", of_layer.value))
            scales = [self._vector(f"{here}.{name}.scale", part[None, :, None]) for name, part in parts]  # (1, G, 1, p)
            attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        lengths = [facts.seqlens_k, facts.total_sequence_length]
        # What is left out: positions, a bias and sinks; norms of the heads.
        inputs = [*new, *past, *lengths, *rotary, "", "", "", *scales, "", "", facts.query_seqlens]
        if layer.window is not None:
            attributes["local_window_size"] = layer.window
        outputs = [f"{here}.attended", *present]  # (B, T, H·p), and the caches
        return self.writer.node("GroupQueryAttention", inputs, outputs, attributes, domain=CONTRIB)

    def _add_and_norm(self, residual: str, x: str, norm: Norm, name: str) -> tuple[str, str]:
        """Write norm(residual + x); returns the names of its output and of the sum.

        These are two nodes, because ONNX Runtime's SkipLayerNormalization, which does both, takes more than three times
        as long on CPUs.
        """
        total = self.writer.node("Add", [residual, x], f"{name}.residual")
        return self._norm(total, norm, name), total

    def _norm(self, x: str, norm: Norm, name: str) -> str:
        """Write the norm `norm` of the last axis of `x`; returns the name of its output."""
        inputs, attributes = [x, self._vector(f"{name}.weight", norm.weight)], {"axis": -1, "epsilon": norm.epsilon}
        if norm.bias is None:
            return self.writer.node("SimplifiedLayerNormalization", inputs, name, attributes)
        inputs.append(self._vector(f"{name}.bias", norm.bias))
        return self.writer.node("LayerNormalization", inputs, name, attributes)

    def _norm_of_heads(self, x: str, norm: Norm, heads: int, name: str) -> str:
        """Write the norm of each head of `x` (B, T, heads·p); returns the name of its output, of the same shape."""
        apart = self.writer.weight(f"{name}.apart", np.array([0, 0, heads, -1], np.int64))
        joined = self.writer.weight(f"{name}.joined", np.array([0, 0, -1], np.int64))
        split = self.writer.node("Reshape", [x, apart], f"{name}.heads")  # (B, T, heads, p)
        return self.writer.node("Reshape", [self._norm(split, norm, name), joined], f"{name}.rows")

    def _split(self, x: str, widths: Sequence[int], names: Sequence[str]) -> list[str]:
        """Cut the last axis of `x` into parts of these widths; returns the parts' names."""
        sizes = self.writer.weight(f"{x}.widths", np.array(widths, np.int64))
        self.writer.node("Split", [x, sizes], names, {"axis": -1})
        return list(names)

    def _scaled(self, x: str, factors: float | Array, name: str) -> str:
        """Multiply `x` by `factors`, one number or (D,); without a node where the number is 1."""
        if isinstance(factors, float) and factors == 1:
            return x
        return self.writer.node("Mul", [x, self._vector(f"{name}.factor", np.asarray(factors, np.float32))], name)

    def _vector(self, name: str, array: Array) -> str:
        return self.writer.weight(name, array.astype(self.products.dtype))


def _signature(
    weights: DecoderWeights, facts: GraphFacts
) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """The graph's inputs and outputs with their types and shapes."""
    sizes = weights.architecture
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8}
    info = helper.make_tensor_value_info

    def caches(names: tuple[str, ...]) -> list[onnx.ValueInfoProto]:
        shape = ["batch", sizes.num_key_value_heads, "capacity", sizes.head_dim]
        numbered = [name.replace("{layer}", str(layer)) for layer in range(sizes.num_layers) for name in names]
        return [info(name, types[facts.kv_dtype], shape) for name in numbered]

    inputs = [
        info(facts.input_ids, TensorProto.INT64, ["batch", "new_tokens"]),
        info(facts.seqlens_k, TensorProto.INT32, ["batch"]),
        info(facts.total_sequence_length, TensorProto.INT32, []),
        info(facts.query_seqlens, TensorProto.INT32, ["batch"]),
        info(facts.logits_index, TensorProto.INT64, ["rows"]),
        *caches(facts.past_names),
    ]
    if facts.position_ids is not None:
        inputs.insert(1, info(facts.position_ids, TensorProto.INT64, ["batch", "new_tokens"]))
    outputs = [
        info(facts.logits, TensorProto.FLOAT, ["rows", sizes.vocab_size]),
        info(facts.hidden_states, types[facts.dtype], ["batch", "new_tokens", sizes.hidden_size]),
        *caches(facts.present_names),
    ]
    return inputs, outputs
