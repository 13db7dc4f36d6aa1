"""Makes ``tests/fuzz/graphs``: ``python -m tests.fuzz.make_graphs`` (needs the build side).

Graphs that the exporter writes, one for each kind of operator that it uses, with what the manifest says of each. They
are the whole files that mutations of graphs start from. Their weights are left out.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, quants

from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import FixedPrecision
from edgelm_export.graph.bare_bundle import write_bare_bundle
from edgelm_export.model.families import collect_weights
from edgelm_export.quantize.calibrate import store
from edgelm_export.quantize.recipe import fixed_recipe
from tests.export.checkpoints import Shape, TinyExport, TorchModel, save_checkpoint

Q4_1 = GGMLQuantizationType.Q4_1

GRAPHS = Path(__file__).parent / "graphs"

KINDS: dict[str, tuple[Shape, FixedPrecision]] = {
    "fp32": (Shape(layers=1), "fp32"),
    "fp16": (Shape(layers=1), "fp16"),
    "w8a8": (Shape(layers=1, config={"activation_function": "xielu"}), "w8a8"),
    "int4-odd": (Shape(layers=1, width=36, heads=3, config={"activation_function": "relu6"}), "int4"),
    "int8-untied": (Shape(layers=1, tied=False, config={"activation_function": "laplace"}), "int8"),
    "int8-llama": (Shape(family="llama", layers=1, heads=4, kv_heads=2), "int8"),
}


def main() -> None:
    """Write a graph and a JSON file of each kind."""
    with tempfile.TemporaryDirectory() as folder:
        export = TinyExport(Path(folder), 200)
        for name, (shape, precision) in KINDS.items():
            _keep(name, export(shape, precision).exported.bundle)
        _keep(
            "int8-two-stages", export(Shape(layers=1, width=36, heads=3), "int8", two_stage_head=True).exported.bundle
        )
        cached = export(Shape(family="llama", layers=1, heads=4, kv_heads=2), "int8", int8_cache=True)
        _keep("int8-cache", cached.exported.bundle)
        _keep("int4-grid", _on_a_grid(Path(folder) / "grid"))


def _on_a_grid(folder: Path) -> Bundle:
    """An int4 bundle of a model whose weights lie on a 4-bit grid that does not pass through zero."""
    model = TorchModel(
        save_checkpoint(folder / "m", Shape(family="llama", layers=1, width=64, heads=4, inner=96))
    ).model
    for name, parameter in model.requires_grad_(False).named_parameters():
        if name.endswith("_proj.weight"):
            rounded = quants.dequantize(quants.quantize(parameter.numpy(), Q4_1), Q4_1)
            parameter.copy_(torch.from_numpy(rounded.reshape(parameter.shape)))
    weights = collect_weights(model)
    (folder / "bundle").mkdir()
    return write_bare_bundle(store(weights, fixed_recipe("int4", weights), None), folder / "bundle")


def _keep(name: str, bundle: Bundle) -> None:
    graph = bundle.manifest.graph
    (GRAPHS / f"{name}.onnx").write_bytes(bundle.checked_content(graph.file))
    facts = {
        "architecture": asdict(bundle.manifest.architecture),
        "graph": asdict(graph),
        "weights_bytes": bundle.manifest.files[graph.weights_file].size_bytes,
    }
    (GRAPHS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
