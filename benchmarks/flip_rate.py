"""How often two ways to compute the same logits have different most likely tokens, and how close the top two were.

    python -m benchmarks.flip_rate CHECKPOINT [--text FILE]

Exports the checkpoint in each recipe and feeds held-out stories in every way. Prints a Markdown table, and one JSON
object as its last line. Progress goes to stderr. Nothing is downloaded.
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

from benchmarks.data import HELD_OUT_STORIES
from benchmarks.machine import machine_facts
from edgelm.bundle.manifest import FixedPrecision
from edgelm.engine.session import Session
from edgelm.loading import load
from edgelm.model import Model

RECIPES: tuple[FixedPrecision, ...] = ("fp32", "int8", "w8a8", "int4", "int4-small")
WAYS = (
    "in a chunk and token by token",
    "in a chunk and alone after a chunked text",
    "token by token and in a batch",
)

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


@dataclass
class Flips:
    """Comparison of two ways on the same tokens.

    A margin is the logit of the most likely token minus the logit of the second, in the first way.
    """

    tokens: int = 0
    margins: list[float] = field(default_factory=list)
    """The margin at each flip, where the two ways have different most likely tokens."""
    all_margins: list[float] = field(default_factory=list)
    largest_logit_difference: float = 0.0

    def add(self, one: Logits, other: Logits) -> None:
        """Count the tokens of two logits (T, V)."""
        second, first = np.partition(one, -2)[:, -2:].T  # (T,) each
        margins, flipped = first - second, one.argmax(axis=1) != other.argmax(axis=1)
        self.tokens += len(one)
        self.all_margins += margins.tolist()
        self.margins += margins[flipped].tolist()
        self.largest_logit_difference = max(self.largest_logit_difference, float(np.abs(one - other).max()))

    def facts(self) -> dict[str, float | int]:
        """Rate of flips, and margins in logits."""
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


def token_by_token(session: Session, window: Ids) -> Logits:
    """Logits (T, V) when every token is fed alone, and all earlier tokens were fed alone too."""
    session.reset()
    return np.stack([session.step([int(token)]) for token in window])  # (T, V)


def alone_after_chunks(session: Session, window: Ids) -> Logits:
    """Logits (T, V) when every token is fed alone, but all earlier tokens were fed in chunks.

    Goes from the last token backwards, because a step overwrites its own keys and values only.
    """
    session.reset()
    session.step(window)
    rows = []
    for place in range(len(window) - 1, -1, -1):
        session.rewind(session.position - place)
        rows.append(session.step([int(window[place])]))
    return np.stack(rows[::-1])  # (T, V)


def measure(session: Session, paired: Session, windows: Sequence[Ids]) -> dict[str, Flips]:
    """The flips of each pair of ways.

    Args:
        session: session of the bundle.
        paired: session of the same bundle, batch invariant.
        windows: token ids of the held-out text.
    """
    flips = {name: Flips() for name in WAYS}
    for window in windows:
        session.reset()
        chunked, alone = session.score(window), token_by_token(session, window)
        flips[WAYS[0]].add(chunked, alone)
        flips[WAYS[1]].add(chunked, alone_after_chunks(session, window))
        flips[WAYS[2]].add(alone, token_by_token(paired, window))
    return flips


def held_out(model: Model, text: str, stories: int | None) -> list[Ids]:
    """The first `stories` documents of `text`, each preceded by token 0, in windows of the context length."""
    parts = [story for part in text.split("<|endoftext|>") if (story := part.strip())][:stories]
    ids = np.array([token for story in parts for token in (0, *model.tokenizer.encode(story))], np.int64)
    context = model.session.context_length
    return [window for window in np.split(ids, range(context, len(ids), context)) if len(window) >= 2]


def markdown(results: dict[str, dict[str, dict[str, float | int]]]) -> str:
    """A Markdown table with a row for each way and recipe."""
    rows = [
        "| a token | recipe | flips | per 10,000 | median margin at a flip | largest | tokens within it | "
        "largest logit difference |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for way in WAYS:
        for recipe, ways in results.items():
            r = ways[way]
            cells = [
                way,
                recipe,
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
    parser = argparse.ArgumentParser(
        description="Measure how often two ways to compute the same logits choose different tokens."
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder in Hugging Face layout")
    parser.add_argument("--text", type=Path, default=HELD_OUT_STORIES, metavar="FILE", help="default: benchmarks/texts")
    parser.add_argument("--stories", type=int, metavar="N", help="use the first N; default: all")
    options = parser.parse_args()
    from edgelm_export.pipeline import export

    text = options.text.read_text(encoding="utf-8")
    results: dict[str, dict[str, dict[str, float | int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            print(f"exporting {options.checkpoint} as {recipe}", file=sys.stderr)
            made = Path(folder) / recipe
            export(str(options.checkpoint), made, recipe, accept_quality_loss=True)
            print(f"feeding {recipe} in every way", file=sys.stderr)
            model, paired = load(made, device="cpu"), load(made, device="cpu", batch_invariant=True)
            pairs = measure(model.session, paired.session, held_out(model, text, options.stories))
            results[recipe] = {way: flips.facts() for way, flips in pairs.items()}
            print(json.dumps(results[recipe]), file=sys.stderr)
    print(markdown(results))
    print()
    print(json.dumps({"machine": machine_facts(), "stories": options.stories, "recipes": results}))


if __name__ == "__main__":
    main()
