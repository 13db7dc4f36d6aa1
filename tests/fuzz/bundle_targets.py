"""The readers of a bundle's own files, as targets."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.bundle.folder import default_bundle_path
from edgelm.bundle.graph_rules import check_graph
from edgelm.bundle.manifest import Architecture, GraphFacts, digest_of, read_manifest
from edgelm.bundle.strict_json import from_json
from edgelm.errors import BundleError
from tests.conftest import TINY_BUNDLE
from tests.fuzz.harness import Target
from tests.fuzz.hostile_graphs import HOSTILE
from tests.fuzz.mutations import BYTE_MUTATORS, Mutator, change_json, change_protobuf

GRAPHS = Path(__file__).parent / "graphs"


class ManifestTarget(Target):
    """``bundle.json``."""

    name = "manifest"
    mutators = (*BYTE_MUTATORS, *[change_json] * 12)
    refusals = (BundleError,)

    def seeds(self) -> list[bytes]:
        return [(folder / "bundle.json").read_bytes() for folder in (TINY_BUNDLE, default_bundle_path())]

    def input(self, seed: int, index: int, seeds: Sequence[bytes]) -> bytes:
        data = super().input(seed, index, seeds)
        return resealed(data) if random.Random(index).random() < 0.7 else data

    def read(self, data: bytes) -> object:
        return read_manifest(data)


@dataclass(frozen=True)
class GraphSeed:
    """A graph of `make_graphs`, and what its manifest says."""

    architecture: Architecture
    facts: GraphFacts
    weights_bytes: int
    graph: bytes


def graph_seeds() -> dict[str, GraphSeed]:
    """The graphs of `make_graphs` by name."""
    seeds = {}
    for path in sorted(GRAPHS.glob("*.onnx")):
        stated = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        architecture = from_json(Architecture, stated["architecture"])
        facts = from_json(GraphFacts, stated["graph"])
        seeds[path.stem] = GraphSeed(architecture, facts, stated["weights_bytes"], path.read_bytes())
    return seeds


class OnnxHeaderTarget(Target):
    """``model.onnx`` through our own reader. An input is the name of a manifest, a zero byte and the graph."""

    name = "onnx_header"
    mutators = (*BYTE_MUTATORS, *[change_protobuf] * 24)
    refusals = (BundleError,)

    def __init__(self) -> None:
        self._seeds = graph_seeds()

    def seeds(self) -> list[bytes]:
        return [name.encode() + b"\0" + seed.graph for name, seed in self._seeds.items()]

    def corpus(self) -> list[bytes]:
        return [b"fp32\0" + make(self._seeds["fp32"].graph) for name, make in HOSTILE.items() if name != "many-nodes"]

    def mutated(self, rng: random.Random, data: bytes, others: Sequence[bytes], mutator: Mutator) -> bytes:
        name, _, graph = data.partition(b"\0")
        return name + b"\0" + mutator(rng, graph, [other.partition(b"\0")[2] for other in others])

    def read(self, data: bytes) -> object:
        name, _, graph = data.partition(b"\0")
        seed = self._seeds[name.decode()]
        check_graph(graph, seed.architecture, seed.facts, seed.weights_bytes)
        return None


def resealed(data: bytes) -> bytes:
    """A manifest with its digest corrected, as an attacker would."""
    try:
        content = json.loads(data)
        content["digest"] = digest_of(content)
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError, AttributeError):
        return data
