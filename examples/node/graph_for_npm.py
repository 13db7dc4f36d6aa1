"""Write a bundle's graph for onnxruntime-node and onnxruntime-web, whose newest release on npm is 1.30.

ONNX Runtime 1.30 does not know the last input of GroupQueryAttention that edgelm writes, `query_seqlens`: the number of
new tokens of each row, without padding. generate.mjs computes one row without padding, so it needs none.

    pip install ".[export]"                 (for the package onnx)
    python graph_for_npm.py BUNDLE GRAPH
"""

import sys
from pathlib import Path

import onnx


def main(bundle: str, target: str) -> None:
    model = onnx.load(Path(bundle) / "model.onnx", load_external_data=False)  # the weights stay where they are
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            while node.input[-1] in ("query_seqlens", ""):
                del node.input[-1]
    names = [each.name for each in model.graph.input]
    del model.graph.input[names.index("query_seqlens")]
    Path(target).write_bytes(model.SerializeToString())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python graph_for_npm.py BUNDLE GRAPH")
    main(sys.argv[1], sys.argv[2])
