"""Searches on the tiny bundle against ids that the last transformers which hold them computed, and beams' own rules."""

import json
from typing import Any

import pytest

from edgelm import Bundle, Session
from edgelm.generate import generate
from edgelm.generation_config import GenerationConfig
from tests.conftest import DATA, TINY_BUNDLE

GOLDEN = json.loads((DATA / "tiny-gpt2-searches.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tiny() -> Session:
    return Session.open(Bundle.read(TINY_BUNDLE), device="cpu", threads=1)


def rows(session: Session, prompt: list[int], options: dict[str, Any]) -> list[list[int]]:
    session.reset()
    found = generate(session, prompt, GenerationConfig().updated(options), 0)
    return [[step.token_id for step in steps if step.token_id is not None] for steps in found]


@pytest.mark.parametrize("kind", ["groups", "contrastive"])
def test_ids_are_those_of_the_last_transformers_that_had_the_method(tiny: Session, kind: str) -> None:
    for case in GOLDEN[kind]["cases"]:
        assert rows(tiny, case["prompt"], case["options"]) == case["rows"], case
