"""The command: what its list shows, and that mistakes end it with one sentence before anything is loaded or written."""

import json
from pathlib import Path

import pytest

from edgelm_recipes.tasks import RECIPES
from tests.conftest import RunCommand
from tests.recipes.conftest import Kitchen, write_data_sets


def test_the_list(edgelm_command: RunCommand) -> None:
    shown = edgelm_command("recipe", "--list")
    assert shown.status == 0
    for recipe in RECIPES.values():
        for part in (recipe.name, recipe.source.url, recipe.source.licence, recipe.metric, *recipe.source.files):
            assert part in shown.stdout


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (("sentiments",), 2, "'sentiments' is not one of 'sentiment'"),
        (("sentiment", "--data", "nowhere"), 1, "'nowhere' is no folder; give the one with train.tsv and dev.tsv"),
        (("sentiment", "--data", "multi30k"), 1, "'multi30k' has no file 'train.tsv'"),
        (("sentiment", "--data", "sst2", "--epochs", "nan"), 1, "--epochs must be more than 0, got nan"),
        (("sentiment", "--data", "sst2", "--batch-size", "0"), 1, "--batch-size must be at least 1, got 0"),
        (("sentiment", "--data", "sst2", "--base", "sst2"), 1, "sst2"),
        (("sentiment", "--data", "sst2", "--bundle", "sst2"), 1, "sst2"),
        (("sentiment", "--data", "sst2", "--out", "sst2"), 1, "sst2 is not empty; give a new folder as --out"),
        (
            ("sentiment", "--data", "sst2", "--back-translate", "sst2", "sst2/dev.tsv"),
            1,
            "the recipe sentiment does not write a text for one text",
        ),
        (("translation-en-de", "--data", "multi30k", "--back-translate", "sst2", "multi30k/val.de"), 1, "bundle.json"),
        (("sentiment", "--data", "sst2", "--rows", "2"), 2, "2 is not in the range x>=3"),
    ],
)
def test_mistakes(
    edgelm_command: RunCommand, tmp_path: Path, kitchen: Kitchen, args: tuple[str, ...], status: int, message: str
) -> None:
    write_data_sets(tmp_path)
    usual = {"--data": "sst2", "--out": "out", "--base": str(kitchen.base)}
    more = [word for name, value in usual.items() if name not in args for word in (name, value)]
    done = edgelm_command("recipe", *args, *more)
    assert done.status == status and message in done.stderr and done.stdout == ""
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_another_recipe_in_the_same_folder(edgelm_command: RunCommand, tmp_path: Path, kitchen: Kitchen) -> None:
    write_data_sets(tmp_path)
    (tmp_path / "out" / "data").mkdir(parents=True)
    started = {"options": {"recipe": "summary"}, "decided": {}}
    (tmp_path / "out" / "run.json").write_text(json.dumps(started), encoding="utf-8")
    done = edgelm_command("recipe", "sentiment", "--data", "sst2", "--out", "out", "--base", str(kitchen.base))
    assert done.status == 1 and "was started with --recipe summary, not --recipe sentiment" in done.stderr
