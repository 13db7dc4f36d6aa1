"""The readers of a bundle's own files, as targets."""

import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import edgelm
from edgelm.bundle.attention_outputs import with_attention_outputs
from edgelm.bundle.folder import Bundle, default_bundle_path, file_fact
from edgelm.bundle.graph_rules import check_graph
from edgelm.bundle.manifest import Architecture, GraphFacts, digest_of, read_manifest
from edgelm.bundle.strict_json import from_json
from edgelm.errors import BundleError, EdgelmError
from tests.conftest import TINY_BUNDLE
from tests.fuzz.harness import Target
from tests.fuzz.hostile_graphs import HOSTILE
from tests.fuzz.mutations import (
    BYTE_MUTATORS,
    Mutator,
    change_json,
    change_protobuf,
    delete,
    flip_bits,
    insert,
    repeat,
    set_bytes,
    truncate,
)

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
        with_attention_outputs(graph, seed.architecture, seed.facts)
        return None


class GraphTarget(Target):
    """Whole bundles whose hashes fit, loaded by ONNX Runtime: two calls of what the reader lets through.

    An input is the manifest's facts as JSON, a zero byte and the graph.
    """

    name = "graph"
    mutators = (*BYTE_MUTATORS, *[change_protobuf] * 40, *[change_json] * 16)
    refusals = (EdgelmError,)

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="edgelm-fuzz-"))
        for name in ("tokenizer.json", "config.json", "generation_config.json"):
            shutil.copy(TINY_BUNDLE / name, self._folder)
        weights = np.random.default_rng(0).normal(scale=0.1, size=2**18).astype(np.float32)
        self._weights = weights.tobytes()
        self._manifest = json.loads((TINY_BUNDLE / "bundle.json").read_text(encoding="utf-8"))

    def seeds(self) -> list[bytes]:
        return [
            json.dumps(
                {
                    "architecture": asdict(seed.architecture),
                    "graph": asdict(seed.facts),
                    "weights_bytes": seed.weights_bytes,
                }
            ).encode()
            + b"\0"
            + seed.graph
            for seed in graph_seeds().values()
        ]

    def corpus(self) -> list[bytes]:
        facts, _, graph = self.seeds()[0].partition(b"\0")
        return [facts + b"\0" + make(graph) for name, make in HOSTILE.items() if name != "many-nodes"]

    def mutated(self, rng: random.Random, data: bytes, others: Sequence[bytes], mutator: Mutator) -> bytes:
        facts, _, graph = data.partition(b"\0")
        if mutator is change_json:
            return mutator(rng, facts, ()) + b"\0" + graph
        return facts + b"\0" + mutator(rng, graph, [other.partition(b"\0")[2] for other in others])

    def read(self, data: bytes) -> object:
        self._write(data)
        with edgelm.load(self._folder, device="cpu", threads=1) as model:
            model.session.step([1, 2, 3])
            return model.session.step([4])

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, data: bytes) -> None:
        """Make the folder the bundle that `data` describes."""
        text, _, graph = data.partition(b"\0")
        facts = json.loads(text)
        size = facts.get("weights_bytes") if isinstance(facts, dict) else None
        count = size if isinstance(size, int) and 0 <= size <= len(self._weights) else 0
        (self._folder / "model.onnx.data").write_bytes(self._weights[:count])
        (self._folder / "model.onnx").write_bytes(graph)
        content = self._manifest | {"certificate": None, "required_features": []}
        if isinstance(facts, dict):
            content |= {key: facts[key] for key in ("architecture", "graph") if key in facts}
        listed = [path for path in self._folder.iterdir() if path.name != "bundle.json"]
        content["files"] = {path.name: asdict(file_fact(path)) for path in listed}
        (self._folder / "bundle.json").write_bytes(resealed(json.dumps(content).encode()))


class VerifyTarget(Target):
    """Altered files of a bundle against ``edgelm verify --hashes-only``, which must notice every change.

    An input is the name of a file, a zero byte and its new content.
    """

    name = "verify"
    mutators = (flip_bits, set_bytes, truncate, delete, insert, repeat)
    refusals = (BundleError,)

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="edgelm-fuzz-"))
        shutil.copytree(TINY_BUNDLE, self._folder, dirs_exist_ok=True)

    def seeds(self) -> list[bytes]:
        return [path.name.encode() + b"\0" + path.read_bytes() for path in sorted(TINY_BUNDLE.iterdir())]

    def corpus(self) -> list[bytes]:
        return []

    def mutated(self, rng: random.Random, data: bytes, others: Sequence[bytes], mutator: Mutator) -> bytes:
        name, _, content = data.partition(b"\0")
        return name + b"\0" + mutator(rng, content, ())

    def read(self, data: bytes) -> object:
        name, _, content = data.partition(b"\0")
        path = self._folder / name.decode()
        good = path.read_bytes()
        path.write_bytes(content)
        try:
            Bundle.read(self._folder).verify()
        finally:
            path.write_bytes(good)
        # Blanks between the parts of a manifest mean nothing.
        same = json.loads(content) == json.loads(good) if path.name == "bundle.json" else content == good
        assert same, f"{path.name} was altered, and nothing noticed"
        return None

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def resealed(data: bytes) -> bytes:
    """A manifest with its digest corrected, as an attacker would."""
    try:
        content = json.loads(data)
        content["digest"] = digest_of(content)
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError, AttributeError):
        return data
