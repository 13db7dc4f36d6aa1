"""Random checkpoints: edgelm generates what transformers generates, or says in a sentence why it does not.

`python -m tests.against_transformers.combinations --count 300 --seed 1` tries as many as you like.
"""

from pathlib import Path

import pytest

from tests.against_transformers.combinations.combination import make, remove
from tests.against_transformers.combinations.sides import differences

pytestmark = pytest.mark.export

SEED = 0
COUNT = 14


@pytest.mark.parametrize("number", range(COUNT))
def test_a_random_checkpoint(number: int, tmp_path: Path) -> None:
    combination = make(SEED, number, tmp_path / "combination")
    _, faults = differences(combination, tmp_path / "bundle")
    remove(tmp_path / "combination")
    assert not faults, combination.recipe


def test_a_number_makes_the_same_checkpoint_again(tmp_path: Path) -> None:
    one, other = (make(SEED, 3, tmp_path / name) for name in ("one", "other"))
    assert one.recipe == other.recipe and one.prompts() == other.prompts()
    files = [
        {path.relative_to(made.source): path.read_bytes() for path in made.source.rglob("*") if path.is_file()}
        for made in (one, other)
    ]
    assert files[0] == files[1]
