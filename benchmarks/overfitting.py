"""Overfitting on few stories, and what helps against it.

    python -m benchmarks.overfitting data/stories.txt OUT

Trains one small GPT-2 several times, each time with one option changed. Writes OUT/overfitting.svg and
OUT/overfitting.json, and prints a Markdown table. Takes minutes on two CPU cores.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from edgelm_train.data.corpus import END_OF_TEXT, read_documents
from edgelm_train.options import PretrainOptions

SHAPE = {"n_layer": 3, "n_embd": 128, "n_head": 4, "n_positions": 128, "vocab_size": 1024}
HELD_OUT, FEW, MANY = 100, 50, 1000
"""Numbers of stories."""
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Trial:
    """Options of one run, and the number of stories it trains on."""

    options: PretrainOptions
    stories: int = FEW


def trials(shape: Path, tokens: int) -> dict[str, Trial]:
    """Every run by the option that is changed in it."""
    plain = PretrainOptions(
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
        "nothing": Trial(plain),
        "early stopping": Trial(replace(plain, patience=3, keep="best")),
        "dropout 0.3": Trial(replace(plain, dropout=0.3)),
        "twenty times the stories": Trial(plain, MANY),
        "weight decay 1": Trial(replace(plain, weight_decay=1.0)),
        "dropout 0.3, weight decay 1, early stopping": Trial(
            replace(plain, dropout=0.3, weight_decay=1.0, patience=3, keep="best")
        ),
    }


def run(stories: Path, out: Path, tokens: int) -> None:
    """Run all trials.

    Args:
        stories: file of stories with <|endoftext|> between them.
        out: folder to write into.
        tokens: tokens to train on in each run.
    """
    from edgelm_train.pretrain import pretrain
    from edgelm_train.run.report import draw_curves

    out.mkdir(parents=True, exist_ok=True)
    documents = read_documents(stories)
    shape = out / "shape.json"
    shape.write_text(json.dumps(SHAPE), encoding="utf-8")
    # All runs share one tokenizer, so that their losses can be compared.
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
        assert done.report is not None, "the run was interrupted; start it again"
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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overfitting", description="Show overfitting on few stories, and what helps."
    )
    parser.add_argument("stories", type=Path, metavar="STORIES", help="at least 1,100 stories, <|endoftext|> between")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write into")
    parser.add_argument("--tokens", type=int, default=400_000, metavar="N", help="of each run; default %(default)s")
    options = parser.parse_args()
    run(options.stories, options.out, options.tokens)


if __name__ == "__main__":
    main()
