"""Graphs that no exporter writes are refused before ONNX Runtime sees them."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm import Bundle, BundleError
from edgelm.bundle.folder import default_bundle_path
from edgelm.bundle.graph_rules import check_graph
from tests.conftest import ROOT, TINY_BUNDLE, replace_file
from tests.fuzz.bundle_targets import GraphSeed, graph_seeds
from tests.fuzz.hostile_graphs import (
    FLOAT,
    HOSTILE,
    Fields,
    changed_graph,
    external,
    joined,
    node,
    split,
    tensor,
    whole_number,
    with_fields,
)
from tests.fuzz.mutations import message, varint

SEEDS = graph_seeds()
IN_A_FILE = external("", [1], location="/etc/hostname", offset=0, length=4)
Edit = Callable[[bytes], bytes]


def judge(seed: GraphSeed, graph: bytes) -> None:
    check_graph(graph, seed.architecture, seed.facts, seed.weights_bytes)


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_what_the_exporter_writes_is_accepted(name: str) -> None:
    judge(SEEDS[name], SEEDS[name].graph)


@pytest.mark.parametrize("folder", [TINY_BUNDLE, default_bundle_path(), ROOT / "models" / "dialogue-6m-int8"], ids=str)
def test_committed_bundles_are_accepted(folder: Path) -> None:
    if folder.is_dir():  # the source distribution leaves one out
        Bundle.read(folder)


HOSTILE_MESSAGES = {
    "dangling-division": "the node 'c' (Div): it computes something from stored values alone",
    "unique-of-nothing": "the tensor 'a' has the shape [0, 2]",
    "many-nodes": "the graph has more than 65536 of 'node'",
    "doubling-functions": "it must define each of these functions once: F0",
    "endless-loop": "an attribute has field 6",
    "deep-nesting": "an attribute has field 6",
    "in-another-file": "is in the file '.hidden', not in 'model.onnx.data'",
    "beyond-the-file": "the tensor 'far' ends at byte 1,099,511,627,792",
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_graphs_are_refused_at_once(name: str, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **options: object) -> Any:
        raise AssertionError("ONNX Runtime must not see this graph")

    monkeypatch.setattr("edgelm.engine.graph.open_inference_session", never)
    graph = (TINY_BUNDLE / "model.onnx").read_bytes()
    replace_file(tiny_copy, "model.onnx", HOSTILE[name](graph))
    (tiny_copy / ".hidden").write_bytes((TINY_BUNDLE / "model.onnx.data").read_bytes())
    started = time.process_time()
    with pytest.raises(BundleError) as error:
        edgelm.load(tiny_copy)
    assert time.process_time() - started < 5
    assert "the graph 'model.onnx' is not one that edgelm writes: " in str(error.value)
    assert HOSTILE_MESSAGES[name] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_graph_file_has_a_largest_size(tiny_copy: Path) -> None:
    replace_file(tiny_copy, "model.onnx", bytes(16 * 2**20 + 1))
    with pytest.raises(BundleError, match=r"'model\.onnx' has 16,777,217 bytes, more than 16,777,216"):
        Bundle.read(tiny_copy)


# Single changes to the graph of an fp32 or w8a8 bundle


def node_edit(name: str, edit: Callable[[Fields], Fields]) -> Edit:
    """Change the fields of the node `name`."""

    def changed(fields: Fields) -> Fields:
        return [
            (n, w, joined(edit(split(p))) if n == 1 and (3, 2, name.encode()) in split(p) else p) for n, w, p in fields
        ]

    return lambda graph: changed_graph(graph, changed)


def tensor_edit(name: str, edit: Callable[[Fields], Fields]) -> Edit:
    """Change the fields of the stored tensor `name`."""

    def changed(fields: Fields) -> Fields:
        return [
            (n, w, joined(edit(split(p))) if n == 5 and (8, 2, name.encode()) in split(p) else p) for n, w, p in fields
        ]

    return lambda graph: changed_graph(graph, changed)


def inputs(*names: str) -> Callable[[Fields], Fields]:
    """Give a node other inputs."""
    return lambda fields: [(1, 2, name.encode()) for name in names] + [field for field in fields if field[0] != 1]


def put(number: int, value: int | bytes | str) -> Callable[[Fields], Fields]:
    """Replace all values of a field."""
    return lambda fields: [field for field in fields if field[0] != number] + split(message((number, value)))


def attributes(*given: tuple[str, int, int]) -> Callable[[Fields], Fields]:
    """Replace a node's attributes: name, field of the value, value; all are whole numbers."""
    made = [(5, 2, message((1, name), (field, value), (20, 2))) for name, field, value in given]
    return lambda fields: [field for field in fields if field[0] != 5] + made


def reversed_nodes(graph: bytes) -> bytes:
    return changed_graph(graph, lambda fields: list(reversed(fields)))


def renamed(old: str, new: str) -> Edit:
    """Another value's name everywhere in the graph, of the same length."""
    assert len(old) == len(new)
    return lambda graph: graph.replace(old.encode(), new.encode())


ATTENTION = "h.0.attended"
PAST = ("past_key_values.0.key", "past_key_values.0.value")
LENGTHS = ("seqlens_k", "total_sequence_length", *[""] * 9, "query_seqlens")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        # whole files
        (lambda g: b"", "the file lacks 'graph'"),
        (lambda g: g[:-1], "ends in the middle of"),
        (lambda g: g + g, "the file has more than 1 of 'ir_version'"),
        (lambda g: g + message((14, b"")), "field 14"),
        (lambda g: g + message((8, message((1, "ai.onnx.ml"), (2, 3)))), "the opsets"),
        (lambda g: g + message((8, message((1, ""), (2, 21)))), "the domain '' is imported twice"),
        (lambda g: g.replace(message((1, 10)), message((1, 11)), 1), "IR version 11"),
        # nodes
        (reversed_nodes, "nothing before it makes its input"),
        (node_edit("tokens", put(4, "Einsum")), "is of a kind that this edgelm does not run: if the bundle is newer"),
        (node_edit("tokens", put(7, "ai.onnx.ml")), "is of a kind that this edgelm does not run"),
        (node_edit("tokens", put(2, "")), "a value has no name"),
        (node_edit("tokens", lambda f: f + split(message((2, "more")))), "has 2 outputs instead of 1"),
        (node_edit("tokens", inputs("input_ids")), "has 1 inputs, or leaves out one"),
        (node_edit("tokens", inputs("input_ids", "")), "has 2 inputs, or leaves out one"),
        (node_edit("tokens", attributes(("axis", 3, 1))), r"has the attributes \['axis'\] instead of \[\]"),
        (node_edit("logits", attributes()), r"has the attributes \[\] instead of \['transB'\]"),
        (node_edit("logits", attributes(("transB", 3, 0))), "an attribute 'transB' that no bundle has"),
        (node_edit("logits", attributes(("transB", 3, 1), ("transB", 3, 1))), "a node has two attributes 'transB'"),
        (node_edit("h.0.active", put(4, "Softmax")), "is of a kind that this edgelm does not run"),
        (lambda g: with_fields(g, (1, node("Relu", "logits", "x"))), "nothing uses 'x'"),
        (lambda g: with_fields(g, *[(1, node("Relu", "logits", "x"))] * 60), "it has 81 nodes, more than 64"),
        (lambda g: with_fields(g, *[(1, node("Relu", "logits", "x"))] * 5000), "has 5,021 of 'node', more than 4,096"),
        (lambda g: with_fields(g, (1, node("Relu", "tokens", "tokens"))), "two values are called 'tokens'"),
        (
            lambda g: with_fields(g, (1, node("Relu", "h.0.qkv.bias", "x"))),
            "computes something from stored values alone",
        ),
        (
            lambda g: with_fields(g, (1, node("MatMul", "logits h.0.qkv.bias", "x"))),
            r"multiplies \(rows, 300\) by \(96\)",
        ),
        (
            node_edit("tokens", inputs("transformer.wpe.weight", "input_ids")),
            "looks up ids beyond its table of 64 rows",
        ),
        (node_edit("positions", inputs("transformer.wte.weight", "input_ids")), "nothing uses 'position_ids'"),
        (node_edit("tokens", inputs("transformer.wte.weight", "logits_index")), "looks up ids beyond its table of 300"),
        (
            node_edit("h.0.qkv.product", inputs("h.0.attn_norm", "transformer.h.0.mlp.c_fc.weight")),
            "do not fit each other",
        ),
        # attention
        (node_edit(ATTENTION, inputs("h.0.qkv", "", "", *PAST[::-1], *LENGTHS)), "no inputs of one layer"),
        (node_edit(ATTENTION, inputs("h.0.qkv", "", "", PAST[0], PAST[0], *LENGTHS)), "no inputs of one layer"),
        (
            node_edit(ATTENTION, inputs("h.0.qkv", "", "", *PAST, "query_seqlens", *LENGTHS[1:-1], "seqlens_k")),
            "takes other lengths",
        ),
        (
            node_edit(ATTENTION, inputs("h.0.attn_norm", "", "", *PAST, *LENGTHS)),
            r"has the shape \(batch, new_tokens, 32\)",
        ),
        (
            node_edit(ATTENTION, lambda fields: swapped_outputs(fields)),
            "are not the keys and values of one layer",
        ),
        # stored tensors
        (lambda g: with_fields(g, (5, tensor("x", [1], FLOAT, bytes(4)))), "nothing uses 'x'"),
        (lambda g: with_fields(g, (5, tensor("tokens", [1], FLOAT, bytes(4)))), "two values are called 'tokens'"),
        (lambda g: with_fields(g, (5, tensor("x", [2], FLOAT, bytes(4)))), "has 4 bytes, but its shape needs 8"),
        (lambda g: with_fields(g, (5, tensor("x", [-1], FLOAT, bytes(4)))), r"has the shape \[-1\]"),
        (lambda g: with_fields(g, (5, tensor("x", [2**62, 4], FLOAT, b""))), "which no bundle has"),
        (lambda g: with_fields(g, (5, tensor("x", [1] * 5, FLOAT, bytes(4)))), "which no bundle has"),
        (
            lambda g: with_fields(g, (5, tensor("x", [257], FLOAT, bytes(1028)))),
            "1,028 bytes in the graph, more than 1,024",
        ),
        (lambda g: with_fields(g, (5, tensor("x", [1], 8, b"text"))), "has the type 8, which no bundle has"),
        (lambda g: with_fields(g, (15, b"")), "the graph has field 15"),
        (lambda g: with_fields(g, (5, external("x", [1], location="model.onnx.data", offset=0))), "each once"),
        (
            lambda g: with_fields(g, (5, external("x", [1], location="model.onnx.data", offset=0, checksum="x"))),
            "must say location, offset and length of its data, each once",
        ),
        (
            lambda g: with_fields(g, (5, external("x", [1], location="model.onnx.data", offset="-0", length=4))),
            "must say location, offset and length of its data, each once",
        ),
        (
            lambda g: with_fields(g, (5, external("x", [1], location="../data", offset=2**20, length=4))),
            "is in the file '../data', not in 'model.onnx.data'",
        ),
        (
            lambda g: with_fields(g, (5, external("x", [1], location="model.onnx.data", offset=0, length=4))),
            "share bytes of the weights file",
        ),
        (
            lambda g: with_fields(g, (5, external("x", [2], location="model.onnx.data", offset=2**20, length=4))),
            "has 4 bytes, but its shape needs 8",
        ),
        (
            lambda g: with_fields(g, (1, node("Constant", "", "x", message((1, "value"), (20, 4), (5, IN_A_FILE))))),
            "the attribute 'value' has its data in a file",
        ),
        (tensor_edit("flat_shape", put(9, whole_number(0) + whole_number(32))), "cannot reshape"),
        (tensor_edit("h.0.qkv.bias", put(2, 10)), "but its shape needs 192"),
        # inputs and outputs
        (renamed("input_ids", "inputxids"), "it has other inputs than bundle.json states"),
        (renamed("new_tokens", "new-tokens"), r"'input_ids' is int64 \(batch, new-tokens\), but bundle.json states"),
        (lambda g: with_fields(g, (13, b"")), "the graph has field 13"),
        # functions
        (lambda g: g + message((25, message((1, "F"), (10, "edgelm")))), "the opsets"),
        (
            lambda g: with_fields(g, (1, node("F", "logits", "x", domain="edgelm"))),
            "it must define each of these functions",
        ),
    ],
)
def test_refuses_by_name(edit: Edit, words: str) -> None:
    graph = SEEDS["fp32"].graph
    changed = edit(graph)
    assert changed != graph
    with pytest.raises(BundleError, match=words) as error:
        judge(SEEDS["fp32"], changed)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


QKV = "model.layers.0.self_attn.{q,k,v}_proj.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            node_edit("h.0.qkv.with_sums", inputs("h.0.attn_norm", "h.0.attn_norm")),
            r"cannot join \(batch, new_tokens, 64\) and \(batch, new_tokens, 64\)",
        ),
        (node_edit("h.0.qkv.with_sums", attributes(("axis", 3, 1))), "an attribute 'axis' that no bundle has"),
        (tensor_edit(f"{QKV}.zero_points", put(1, 191)), "has 384 bytes, but its shape needs 191"),
        (
            node_edit("h.0.qkv", inputs("h.0.qkv.with_sums", QKV, f"{QKV}.scales.wide", f"{QKV}.scales.wide")),
            "takes stored zero points of uint8",
        ),
        (
            node_edit(
                "h.0.attn_out",
                inputs(
                    "h.0.attn_out.with_sums",
                    "model.layers.0.self_attn.o_proj.weight",
                    "model.layers.0.self_attn.o_proj.weight.scales.wide",
                    f"{QKV}.zero_points",
                ),
            ),
            r"its table of zero points has the shape \(192, 2\) instead of \(64, 2\)",
        ),
    ],
)
def test_refuses_another_grid_by_name(edit: Edit, words: str) -> None:
    assert_refused("int4-grid", edit, words)


def assert_refused(name: str, edit: Edit, words: str) -> None:
    """A changed graph of the kind `name` is refused in these words."""
    graph = SEEDS[name].graph
    changed = edit(graph)
    assert changed != graph
    with pytest.raises(BundleError, match=words):
        judge(SEEDS[name], changed)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (node_edit("logits.largest", attributes(("axis", 3, -1), ("largest", 3, 0), ("sorted", 3, 0))), "'largest'"),
        (node_edit("logits.largest", inputs("scaled_rows", "logits.exact")), "nothing before it makes its input"),
        (node_edit("logits.largest", inputs("wanted_rows", "logits.exact")), "what it chooses from has the shape"),
        (tensor_edit("logits.exact", put(9, whole_number(0))), "but bundle.json states 128"),
        (tensor_edit("logits.exact", put(9, whole_number(300))), "but bundle.json states 128"),
        (
            node_edit("logits", inputs("logits.coarse", "logits_index", "logits.replaced")),
            "writes beyond the vocabulary",
        ),
        (node_edit("logits", inputs("logits.coarse", "input_ids", "logits.replaced")), "writes into other rows"),
        (node_edit("logits", inputs("logits.replaced", "logits.likeliest", "logits.replaced")), "what it writes into"),
        (
            node_edit("logits", inputs("logits.coarse", "logits.likeliest", "logits.coarse")),
            "what it writes has the shape",
        ),
        (node_edit("logits", attributes(("axis", 3, 0))), "'axis' that no bundle has"),
        (node_edit("logits.products", inputs("logits.rows", "logits.rows")), "multiplies"),
        (tensor_edit("logits.column", put(9, b"".join(map(whole_number, (-1, 1, 36))))), "cannot reshape"),
    ],
)
def test_refuses_another_head_of_two_stages_by_name(edit: Edit, words: str) -> None:
    assert_refused("int8-two-stages", edit, words)


@pytest.mark.parametrize(
    ("name", "exact_logits", "words"),
    [
        ("int8-two-stages", None, "but bundle.json states None"),
        ("int8-two-stages", 127, "but bundle.json states 127"),
        ("int8-untied", 128, "its head has one stage, but bundle.json states two"),
    ],
)
def test_the_stages_of_the_head_are_those_of_the_manifest(name: str, exact_logits: int | None, words: str) -> None:
    seed = SEEDS[name]
    with pytest.raises(BundleError, match=words):
        judge(replace(seed, facts=replace(seed.facts, exact_logits=exact_logits)), seed.graph)


def with_shape(*sizes: int) -> Callable[[Fields], Fields]:
    """Give a stored tensor another shape."""
    return lambda fields: [(1, 0, varint(size)) for size in sizes] + [field for field in fields if field[0] != 1]


def without(attribute: str) -> Callable[[Fields], Fields]:
    """Leave out one attribute of a node."""
    return lambda fields: [
        field for field in fields if field[0] != 5 or (1, 2, attribute.encode()) not in split(field[2])
    ]


def attribute_text(value: str, other: str) -> Callable[[Fields], Fields]:
    """Put `other` where the attributes of a node have the text `value`."""
    return lambda fields: [(n, w, p.replace(message((4, value)), message((4, other)))) for n, w, p in fields]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (tensor_edit("h.0.keys.scale", with_shape(1, 1, 2, 16)), "its input of scales"),
        (node_edit("h.0.attended", without("k_quant_type")), "takes integers without their scales"),
        (node_edit("h.0.attended", without("kv_cache_bit_width")), "takes integers without their scales"),
        (
            node_edit("h.0.attended", attribute_text("PER_CHANNEL", "PER_SECONDS")),
            "has an attribute 'k_quant_type' that no",
        ),
    ],
)
def test_refuses_another_int8_cache(edit: Edit, words: str) -> None:
    assert_refused("int8-cache", edit, words)


def test_the_type_of_the_cache_is_that_of_the_manifest() -> None:
    seed = SEEDS["int8-cache"]
    with pytest.raises(BundleError, match=r"is int8 .* but bundle.json states float32"):
        judge(replace(seed, facts=replace(seed.facts, kv_dtype="float32")), seed.graph)


def swapped_outputs(fields: Fields) -> Fields:
    """A node's second output where its third one was."""
    outputs = [payload for number, _, payload in fields if number == 2]
    order = iter([outputs[0], outputs[2], outputs[1]])
    return [(n, w, next(order) if n == 2 else p) for n, w, p in fields]


def test_int32_ids_are_refused() -> None:
    def typed(fields: Fields) -> Fields:
        port = message((1, "input_ids"))
        return [
            (n, w, p.replace(message((1, 7)), message((1, 6)), 1) if n == 11 and port in p else p) for n, w, p in fields
        ]

    with pytest.raises(BundleError, match=r"'input_ids' is int32 \(batch, new_tokens\), but bundle.json states int64"):
        judge(SEEDS["fp32"], changed_graph(SEEDS["fp32"].graph, typed))


def test_a_matrix_is_multiplied_once() -> None:
    """Each product keeps a copy of its matrix, so one matrix in many products would fill the memory."""
    again = node_edit("h.0.mlp_in.product", inputs("h.0.mlp_norm", "transformer.h.0.attn.c_attn.weight"))
    graph = again(SEEDS["fp32"].graph)
    graph = tensor_edit("h.0.mlp_in.bias", lambda fields: split(tensor("h.0.mlp_in.bias", [96], FLOAT, bytes(384))))(
        graph
    )
    with pytest.raises(BundleError, match=r"multiplies \(batch, new_tokens, 96\)"):
        judge(SEEDS["fp32"], graph)


@pytest.mark.parametrize("name", sorted(SEEDS))
@pytest.mark.parametrize("change", [-1, 1])
def test_the_widest_activation_is_that_of_the_graph(name: str, change: int) -> None:
    """Memory is forecast from it."""
    seed = SEEDS[name]
    widest = seed.architecture.widest_activation
    stated = replace(seed, architecture=replace(seed.architecture, widest_activation=widest + change))
    words = f"its widest activation has {widest} numbers for each token, but bundle.json states {widest + change}"
    with pytest.raises(BundleError, match=words):
        judge(stated, seed.graph)


def test_rows_of_a_table_are_less_than_a_block_wider_than_the_hidden_size() -> None:
    seed, graph = SEEDS["int8-untied"], SEEDS["int8-untied"].graph
    for name, columns, row_bytes, offset in (("", 64, 64, 2**20), (".scales", 2, 8, 2**21)):
        place = {"location": "model.onnx.data", "offset": offset, "length": 300 * row_bytes}
        wide = split(external("", [300, columns], **place))
        graph = tensor_edit(f"transformer.wte.weight{name}", partial(_placed_as, wide))(graph)
    words = "makes rows of 64 numbers, a whole block or more beyond the hidden size 32"
    with pytest.raises(BundleError, match=words):
        check_graph(graph, seed.architecture, seed.facts, 2**22)


def _placed_as(other: Fields, fields: Fields) -> Fields:
    """`fields` of a tensor with the shape and the place of another one."""
    numbers = (1, 13, 14)
    return [field for field in fields if field[0] not in numbers] + [field for field in other if field[0] in numbers]
