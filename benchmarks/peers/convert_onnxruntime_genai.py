"""Converts a GPT-2 checkpoint to a model of onnxruntime-genai: edgelm's lean graph with genai's inputs and config.

    python -m benchmarks.peers.convert_onnxruntime_genai CHECKPOINT FOLDER 8|4

genai's own model builder does not support GPT-2; `benchmarks.peers.build_onnxruntime_genai` calls it for the models
that it supports. `benchmarks.peers` runs this in edgelm's build-side environment.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgelm.bundle.manifest import GraphFacts

if TYPE_CHECKING:
    from edgelm_export.model.decoder import DecoderWeights
    from edgelm_export.quantize.calibrate import StoredDecoder
    from edgelm_export.quantize.storage import Stored

BLOCK = 128
"""Size of a block. genai's own model builder has 32, which is slower."""


def store_in_blocks(weights: "DecoderWeights", bits: int) -> "StoredDecoder":
    """Store all products in blocks of `bits` bits and the tied table in 8 bits, rounded to nearest."""
    from edgelm_export.quantize.calibrate import StoredDecoder
    from edgelm_export.quantize.recipe import fixed_recipe
    from edgelm_export.quantize.storage import FloatStored, block_size_for, quantize_blocks

    positions, tokens = weights.position_table, weights.token_table
    stored: dict[str, Stored] = {
        tokens.name: quantize_blocks(tokens.weight, 8, block_size_for(tokens.weight.shape[1], BLOCK)),
    }
    if positions is not None:
        stored[positions.name] = FloatStored(positions.weight)
    for linear in weights.products:
        rows = np.ascontiguousarray(linear.weight.T)  # (N, K)
        stored[linear.name] = quantize_blocks(rows, bits, block_size_for(rows.shape[1], BLOCK))
    return StoredDecoder(fixed_recipe("int4", weights), weights, weights, stored)


def take_genai_inputs(file: Path, facts: GraphFacts, vocabulary: int) -> None:
    """Replace the inputs that edgelm's runtime gives by nodes that compute them from genai's inputs.

    genai gives `attention_mask` (B, P + T) and `input_ids` (B, T), and takes the logits of each row's last position,
    (B, 1, V).
    """
    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    replaced = {facts.seqlens_k, facts.total_sequence_length, facts.query_seqlens, facts.logits_index}
    kept = [value for value in graph.input if value.name not in replaced]
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"])
    del graph.input[:]
    graph.input.extend([*kept[:1], mask, *kept[1:]])

    def constant(name: str, value: list[int] | int) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
        return name

    one, row_axis = constant("genai.one", 1), constant("genai.row_axis", [1])
    zero = constant("genai.zero", 0)
    first = [
        helper.make_node("ReduceSum", ["attention_mask", row_axis], ["genai.lengths"], keepdims=0),
        helper.make_node("Sub", ["genai.lengths", one], ["genai.past"]),
        helper.make_node("Cast", ["genai.past"], [facts.seqlens_k], to=TensorProto.INT32),  # (B,)
        helper.make_node("Shape", ["attention_mask"], ["genai.mask_shape"]),
        helper.make_node("Gather", ["genai.mask_shape", one], ["genai.total"]),
        helper.make_node("Cast", ["genai.total"], [facts.total_sequence_length], to=TensorProto.INT32),
        helper.make_node("Shape", [facts.input_ids], ["genai.ids_shape"]),
        helper.make_node("Gather", ["genai.ids_shape", zero], ["genai.batch"]),
        helper.make_node("Gather", ["genai.ids_shape", one], ["genai.new"]),
        helper.make_node("Mul", ["genai.batch", "genai.new"], ["genai.rows"]),
        helper.make_node("Sub", ["genai.new", one], ["genai.first_last"]),
        # The last position of every row in the flat (B * T) list: T - 1, 2 T - 1, ...
        helper.make_node("Range", ["genai.first_last", "genai.rows", "genai.new"], [facts.logits_index]),
    ]
    nodes: list[Any] = [*first, *graph.node]
    for node in nodes:
        if node.op_type == "GroupQueryAttention":
            # Without padding all rows have the same length.
            inputs = ["" if name == facts.query_seqlens else name for name in node.input]
            while not inputs[-1]:
                inputs.pop()
            del node.input[:]
            node.input.extend(inputs)
        for index, name in enumerate(node.output):
            if name == facts.logits:
                node.output[index] = "genai.flat_logits"
    nodes.append(helper.make_node("Unsqueeze", ["genai.flat_logits", row_axis], [facts.logits]))
    del graph.node[:]
    graph.node.extend(nodes)
    for output in graph.output:
        if output.name == facts.logits:
            output.CopyFrom(helper.make_tensor_value_info(facts.logits, TensorProto.FLOAT, ["batch", 1, vocabulary]))
    file.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(file))


def genai_config(weights: "DecoderWeights", facts: GraphFacts) -> dict[str, object]:
    """Content of `genai_config.json`: type "decoder", with past and present in one buffer."""
    sizes = weights.architecture
    past, present = (
        [name.replace("{layer}", "%d") for name in names] for names in (facts.past_names, facts.present_names)
    )
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "context_length": sizes.context_length,
            "vocab_size": sizes.vocab_size,
            "decoder": {
                "filename": facts.file,
                "session_options": {"provider_options": []},
                "hidden_size": sizes.hidden_size,
                "head_size": sizes.head_dim,
                "num_attention_heads": sizes.num_heads,
                "num_key_value_heads": sizes.num_key_value_heads,
                "num_hidden_layers": sizes.num_layers,
                "inputs": {
                    "input_ids": facts.input_ids,
                    "attention_mask": "attention_mask",
                    "position_ids": facts.position_ids,
                    "past_key_names": past[0],
                    "past_value_names": past[1],
                },
                "outputs": {
                    "logits": facts.logits,
                    "present_key_names": present[0],
                    "present_value_names": present[1],
                },
            },
        },
        "search": {
            "max_length": sizes.context_length,
            "num_beams": 1,
            "do_sample": False,
            "past_present_share_buffer": True,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.convert_onnxruntime_genai", description="Convert for onnxruntime-genai."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("bits", type=int, choices=(8, 4))
    options = parser.parse_args()
    folder: Path = options.folder

    from edgelm_export.graph.decoder import write_graph
    from edgelm_export.model.families import collect_weights
    from edgelm_export.source.checkpoint import load_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    weights = collect_weights(load_checkpoint(options.checkpoint).model)
    facts, _ = write_graph(store_in_blocks(weights, options.bits), folder)
    take_genai_inputs(folder / facts.file, facts, weights.architecture.vocab_size)
    config = json.dumps(genai_config(weights, facts), indent=1)
    (folder / "genai_config.json").write_text(config, encoding="utf-8")


if __name__ == "__main__":
    main()
