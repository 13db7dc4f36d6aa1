"""What it costs to judge a bundle's graph before ONNX Runtime loads it.

    python -m benchmarks.graph_reader BUNDLE [BUNDLE ...]

Prints the median of 21 reads with empty caches, in milliseconds of CPU time, which a busy machine stretches least.
"""

import argparse
import statistics
import time
from pathlib import Path

from edgelm.bundle import onnx_file, protobuf
from edgelm.bundle.folder import Bundle
from edgelm.bundle.graph_rules import check_graph


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.graph_reader", description="Measure what reading and judging a graph costs."
    )
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    options = parser.parse_args()
    print(f"{'':40} {'nodes':>8} {'ms':>8}")
    for path in options.bundles:
        bundle = Bundle.read(path)
        names, files = bundle.manifest.graph, bundle.manifest.files
        data, weights_bytes = bundle.checked_content(names.file), files[names.weights_file].size_bytes
        seconds = []
        for _ in range(21):
            for cached in (protobuf._printable, onnx_file._attribute, onnx_file._entry, onnx_file._type):
                cached.cache_clear()
            started = time.process_time()
            check_graph(data, bundle.manifest.architecture, names, weights_bytes)
            seconds.append(time.process_time() - started)
        nodes = len(onnx_file.read_onnx(data).nodes)
        print(f"{str(path)[-40:]:40} {nodes:8} {1000 * statistics.median(seconds):8.1f}")


if __name__ == "__main__":
    main()
