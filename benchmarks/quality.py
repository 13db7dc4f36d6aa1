"""The quality that each way of storing a checkpoint loses: the recipes, and the tries they were chosen from.

    python -m benchmarks.quality CHECKPOINT [TEXT] [--stories 100]

Every row is a real graph run by the shipped runtime, compared with torch in float32 on held-out text. Each is measured
twice. The second time the checkpoint has outliers: some LayerNorm channels are multiplied by 30, and the rows that take
them are divided by 30. The function stays the same, and real GPT-2 checkpoints have such outliers. Prints a Markdown
table, and one JSON object as its last line. All rows take half an hour on two busy cores.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.data import HELD_OUT_STORIES


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table with a row for each way of storing."""
    lines = [
        "| weights | MB | ratio | KL, nats | same top-1 | ratio, outliers | KL, outliers | top-1, outliers |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in results.items():
        cells = [name, f"{row['bytes'] / 1e6:.2f}"]
        for kind in ("plain", "outliers"):
            cells += [f"{row[f'{kind}_perplexity_ratio']:.4f}", f"{row[f'{kind}_mean_kl_divergence_nats']:.5f}"]
            cells += [f"{row[f'{kind}_top1_agreement']:.2%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description="Measure the quality that each way of storing loses."
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder in Hugging Face layout")
    parser.add_argument(
        "text",
        nargs="?",
        type=Path,
        default=HELD_OUT_STORIES,
        metavar="TEXT",
        help="held-out text; default: the stories of benchmarks/texts",
    )
    parser.add_argument("--separator", default="<|endoftext|>", help="between texts; default %(default)s")
    parser.add_argument("--stories", type=int, metavar="N", help="measure on the first N texts; default: all")
    parser.add_argument("--rows", nargs="+", metavar="WORD", help="only rows whose names contain one of these words")
    options = parser.parse_args()

    from benchmarks.quality_rows import ROWS, measure_checkpoint
    from edgelm_export.source.checkpoint import load_checkpoint

    names = [name for name in ROWS if not options.rows or any(word in name for word in options.rows)]
    checkpoint = load_checkpoint(str(options.checkpoint))
    tokens, results = measure_checkpoint(checkpoint, options.text, options.separator, options.stories, names)
    print(markdown(results))
    print(json.dumps({"checkpoint": checkpoint.name, "tokens": tokens, "rows": results}))


if __name__ == "__main__":
    main()
