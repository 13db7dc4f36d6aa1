"""What surrounds the steps of a run: options, progress, precision, record, report and shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgelm.errors import TrainingError
from edgelm_train.models.sizes import SIZES, named_config
from edgelm_train.options import PretrainOptions
from edgelm_train.run.callbacks import progress_line
from edgelm_train.run.folder import RunRecord, read_record, refuse_changes
from edgelm_train.run.machine import fastest_precision
from edgelm_train.run.report import TrainingReport, TuningReport, draw_curves, draw_samples

pytestmark = pytest.mark.export

NAN = float("nan")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def test_progress_says_how_far_how_good_how_fast_and_how_long() -> None:
    line = progress_line(250, 1000, 2.0, 4096, 3.14159, 3.2)

    assert line == (
        "[######..................]  25%  step 250/1,000  loss 3.142  held out 3.200  2,048 tokens/s  25:00 left"
    )
    assert "loss" not in progress_line(1, 10_000, 1.0, 4096, NAN, NAN)
    assert progress_line(1, 10_000, 1.0, 4096, NAN, NAN).endswith("2:46:39 left")


def test_the_faster_precision_is_taken_and_nothing_is_changed_by_measuring(model: Any) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()

    precision, seconds = fastest_precision(model, 32, 16)

    assert seconds[precision] == min(seconds.values())
    assert set(seconds) == {"fp32", "bf16"}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_changed_option_is_named(tmp_path: Path) -> None:
    RunRecord({"tokens": 5, "hours": None}, {"steps": 3}).write(tmp_path / "training")
    started = read_record(tmp_path / "training")

    assert started is not None and started.decided == {"steps": 3}
    refuse_changes(started, {"tokens": 5, "hours": None}, tmp_path)
    with pytest.raises(TrainingError, match="with --tokens 5, not --tokens 6"):
        refuse_changes(started, {"tokens": 6, "hours": None}, tmp_path)
    with pytest.raises(TrainingError, match="with no --hours, not --hours 2"):
        refuse_changes(started, {"tokens": 5, "hours": 2.0}, tmp_path)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{", encoding="utf-8")

    with pytest.raises(TrainingError, match="is damaged"):
        read_record(tmp_path)
    assert read_record(tmp_path / "nothing") is None


def test_a_report_is_the_same_as_json_and_for_people(tmp_path: Path) -> None:
    report = TrainingReport(
        {"tokens": 12345, "rate": 2.5}, {16: 2.0, 32: 1.9}, 1.5, ["a\nb"], [{"step": 1, "loss": 3.0}]
    )

    report.write(tmp_path)

    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["gap"] == 0.5
    assert content["held_out"] == {"16": 2.0, "32": 1.9}
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| held-out text, windows of 16 | 2.0000 | 7.39 |" in text
    assert "| tokens | 12,345 |" in text and "> a\n> b" in text


def test_curves_are_a_small_picture_with_both_losses(tmp_path: Path) -> None:
    log = [{"step": step, "loss": 5 / step} for step in range(1, 2001)] + [{"step": 2000, "eval_loss": 1.0}]

    draw_curves({"one": log, "two": log}, 100, tmp_path / "curves.svg")

    picture = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert len(picture) < 60_000
    assert all(f">{label}<" in picture for label in ("one", "two", "training", "held out", "million tokens"))


def test_samples_follow_from_their_seeds_alone(model: Any) -> None:
    class Numbers:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return " ".join(map(str, ids))

    state = torch.get_rng_state()
    first = draw_samples(model, Numbers(), [3, 4], 5)

    assert draw_samples(model, Numbers(), [4], 5) == first[1:]
    assert first[0] != first[1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_what_they_are_called(size: str) -> None:
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(named_config(size))

    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(float(size[:-1]), rel=0.25)
    assert model.config.n_embd // model.config.n_head in (32, 64)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"model_type": "llama"}',
        "[]",
        '{"n_layer": 2}',
        *(
            json.dumps({"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 300} | change)
            for change in (
                {"n_head": 3},
                {"n_head": 0},
                {"n_layer": 0},
                {"n_layer": "2"},
                {"n_embd": 32.0},
                {"vocab_size": True},
                {"n_positions": 33},
                {"n_positions": 1},
                {"activation_function": "foo"},
                {"n_inner": 0},
                {"layer_norm_epsilon": "x"},
            )
        ),
    ],
)
def test_an_invalid_shape_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")

    with pytest.raises(TrainingError, match="cannot take the shape from"):
        named_config(str(path))


def test_a_model_to_go_on_from_brings_its_tokenizer() -> None:
    with pytest.raises(TrainingError, match="leave out --tokenizer"):
        PretrainOptions(start_from=Path("a"), tokenizer=Path("b"))


def test_named_shapes_have_no_dropout(tmp_path: Path) -> None:
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 300, "resid_pdrop": 0.3}
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    for config in (named_config("1M"), named_config(str(tmp_path / "config.json"))):
        assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0


def test_a_loss_that_is_too_large_for_a_perplexity_is_reported(tmp_path: Path) -> None:
    TuningReport({"after": 5_000.0}, {}, (), ()).write(tmp_path)
    assert "| after | 5000.0000 | inf |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
