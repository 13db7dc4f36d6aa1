"""Makes ``tests/fuzz/graphs``: ``python -m tests.fuzz.make_graphs`` (needs the build side).

Graphs that the exporter writes, one for each kind of operator that it uses, with what the manifest says of each. They
are the whole files that mutations of graphs start from. Their weights are left out.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from edgelm.bundle.manifest import FixedPrecision
from tests.export.checkpoints import Shape, TinyExport

GRAPHS = Path(__file__).parent / "graphs"

KINDS: dict[str, tuple[Shape, FixedPrecision]] = {
    "fp32": (Shape(layers=1), "fp32"),
    "fp16": (Shape(layers=1), "fp16"),
    "w8a8": (Shape(layers=1, config={"activation_function": "xielu"}), "w8a8"),
    "int4-odd": (Shape(layers=1, width=36, heads=3, config={"activation_function": "relu6"}), "int4"),
    "int8-untied": (Shape(layers=1, tied=False, config={"activation_function": "laplace"}), "int8"),
}


def main() -> None:
    """Write a graph and a JSON file of each kind."""
    with tempfile.TemporaryDirectory() as folder:
        export = TinyExport(Path(folder), 200)
        for name, (shape, precision) in KINDS.items():
            bundle = export(shape, precision).exported.bundle
            graph = bundle.manifest.graph
            (GRAPHS / f"{name}.onnx").write_bytes(bundle.file(graph.file).read_bytes())
            facts = {
                "architecture": asdict(bundle.manifest.architecture),
                "graph": asdict(graph),
                "weights_bytes": bundle.manifest.files[graph.weights_file].size_bytes,
            }
            (GRAPHS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
