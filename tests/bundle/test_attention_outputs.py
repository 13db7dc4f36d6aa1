"""The copy of a graph that shows its attention has one more output for each attention, and is otherwise the same."""

import random
from dataclasses import replace

import pytest

from edgelm import BundleError
from edgelm.bundle.attention_outputs import attention_name, with_attention_outputs
from edgelm.bundle.graph_rules import check_graph
from edgelm.bundle.onnx_file import read_onnx
from edgelm.bundle.protobuf import ProtobufError
from tests.fuzz.bundle_targets import GraphSeed, graph_seeds
from tests.fuzz.hostile_graphs import Fields, changed_graph, joined, node, split
from tests.fuzz.mutations import change_protobuf, message

SEEDS = graph_seeds()
ONNX_NUMBERS = {"float32": 1, "float16": 10}


def shown(seed: GraphSeed, graph: bytes | None = None) -> bytes:
    return with_attention_outputs(seed.graph if graph is None else graph, seed.architecture, seed.facts)


def is_attention(fields: Fields) -> bool:
    return (4, 2, b"GroupQueryAttention") in fields


def without_additions(fields: Fields) -> Fields:
    """A graph's fields without what a copy has more."""
    kept = []
    for number, wire, payload in fields:
        if number == 12 and split(payload)[0][2].startswith(b"attention of"):
            continue
        if number == 1 and is_attention(split(payload)):
            payload = joined(split(payload)[:-2])
        kept.append((number, wire, payload))
    return kept


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_every_layer_shows_its_attention_and_nothing_else_changes(name: str) -> None:
    seed = SEEDS[name]
    copy = shown(seed)
    assert changed_graph(copy, without_additions) == seed.graph
    (graph,) = [split(payload) for number, _, payload in split(copy) if number == 7]
    layers = range(seed.architecture.num_layers)
    nodes = [split(payload) for number, _, payload in graph if number == 1]
    for layer, fields in zip(layers, filter(is_attention, nodes), strict=True):
        names = [payload.decode() for number, _, payload in fields if number == 2]
        assert names[1:] == [f"present.{layer}.key", f"present.{layer}.value", f"attention of layer {layer}"]
        assert fields[-1] == (5, 2, message((1, "qk_output"), (3, 2), (20, 2)))  # 2: after the softmax
    outputs = [payload for number, _, payload in graph if number == 12][-len(layers) :]
    kind = message((1, message((1, ONNX_NUMBERS[seed.facts.dtype]))))
    assert outputs == [message((1, attention_name(layer)), (2, kind)) for layer in layers]


def test_no_accepted_graph_has_such_a_name() -> None:
    with pytest.raises(ProtobufError, match="printable ASCII without blanks"):
        read_onnx(shown(SEEDS["fp32"]))


def test_the_order_of_fields_does_not_matter() -> None:
    """Another writer may put the outputs before the nodes, and the graph before everything else."""
    seed = SEEDS["fp32"]
    turned = changed_graph(seed.graph, lambda fields: sorted(fields, key=lambda field: -field[0]))
    turned = joined(sorted(split(turned), key=lambda field: field[0] != 7))
    check_graph(turned, seed.architecture, seed.facts, seed.weights_bytes)
    again = changed_graph(shown(seed, turned), without_additions)
    assert again == turned


def test_fields_of_every_length_keep_their_place() -> None:
    """The size of a node takes one byte up to 127 and two above; the node before and behind an attention has both."""
    seed = SEEDS["fp32"]
    for length in (1, 60, 100, 250):

        def named(fields: Fields, length: int = length) -> Fields:
            def rename(payload: bytes) -> bytes:
                return joined([(3, 2, b"n" * length) if field[0] == 3 else field for field in split(payload)])

            return [(n, w, rename(p) if n == 1 else p) for n, w, p in fields]

        graph = changed_graph(seed.graph, named)
        check_graph(graph, seed.architecture, seed.facts, seed.weights_bytes)
        assert changed_graph(shown(seed, graph), without_additions) == graph


def hidden_in_a_function(graph: bytes) -> bytes:
    """The attention of the first layer, called through a local function, which readers of bundles accept."""
    names = ["qkv", "key", "value", "seqlens", "total", "query"]
    inputs = ["h.0.qkv", "past_key_values.0.key", "past_key_values.0.value"]
    inputs += ["seqlens_k", "total_sequence_length", "query_seqlens"]
    outputs = ["h.0.attended", "present.0.key", "present.0.value"]

    def called(fields: Fields) -> Fields:
        return [
            (n, w, node("Hidden", " ".join(inputs), " ".join(outputs), domain="edgelm"))
            if n == 1 and is_attention(split(p)) and b"h.0.qkv" in p
            else (n, w, p)
            for n, w, p in fields
        ]

    (attention,) = [
        split(payload)
        for number, _, whole in split(graph)
        if number == 7
        for inner, _, payload in split(whole)
        if inner == 1 and is_attention(split(payload)) and b"h.0.qkv" in payload
    ]
    renames = dict(zip(map(str.encode, inputs), map(str.encode, names), strict=True))
    body = joined([(n, w, renames.get(p, p) if n == 1 else p) for n, w, p in attention])
    contrib = message((1, "com.microsoft"), (2, 1))
    function = message(
        (1, "Hidden"),
        *((4, name) for name in names),
        *((5, name) for name in outputs),
        (7, body),
        (9, message((1, ""), (2, 21))),
        (9, contrib),
        (10, "edgelm"),
    )
    return changed_graph(graph, called) + message((25, function), (8, message((1, "edgelm"), (2, 1))))


def test_a_hidden_attention_is_refused_by_name() -> None:
    seed = SEEDS["fp32"]
    graph = hidden_in_a_function(seed.graph)
    check_graph(graph, seed.architecture, seed.facts, seed.weights_bytes)
    layers = seed.architecture.num_layers
    with pytest.raises(BundleError, match=f"its graph has {layers - 1} attentions for {layers} layers, or hides them"):
        shown(seed, graph)


def test_a_missing_layer_is_refused() -> None:
    seed = SEEDS["fp32"]
    more = replace(seed.architecture, num_layers=seed.architecture.num_layers + 1)
    with pytest.raises(BundleError, match="cannot be shown"):
        with_attention_outputs(seed.graph, more, seed.facts)


def test_whatever_the_reader_accepts_is_copied_or_refused() -> None:
    """Random changes to graphs: those that `check_graph` lets through lose nothing in the copy."""
    rng, accepted = random.Random(0), 0
    for name, seed in sorted(SEEDS.items()):
        for _ in range(150):
            graph = change_protobuf(rng, seed.graph, [seed.graph])
            try:
                check_graph(graph, seed.architecture, seed.facts, seed.weights_bytes)
            except BundleError:
                continue
            accepted += 1
            assert changed_graph(shown(seed, graph), without_additions) == graph, name
    assert accepted >= 10, "too few changed graphs are accepted to show anything"
