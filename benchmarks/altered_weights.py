"""Whether `edgelm verify` notices altered weights after hashes and digest were updated to match them.

    python -m benchmarks.altered_weights BUNDLE [BUNDLE ...]

Prints a Markdown table for each bundle, one row for each alteration, and one JSON object as its last line.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.alterations import (
    Array,
    alter,
    low_bits_flipped,
    scaled,
    sign_flipped,
    stored_tensors,
    two_rows_swapped,
    zeroed,
)
from edgelm.bundle.folder import Bundle
from edgelm.bundle.reference import read_reference
from edgelm.engine.graph import Graph
from edgelm.scoring.verification import Check, checks, drift, figures, observe_session

Change = Callable[[Array], Array]


def last_bits_moved(array: Array) -> Array:
    """All values times 1 + 2^-20. Another CPU's arithmetic may differ as much, so this must pass."""
    return array * np.float32(1 + 2**-20)


def measure(bundle: Path) -> list[Check]:
    """The checks that `edgelm verify` makes."""
    opened = Bundle.read(bundle)
    facts, data = read_reference(opened)
    observed = observe_session(facts, data, Graph.open(opened, device="cpu").session())
    return checks(facts, data, figures(facts, data, observed), drift(data, observed))


def alterations(bundle: Path) -> Iterator[tuple[str, list[str], Change]]:
    """Label, names of the tensors and change of each alteration.

    Altered are all matrices together, the token table, and each matrix of the first and of the last layer.
    """
    tensors = {tensor.name: tensor for tensor in stored_tensors(bundle)}
    integers = [name for name, tensor in tensors.items() if tensor.dtype.kind in "iu" and len(tensor.shape) > 1]
    yield "LayerNorm weights moved by 2^-20", [n for n in tensors if n.endswith("norm.weight")][:1], last_bits_moved
    if integers:
        yield "low bits of 3% of all integer bytes", integers, low_bits_flipped
    layers = sorted({int(name.split(".")[2]) for name in tensors if name.startswith("transformer.h.")})
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = [f"transformer.h.{layer}.{part}.weight" for layer in (layers[0], layers[-1]) for part in parts]
    for name in ["transformer.wte.weight", *names]:
        short = name.removeprefix("transformer.").removesuffix(".weight")
        yield f"{short}: zero", [name], zeroed
        yield f"{short}: two rows swapped", [name], two_rows_swapped
        yield f"{short}: low bits of 3% of its bytes", [name], low_bits_flipped
        scale = f"{name}.scales" if f"{name}.scales" in tensors else name
        yield f"{short}: × 1.05", [scale], scaled
        yield f"{short}: sign flipped", [scale], sign_flipped


def main() -> None:
    parser = argparse.ArgumentParser(description="Alter weights and see whether `edgelm verify` notices.")
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    results: dict[str, list[dict[str, object]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for bundle in parser.parse_args().bundles:
            recipe = Bundle.read(bundle).manifest.recipe.name
            rows = results[f"{bundle.name} {recipe}"] = []
            tolerances = [check.tolerance for check in measure(bundle)]
            print(f"\n{bundle.name}, {recipe}; tolerances {tolerances[2]:.4f} and {tolerances[3]:.4f} nats\n")
            print("| alteration | log-probabilities differ by | their means | perplexity × | verify |")
            print("|---|--:|--:|--:|---|")
            for label, names, change in alterations(bundle):
                copy = Path(shutil.copytree(bundle, Path(folder) / "altered"))
                for name in names:
                    alter(copy, name, change)
                _, ratio, values, means = measure(copy)
                passed = values.passed and means.passed and ratio.passed
                shutil.rmtree(copy)
                print(
                    f"| {label} | {values.measured:.4f} | {means.measured:.4f} | {ratio.measured / ratio.stated:.4f} | "
                    f"{'passes' if passed else 'fails'} |"
                )
                rows.append({"alteration": label, "values": values.measured, "means": means.measured, "passed": passed})
    print()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
