"""The extraction benchmark: its reviews and their answers, and a run of the embedded model on stories."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks are not part of a distribution")
pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

from benchmarks.extraction import REVIEW_SCHEMA, extracted, film_reviews, review_prompt, stories, written_reviews
from edgelm import load
from tests.conftest import ROOT, TINY_BUNDLE


def test_the_reviews_have_each_product_and_each_opinion_once() -> None:
    cases = written_reviews()
    assert len({case.text for case in cases}) == len(cases) == 100
    right = {"product": "kettle", "sentiment": "negative", "stars": 1}
    assert all(check(right) for check in cases[0].checks.values())
    wrong = {"product": "pot", "sentiment": "positive", "stars": 2}
    assert {name for name, check in cases[0].checks.items() if check(wrong)} == {"stars within 1"}


def test_sentences_of_sst2_have_a_sentiment(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("good \t1\nbad\t0\n", encoding="utf-8")
    good, bad = film_reviews(tmp_path, 5)
    assert good.checks["sentiment"]({"sentiment": "positive", "stars": 5})
    assert not bad.checks["sentiment"]({"sentiment": "neutral", "stars": 3})
    assert bad.checks["sentiment, where it is not neutral"]({"sentiment": "neutral", "stars": 3})
    assert bad.text == "bad" and review_prompt("bad").endswith("\n\nReview: bad\nJSON: ")


def test_answers_that_are_cut_off_are_not_counted_as_valid() -> None:
    model = load(TINY_BUNDLE, threads=1, device="cpu")
    facts = extracted(model, lambda text: text[:20], stories(2), REVIEW_SCHEMA, 20)
    assert (facts["texts"], facts["finished"], facts["cut_off"], facts["invalid"]) == (2, 0, 2, [])


def test_the_embedded_model_writes_valid_answers_about_stories() -> None:
    command = [sys.executable, "-m", "benchmarks.extraction", "--texts", "8", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["texts"], facts["finished"], facts["invalid"]) == (8, 8, [])
