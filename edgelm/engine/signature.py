"""Whether a loaded graph is the one its bundle's manifest describes."""

from typing import Any

from edgelm.bundle.folder import Bundle
from edgelm.errors import BundleError


def check_signature(bundle: Bundle, ort_session: Any) -> None:
    """The graph must have exactly the inputs, outputs and sizes the manifest states.

    Raises:
        BundleError: it has others.
    """
    facts, graph = bundle.manifest.architecture, bundle.manifest.graph
    layers = range(facts.num_layers)
    cache = [facts.num_key_value_heads, None, facts.head_dim]  # axis 0 is the batch, None stands for any size
    inputs: dict[str, list[int | None]] = {
        graph.input_ids: [None],
        graph.seqlens_k: [],
        graph.query_seqlens: [],
        graph.total_sequence_length: [],
        graph.logits_index: [],
        **{name.replace("{layer}", str(i)): cache for name in graph.past_names for i in layers},
    }
    if graph.position_ids is not None:
        inputs[graph.position_ids] = [None]
    outputs: dict[str, list[int | None]] = {
        graph.logits: [facts.vocab_size],
        graph.hidden_states: [None, facts.hidden_size],
        **{name.replace("{layer}", str(i)): cache for name in graph.present_names for i in layers},
    }
    for kind, expected, found in (
        ("inputs", inputs, ort_session.get_inputs()),
        ("outputs", outputs, ort_session.get_outputs()),
    ):
        if {node.name for node in found} != set(expected):
            raise BundleError(f"the graph {graph.file!r} has other {kind} than bundle.json states")
        for node in found:
            sizes = node.shape[1:]
            if len(sizes) != len(expected[node.name]) or any(
                want is not None and isinstance(size, int) and size != want
                for size, want in zip(sizes, expected[node.name], strict=True)
            ):
                raise BundleError(
                    f"{node.name!r} of the graph has the shape {node.shape}, which differs from what bundle.json states"
                )
