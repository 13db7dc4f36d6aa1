"""Scores of tasks: hand-made answers, whose scores are known, and the command on the tiny bundle."""

import json
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm_train import evaluate
from tests.conftest import TINY_BUNDLE, RunCommand

CHOOSE = {"kind": "choose", "template": "The {who} sat on the", "choices": {"rug": " mat", "home": " house"}}


def test_accuracy() -> None:
    answers = ["a", "b", None, "a"]
    assert evaluate._accuracy(answers, ["a", "a", "a", "a"]) == 0.5


def test_texts() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    same = ["the cat sat on the mat today", "a dog ran home to the old house"]
    assert evaluate._text_scores(same, same) == {
        "BLEU": pytest.approx(100),
        "ROUGE-L": pytest.approx(100),
    }
    # Two of three words in common, all in order: precision 2/3, recall 1, F1 0.8; and an answer that is missing: 0.
    scores = evaluate._text_scores(["the cat sat", None], ["the cat", "a dog"])
    assert scores["ROUGE-L"] == pytest.approx(100 * (0.8 + 0) / 2)


def test_similarities() -> None:
    pytest.importorskip("scipy")
    answers = [0.1, 0.5, 0.3, 0.9]
    assert evaluate._spearman(answers, [0, 3, 2, 5]) == pytest.approx(1)
    assert evaluate._spearman(answers, [5, 2, 3, 0]) == pytest.approx(-1)
    assert evaluate._spearman(answers, [0, 2, 3, 5]) == pytest.approx(0.8)  # 1 - 6 · 2 / (4 · 15)
    for bad in ([*answers[:3], None], [0.5] * 4):
        with pytest.raises(edgelm.ConfigError):
            evaluate._spearman(bad, [0, 3, 2, 5])


def test_the_command(edgelm_command: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(json.dumps(CHOOSE), encoding="utf-8")
    words = ("cat", "dog", "house", "x" * 90)
    with edgelm.load(TINY_BUNDLE, device="cpu", task=tmp_path / "task.json") as model:
        labels = [str(model.task(word)) for word in words[:3]]
    wrong = {"rug": "home", "home": "rug"}[labels[2]]
    rows = [f"{word}\t{label}" for word, label in zip(words, [*labels[:2], wrong, "rug"], strict=True)]
    (tmp_path / "dev.tsv").write_text("animal\tplace\n" + "\n".join(rows) + "\n", encoding="utf-8")
    args = ("evaluate", "-m", str(TINY_BUNDLE), "--task", "task.json", "--data", "dev.tsv", "--target", "place")
    result = edgelm_command(*args, "--field", "who=animal", "--json")
    assert result.status == 0, result.stderr
    assert json.loads(result.stdout) == {"metric": "accuracy", "value": 0.5, "data": "dev.tsv", "count": 4}
    assert "line 5 of 'dev.tsv'" in result.stderr and "1 of 4 inputs have no answer" in result.stderr
    shown = edgelm_command(*args, "--field", "who=animal", "--name", "pets, dev")
    assert shown.stdout == "accuracy 0.5 on 4 examples, pets, dev\n"


@pytest.mark.parametrize(
    ("args", "task", "message"),
    [
        ([], CHOOSE, "the data has no column 'who', but 'animal', 'place'"),
        (["--field", "who=animal", "--target", "nothing"], CHOOSE, "no column 'nothing'"),
        (["--field", "who=place", "--target", "animal"], CHOOSE, "has the label 'cat', which is none of rug, home"),
        (["--field", "a=place"], {"kind": "embed", "template": "{a}"}, "there is nothing to compare"),
        (
            ["--field", "a=place", "--field", "b=animal"],
            {"kind": "embed", "template": "{a}", "second_template": "{b}"},
            "has 'rug' where a number belongs",
        ),
    ],
)
def test_data_that_do_not_fit(
    edgelm_command: RunCommand, tmp_path: Path, args: list[str], task: dict[str, Any], message: str
) -> None:
    if "second_template" in task:
        pytest.importorskip("scipy")
    (tmp_path / "task.json").write_text(json.dumps(task), encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("animal\tplace\ncat\trug\n", encoding="utf-8")
    own = ("evaluate", "-m", str(TINY_BUNDLE), "--task", "task.json", "--data", "dev.tsv", "--target", "place")
    result = edgelm_command(*own, *args)
    assert message in result.one_line() and result.status == 2


def test_a_bundle_without_a_task_has_nothing_to_measure(edgelm_command: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("a\tb\nc\td\n", encoding="utf-8")
    result = edgelm_command("evaluate", "-m", str(TINY_BUNDLE), "--data", "dev.tsv", "--target", "b")
    assert "the bundle has no task" in result.one_line()
