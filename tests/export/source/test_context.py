"""A shorter context, for a model with learned positions and for one without."""

from pathlib import Path

import numpy as np
import pytest

from edgelm.errors import ExportError
from edgelm_export.model.families import collect_weights
from edgelm_export.source.checkpoint import load_checkpoint
from edgelm_export.source.context import shorten_context
from tests.export.checkpoints import Shape, save_checkpoint

pytestmark = pytest.mark.export


@pytest.mark.parametrize("shape", [Shape(), Shape(family="llama")], ids=lambda shape: shape.family)
def test_a_shorter_context_computes_the_same_for_shorter_texts(shape: Shape, tmp_path: Path) -> None:
    whole = load_checkpoint(str(save_checkpoint(tmp_path / "whole", shape)))
    positions = collect_weights(whole.model).position_table
    short = shorten_context(whole, 20)
    weights = collect_weights(short.model)
    assert short.architecture.context_length == 20
    assert any("64 to 20 tokens" in note for note in short.notes)
    assert '": 20' in short.config_json
    if positions is not None:
        assert weights.position_table is not None
        assert np.array_equal(weights.position_table.weight, positions.weight[:20])
    for rotary in weights.rotaries:
        assert len(rotary.cos) == 20 + 2


@pytest.mark.parametrize("tokens", [0, 3, 65])
def test_a_longer_context_is_refused_with_both_numbers(tokens: int, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(save_checkpoint(tmp_path / "whole", Shape())))
    with pytest.raises(ExportError, match=rf"from 4 to the model's own context of 64, got {tokens}"):
        shorten_context(checkpoint, tokens)
