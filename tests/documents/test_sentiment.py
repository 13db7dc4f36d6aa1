"""The sentiment benchmark: its prompts, and a run on made-up reviews."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.sentiment import Task, draw_shots, read_examples
from tests.conftest import ROOT, TINY_BUNDLE

REVIEWS = [(f"a good one {i}", 1) for i in range(6)] + [(f"a bad one {i}", 0) for i in range(6)]


def test_solved_examples_come_first_and_the_question_last() -> None:
    task = Task("{} It was", (" bad.", " good."), (("so dull", 0), ("a joy", 1)), None)
    assert task.prompt("well made") == "so dull It was bad.\n\na joy It was good.\n\nwell made It was"


def test_as_many_examples_of_each_label() -> None:
    shots = draw_shots(REVIEWS, 6, 0, longest=80)
    assert sum(label for _, label in shots) == 3 and len(set(shots)) == 6
    assert shots == draw_shots(REVIEWS, 6, 0, longest=80) != draw_shots(REVIEWS, 6, 1, longest=80)
    assert all(label == 0 for _, label in draw_shots(REVIEWS, 1, 0, longest=80))


def test_one_command_prints_one_object(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        lines = [f"{text} \t{label}\n" for text, label in REVIEWS]
        (tmp_path / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
    assert read_examples(tmp_path / "dev.tsv") == REVIEWS
    command = [sys.executable, "-m", "benchmarks.sentiment", "--data", str(tmp_path), "--model", str(TINY_BUNDLE)]
    done = subprocess.run(
        [*command, "--limit", "9", "--neutral", "it"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["examples"] == 9 and result["majority_accuracy"] == 6 / 9
    assert 0 <= result["accuracy"] <= 1
