"""The attention that a bundle shows is the one that torch's eager attention computes."""

import numpy as np
import pytest
import torch

from edgelm.bundle.manifest import FixedPrecision
from edgelm.engine.graph import Graph
from edgelm.ids import Attention
from edgelm.reuse.prefix import PromptEncoder
from edgelm.scoring.explanation import explain
from edgelm.text.tokenizer import Tokenizer
from tests.against_transformers.test_variants import FAMILY_SHAPES
from tests.build_side import Report
from tests.export.checkpoints import SMALL_FAMILIES, Ids, Shape, Tiny, TinyExport

pytestmark = pytest.mark.export

SHAPES = [
    Shape(),
    Shape(width=20, heads=4, layers=3, context=11, vocab=3, tied=False),  # head dim 5, padded to 8
    Shape(width=96, heads=6, layers=3, config={"scale_attn_by_inverse_layer_idx": True, "activation_function": "silu"}),
    Shape(width=48, heads=6, config={"scale_attn_weights": False, "activation_function": "relu"}),
    *SMALL_FAMILIES.values(),  # rotary, grouped, padded heads; windows; norms of heads
    *(shape for shape in FAMILY_SHAPES if shape.config.get("use_sliding_window")),  # in the later layers only
]


def shown(tiny: Tiny, ids: Ids) -> Attention:
    bundle = tiny.exported.bundle
    graph = Graph.open(bundle, device="cpu", threads=1)
    return explain(graph, None, PromptEncoder(Tokenizer.of_bundle(bundle)), ids.tolist()).attentions


def of_torch(tiny: Tiny, ids: Ids) -> Attention:
    """Attention (L, A, T, T) of eager attention."""
    with torch.no_grad():
        layers = tiny.torch.model(torch.tensor(ids)[None], output_attentions=True).attentions
    found: Attention = np.stack([layer[0].numpy() for layer in layers])
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_fp32_attention_equals_torch(shape: Shape, tiny_export: TinyExport, report: Report) -> None:
    tiny = tiny_export(shape, "fp32")
    ids = tiny.text()
    actual, expected = shown(tiny, ids), of_torch(tiny, ids)
    assert actual.shape == expected.shape == (shape.layers, shape.heads, len(ids), len(ids))
    assert expected.max(axis=-1)[..., 2:].mean() > 1.5 / len(ids), "even attention would test nothing"
    difference = np.abs(actual - expected).max()
    report(f"largest difference of attention {difference:.1e}")
    assert difference <= 1e-4
    assert np.abs(actual.sum(axis=-1) - 1).max() <= 1e-5
    assert not np.triu(actual, 1).any(), "a token looks ahead"


@pytest.mark.parametrize("precision, limit", [("int8", 0.1), ("fp16", 0.02)])
def test_quantized_attention_is_near(precision: FixedPrecision, limit: float, tiny_export: TinyExport) -> None:
    tiny = tiny_export(Shape(), precision)
    ids = tiny.text()
    actual = shown(tiny, ids)
    assert actual.dtype == np.float32
    assert np.abs(actual - of_torch(tiny, ids)).mean() <= limit
    assert np.abs(actual.sum(axis=-1) - 1).max() <= 1e-2
