"""Overfitting shown and cured on few stories: ``python -m benchmarks.overfitting STORIES.txt OUT``.

Trains one small GPT-2 again and again, each time with one thing changed; writes OUT/overfitting.svg and
OUT/overfitting.json, and prints a table for docs/training.md. Minutes on two CPU cores.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from edgelm_train.data.corpus import END_OF_TEXT, read_documents
from edgelm_train.pretrain import pretrain
from edgelm_train.pretrain_options import PretrainOptions
from edgelm_train.run.curves import draw_curves

SHAPE = {"n_layer": 3, "n_embd": 128, "n_head": 4, "n_positions": 128, "vocab_size": 1024}
HELD_OUT, FEW, MANY = 100, 50, 1000
"""Stories."""
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Trial:
    """One run: its options, and on how many stories."""

    options: PretrainOptions
    stories: int = FEW


def trials(shape: Path, tokens: int) -> dict[str, Trial]:
    """Every run by what is special about it."""
    none = PretrainOptions(
        size=str(shape),
        tokens=tokens,
        held_out=HELD_OUT,
        short_windows=0.0,
        batch_tokens=BATCH_TOKENS,
        learning_rate=4e-3,
        weight_decay=0.0,
        dropout=0.0,
        patience=0,
        keep="last",
        precision="fp32",
        evaluations=25,
    )
    return {
        "nothing": Trial(none),
        "early stopping": Trial(replace(none, patience=3, keep="best")),
        "dropout 0.3": Trial(replace(none, dropout=0.3)),
        "twenty times the stories": Trial(none, MANY),
        "weight decay 1": Trial(replace(none, weight_decay=1.0)),
        "dropout 0.3, weight decay 1, early stopping": Trial(
            replace(none, dropout=0.3, weight_decay=1.0, patience=3, keep="best")
        ),
    }


def main(stories: Path, out: Path, tokens: int = 400_000) -> None:
    """Run all trials on `stories`, into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    documents = read_documents(stories)
    shape = out / "shape.json"
    shape.write_text(json.dumps(SHAPE), encoding="utf-8")
    # One tokenizer for all, so that their losses can be compared.
    results: dict[str, dict[str, float]] = {}
    logs = {}
    tokenizer: Path | None = None
    print("| | steps | training loss | held-out loss | gap |\n|---|---|---|---|---|", flush=True)
    for name, trial in trials(shape, tokens).items():
        data = out / f"{trial.stories}-stories.txt"
        data.write_text(END_OF_TEXT.join(documents[: HELD_OUT + trial.stories]), encoding="utf-8")
        folder = out / name.replace(" ", "-").replace(",", "")
        done = pretrain([data], folder, replace(trial.options, tokenizer=tokenizer))
        tokenizer = tokenizer or folder
        assert done.report is not None, "interrupted; run it again"
        held_out = next(iter(done.report.held_out.values()))
        results[name] = {
            "steps": done.outcome.steps,
            "training": done.report.training,
            "held_out": held_out,
            "gap": done.report.gap,
        }
        logs[name] = done.outcome.log
        print(
            f"| {name} | {done.outcome.steps} | {done.report.training:.3f} | {held_out:.3f} | {done.report.gap:.3f} |",
            flush=True,
        )
    (out / "overfitting.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw_curves(logs, BATCH_TOKENS, out / "overfitting.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
