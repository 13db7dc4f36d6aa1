"""For every family and every kind of config, the bundle computes what torch computes."""

import numpy as np
import pytest
from transformers.activations import ACT2FN

from edgelm.bundle.manifest import FixedPrecision
from edgelm_export.model.activations import ACTIVATIONS
from tests.build_side import Report
from tests.export.checkpoints import SMALL_FAMILIES, WINDOWS, Logits, Shape, Tiny, TinyExport, greedy

pytestmark = pytest.mark.export

# optimum takes most of an export's time, so one shape tests several features. test_activations.py tests each
# activation alone.
SHAPES = [
    Shape(),
    Shape(width=48, heads=3, layers=1, context=11, vocab=54, config={"activation_function": "gelu_10"}),  # head dim 16
    Shape(width=20, heads=4, layers=3, context=11, vocab=3, tied=False),  # head dim 5, padded to 8
    Shape(width=3, heads=3, context=8, vocab=54, config={"activation_function": "linear"}),  # head dim 1
    Shape(width=320, heads=1, layers=1, context=8, config={"activation_function": "relu6"}),  # one large head
    Shape(width=48, heads=4, config={"activation_function": "gelu"}),  # head dim 12, padded to 16
    Shape(width=96, heads=12, tied=False, config={"activation_function": "gelu_pytorch_tanh"}),  # head dim 8
    Shape(width=128, heads=2, layers=1, inner=200, config={"activation_function": "xielu"}),  # head dim 64
    Shape(width=200, heads=10, context=8, vocab=54, inner=72, tied=False),  # head dim 20, padded to 24
    Shape(width=16, heads=2, layers=1, context=8, vocab=70_000, config={"activation_function": "tanh"}),
    Shape(width=96, heads=6, layers=3, config={"scale_attn_by_inverse_layer_idx": True, "activation_function": "silu"}),
    Shape(width=48, heads=6, config={"scale_attn_weights": False, "activation_function": "relu"}),
    Shape(  # both scale settings, padded and untied
        width=20,
        heads=4,
        layers=3,
        tied=False,
        config={"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "activation_function": "gelu"},
    ),
    Shape(
        config={
            "reorder_and_upcast_attn": True,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "laplace",
        }
    ),
    Shape(layers=1, config={"layer_norm_epsilon": 1e-2, "activation_function": "mish"}),
    Shape(width=20, heads=1, layers=1, vocab=54, context=8, config={"activation_function": "quick_gelu"}),
    Shape(pruned_heads=((0, 2), ()), config={"activation_function": "leaky_relu"}),
    Shape(dtype="float16", config={"activation_function": "prelu"}),
    Shape(dtype="bfloat16", tied=False, config={"activation_function": "relu2"}),
    Shape(stored="bin", config={"activation_function": "sigmoid"}),
    Shape(stored="bin", dtype="float16", tied=False, config={"activation_function": "gelu_fast"}),
    Shape(stored="sharded", config={"activation_function": "gelu_accurate"}),
    Shape(stored="sharded-bin", tied=False, config={"activation_function": "gelu_python"}),
    Shape(stored="hub", config={"activation_function": "gelu_python_tanh"}),
    Shape(stored="double-heads", config={"activation_function": "swish"}),
]
LLAMA3_ROTARY = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILY_SHAPES = [
    *SMALL_FAMILIES.values(),
    Shape(family="llama", width=36, heads=3, kv_heads=1, inner=50, config={"rope_theta": 500.0}),  # 12, padded to 16
    Shape(
        family="llama",
        width=60,
        heads=6,
        tied=False,
        dtype="bfloat16",
        stored="sharded",
        config={"head_dim": 24, "attention_bias": True, "mlp_bias": True, "rope_scaling": LLAMA3_ROTARY},
    ),
    Shape(family="llama", width=128, heads=1, config={"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    Shape(
        family="llama",
        width=64,
        heads=4,
        kv_heads=2,
        stored="bin",
        config={"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    Shape(family="mistral", width=40, heads=2, kv_heads=1, tied=False, config={"sliding_window": None, "head_dim": 32}),
    Shape(
        family="qwen2",
        width=48,
        heads=3,
        layers=3,
        tied=False,
        config={"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    Shape(family="qwen3", width=64, heads=2, kv_heads=1, tied=False, config={"head_dim": 128, "attention_bias": True}),
    Shape(family="gemma3_text", width=32, heads=2, layers=2, tied=False, config={"head_dim": 16, "sliding_window": 64}),
]


def test_every_activation_of_transformers_is_in_some_shape() -> None:
    assert {shape.config.get("activation_function", "gelu_new") for shape in SHAPES} == set(ACT2FN) == set(ACTIVATIONS)


@pytest.fixture(scope="module", params=[*SHAPES, *FAMILY_SHAPES], ids=lambda shape: shape.name)
def exact(request: pytest.FixtureRequest, tiny_export: TinyExport) -> Tiny:
    """An fp32 bundle."""
    return tiny_export(request.param, "fp32")


def test_fp32_logits_equal_torch_at_every_position(exact: Tiny) -> None:
    ids = exact.text()
    expected, actual = exact.torch.logits(ids), exact.session().score(ids)
    assert np.abs(expected).max() > 1, "flat logits would test nothing"
    assert np.abs(actual - expected).max() <= 1e-3
    assert exact.certificate.passed


def test_fp32_greedy_ids_equal_torch_to_the_end_of_the_context(exact: Tiny) -> None:
    prompt = exact.text(1)[:3].tolist()
    # The token after the last position is the last token that can be generated; it is never fed.
    new_tokens = exact.shape.context + 1 - len(prompt)
    assert greedy(exact.session(), prompt, new_tokens) == exact.torch.greedy(prompt, new_tokens)


def test_cached_decoding_equals_recomputation(exact: Tiny) -> None:
    ids, session = exact.text(2), exact.session()
    whole = session.score(ids)
    session.reset()
    one_by_one = np.stack([session.step([token]) for token in ids])
    assert np.abs(one_by_one - whole).max() <= 1e-4
    session.rewind(len(ids) - 2)
    again = session.score(ids[2:])
    assert np.abs(again - whole[2:]).max() <= 1e-4


# Random weights, widths that no block divides, heads padded: the hard cases of the storage formats.
QUANTIZED_SHAPES = [
    Shape(width=128, heads=2, layers=2),
    Shape(width=20, heads=4, layers=3, context=11, vocab=3, tied=False),
    Shape(width=48, heads=4, config={"activation_function": "gelu"}),
    Shape(width=200, heads=10, layers=2, context=64, vocab=54, inner=72, config={"activation_function": "relu2"}),
    Shape(family="llama", width=96, heads=6, kv_heads=2, inner=200),
    Shape(  # windows, norms of heads, and norms of what is added
        family="gemma3_text",
        width=40,
        heads=2,
        kv_heads=1,
        config={"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 20, "layer_types": WINDOWS[:2]},
    ),
]


@pytest.fixture(scope="module", params=QUANTIZED_SHAPES, ids=lambda shape: shape.name)
def shape(request: pytest.FixtureRequest) -> Shape:
    actual: Shape = request.param
    return actual


def relative_difference(actual: Logits, expected: Logits) -> float:
    """Root mean square of the difference, divided by the spread of the expected logits around their row's mean."""
    spread = expected - expected.mean(axis=1, keepdims=True)
    return float(np.sqrt(np.square(actual - expected).mean() / np.square(spread).mean()))


# Rounding makes a relative error of step / sqrt(12) / deviation in every matrix, which add up in quadrature over the
# 8 to 12 matrices on the way: 4 bits 9% each, 25 to 30% in all; 8 bits a sixteenth of that, and as much again for the
# activations; 16-bit floats 2^-11 / sqrt(3) each. The limits are about twice what was measured on the worst shape.
@pytest.mark.parametrize(("precision", "limit"), [("fp16", 0.004), ("int8", 0.08), ("int4", 0.7)])
def test_quantized_logits_stay_near_torch(
    shape: Shape, precision: FixedPrecision, limit: float, tiny_export: TinyExport, report: Report
) -> None:
    tiny = tiny_export(shape, precision)
    ids = tiny.text()
    actual = tiny.session().score(ids)
    assert np.isfinite(actual).all()
    difference = relative_difference(actual, tiny.torch.logits(ids))
    report(f"{shape.name} {precision}: relative difference of logits {difference:.4f}, limit {limit}")
    assert difference <= limit


@pytest.mark.parametrize("precision", ["fp16", "int8", "w8a8", "int4", "int4-small"])
def test_quantized_decoding_stays_near_recomputation(
    shape: Shape, tiny_export: TinyExport, precision: FixedPrecision
) -> None:
    # A single token uses a different attention kernel; the rounding of activations amplifies its last bits.
    tiny = tiny_export(shape, precision)
    ids, session = tiny.text(2), tiny.session()
    whole = session.score(ids)
    session.reset()
    one_by_one = np.stack([session.step([token]) for token in ids])
    assert relative_difference(one_by_one, whole) <= 0.02
