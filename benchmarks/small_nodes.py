"""Time of a step's small nodes: residual sum and norm in one node or in two, GELU with or without a bias.

    python -m benchmarks.small_nodes

Runs chains of fifty nodes on random numbers of GPT-2 124M's widths, with ONNX Runtime's fusions off. Prints a Markdown
table of microseconds per node (or pair of nodes), medians over interleaved rounds. Nothing is downloaded.
"""

import argparse
import time
from statistics import median

import numpy as np
import onnxruntime
from onnx import NodeProto, TensorProto, helper, numpy_helper

WIDTH, INNER_WIDTH, REPEATS = 768, 3072, 50
ROWS = (1, 2, 8, 256)
CONTRIB = "com.microsoft"


def nodes(kind: str, x: str, y: str) -> list[NodeProto]:
    """The timed nodes of a kind, from the tensor `x` to the tensor `y`, both (T, width)."""
    make, norm = helper.make_node, {"epsilon": 1e-5}
    return {
        "SkipLayerNormalization": [
            make("SkipLayerNormalization", [x, "residual", "ones", "zeros"], [y], domain=CONTRIB, **norm)
        ],
        "Add, LayerNormalization": [
            make("Add", [x, "residual"], [f"{y}.sum"]),
            make("LayerNormalization", [f"{y}.sum", "ones", "zeros"], [y], axis=-1, **norm),
        ],
        "FastGelu with a bias": [make("FastGelu", [x, "zeros"], [y], domain=CONTRIB)],
        "FastGelu": [make("FastGelu", [x], [y], domain=CONTRIB)],
    }[kind]


KINDS = {
    "SkipLayerNormalization": WIDTH,
    "Add, LayerNormalization": WIDTH,
    "FastGelu with a bias": INNER_WIDTH,
    "FastGelu": INNER_WIDTH,
}


def open_session(kind: str, threads: int) -> onnxruntime.InferenceSession:
    """A session with a chain of `REPEATS` times the nodes of `kind`."""
    width, chain, x = KINDS[kind], list[NodeProto](), "x"
    for place in range(REPEATS):
        chain += nodes(kind, x, f"y.{place}")
        x = f"y.{place}"
    info = helper.make_tensor_value_info
    constants = [("ones", np.ones(width, np.float32)), ("zeros", np.zeros(width, np.float32))]
    graph = helper.make_graph(
        chain,
        "chain",
        [info(name, TensorProto.FLOAT, ["rows", width]) for name in ("x", "residual")],
        [info(x, TensorProto.FLOAT, ["rows", width])],
        [numpy_helper.from_array(values, name) for name, values in constants],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the small nodes of a step.")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default %(default)s")
    options = parser.parse_args()
    sessions = {kind: open_session(kind, options.threads) for kind in KINDS}
    rng = np.random.default_rng(0)
    print(f"| µs, by rows | {' | '.join(map(str, ROWS))} |\n|---|{'--:|' * len(ROWS)}")
    times: dict[tuple[str, int], list[float]] = {(kind, rows): [] for kind in KINDS for rows in ROWS}
    for _ in range(options.rounds):
        for kind, rows in times:
            x, residual = rng.standard_normal((2, rows, KINDS[kind])).astype(np.float32)
            session = sessions[kind]
            feed = {"x": x, "residual": residual}
            session.run(None, feed)
            started = time.perf_counter()
            for _ in range(5):
                session.run(None, feed)
            times[kind, rows].append(1e6 * (time.perf_counter() - started) / 5 / REPEATS)
    for kind in KINDS:
        print(f"| {kind} | {' | '.join(f'{median(times[kind, rows]):.1f}' for rows in ROWS)} |")


if __name__ == "__main__":
    main()
