"""How often a token fed alone gives another likeliest token than the same token inside a longer chunk, and how close
the top two were there.

    python -m benchmarks.flip_rate [--checkpoint FOLDER] [--text FILE]

Exports the checkpoint in each recipe, feeds held-out stories both ways, and prints a Markdown table and, as its last
line, one JSON object. Progress goes to stderr. Nothing is downloaded.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.machine import machine_facts
from edgelm.manifest import FixedPrecision
from edgelm.model import Model, load
from edgelm.session import Session

RECIPES: tuple[FixedPrecision, ...] = ("fp32", "int8", "int4")
SHARED = Path(__file__).parents[2] / "shared"
HELD_OUT_STORIES = 206
"""The first ones of the text: stories-6m has not seen them."""

Ids = npt.NDArray[np.int64]


@dataclass
class Flips:
    """Both ways over some tokens. A margin is the logit of the likeliest token over that of the second."""

    tokens: int = 0
    margins: list[float] = field(default_factory=list)
    """Of each flip, inside the chunk."""
    all_margins: list[float] = field(default_factory=list)
    largest_logit_difference: float = 0.0

    def facts(self) -> dict[str, float | int]:
        """Rate and margins, in logits."""
        widest = max(self.margins, default=0.0)
        return {
            "tokens": self.tokens,
            "flips": len(self.margins),
            "flips_per_10000_tokens": 1e4 * len(self.margins) / self.tokens,
            "median_margin_of_flips": float(np.median(self.margins)) if self.margins else 0.0,
            "largest_margin_of_flips": widest,
            "share_of_tokens_within_that_margin": sum(m <= widest for m in self.all_margins) / self.tokens,
            "median_margin": float(np.median(self.all_margins)),
            "largest_logit_difference": self.largest_logit_difference,
        }


def measure(session: Session, windows: Sequence[Ids]) -> Flips:
    """Feed every window in chunks and token by token."""
    found = Flips()
    for window in windows:
        session.reset()
        chunked = session.score(window)  # (T, V)
        session.reset()
        for row, token in zip(chunked, window, strict=True):
            alone = session.step([int(token)])  # (V,)
            second, first = np.partition(row, -2)[-2:]
            margin = float(first - second)
            found.tokens += 1
            found.all_margins.append(margin)
            found.largest_logit_difference = max(found.largest_logit_difference, float(np.abs(alone - row).max()))
            if alone.argmax() != row.argmax():
                found.margins.append(margin)
    return found


def held_out(model: Model, text: str, stories: int) -> list[Ids]:
    """The first `stories` of `text`, each after token 0, in windows of the context."""
    parts = [story for part in text.split("<|endoftext|>") if (story := part.strip())][:stories]
    ids = np.array([token for story in parts for token in (0, *model.tokenizer.encode(story))], np.int64)
    context = model.session.context_length
    return [window for window in np.split(ids, range(context, len(ids), context)) if len(window) >= 2]


def markdown(results: dict[str, dict[str, float | int]]) -> str:
    """A row a recipe."""
    rows = [
        "| recipe | tokens | flips | per 10,000 | median margin at a flip | largest | tokens within it | "
        "largest logit difference |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, r in results.items():
        cells = [
            name,
            f"{r['tokens']:,}",
            f"{r['flips']}",
            f"{r['flips_per_10000_tokens']:.1f}",
            f"{r['median_margin_of_flips']:.4f}" if r["flips"] else "-",
            f"{r['largest_margin_of_flips']:.4f}" if r["flips"] else "-",
            f"{r['share_of_tokens_within_that_margin']:.2%}" if r["flips"] else "-",
            f"{r['largest_logit_difference']:.2g}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how often one-token steps choose another token than chunks.")
    parser.add_argument("--checkpoint", type=Path, default=SHARED / "checkpoints" / "stories-6m", metavar="FOLDER")
    parser.add_argument("--text", type=Path, default=SHARED / "data" / "tinystories_slice.txt", metavar="FILE")
    parser.add_argument("--stories", type=int, default=HELD_OUT_STORIES, metavar="N", help="default %(default)s")
    options = parser.parse_args()
    from edgelm_export.export import export

    text = options.text.read_text(encoding="utf-8")
    results: dict[str, dict[str, float | int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            print(f"exporting {options.checkpoint} as {recipe}", file=sys.stderr)
            export(str(options.checkpoint), Path(folder) / recipe, recipe, accept_quality_loss=True)
            model = load(Path(folder) / recipe, device="cpu")
            print(f"feeding {recipe} both ways", file=sys.stderr)
            results[recipe] = measure(model.session, held_out(model, text, options.stories)).facts()
            print(json.dumps(results[recipe]), file=sys.stderr)
    print(markdown(results))
    print()
    print(json.dumps({"machine": machine_facts(), "stories": options.stories, "recipes": results}))


if __name__ == "__main__":
    main()
