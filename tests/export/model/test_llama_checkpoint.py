"""What a checkpoint of Llama's kind must contain: each refusal names the field or the weight."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgelm_export.model.decoder import Linear
from edgelm_export.model.families import FAMILIES, collect_weights
from edgelm_export.source.checkpoint import load_checkpoint
from tests.export.checkpoints import Shape, edit_json, refusal, save_checkpoint

pytestmark = pytest.mark.export

Weights = dict[str, torch.Tensor]
SHAPE = Shape(family="llama", width=48, heads=6, kv_heads=2, tied=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "source", SHAPE)


def change(source: Path, edit: Callable[[Weights], Weights]) -> None:
    save_file(edit(load_file(source / "model.safetensors")), source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_scaling", "'dynamic'"]),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
            ["rope_scaling", "'longrope'"],
        ),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"num_key_value_heads": 4}, ["num_attention_heads 6", "num_key_value_heads 4"]),
        ({"head_dim": 7}, ["heads of 7 numbers"]),
        ({"head_dim": -8}, ["head_dim", "-8"]),
        ({"hidden_size": 50}, ["(300, 48)", "(300, 50)"]),
        ({"hidden_size": "48"}, ["hidden_size", "'48'"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps", "'1e-5'"]),
        ({"hidden_act": "step"}, ["'step'"]),
        ({"num_hidden_layers": 3}, ["2 layers", "num_hidden_layers 3"]),
        ({"intermediate_size": 90}, ["gate_proj", "(96, 48)", "(90, 48)"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantized already"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_that_are_not_exported_are_refused_by_name(
    fields: dict[str, Any], words: list[str], source: Path
) -> None:
    edit_json(source / "config.json", **fields)
    message = refusal(source)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("family", "fields", "word"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"sliding_window": "4"}, "sliding_window"),
        ("qwen2", {"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window"),
        ("llama", {"rope_scaling": {"rope_type": "mrope"}}, "mrope"),
    ],
)
def test_windows_and_kinds_of_layers(family: str, fields: dict[str, Any], word: str, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / family, Shape(family=family, width=32, heads=2), **fields)
    assert word in refusal(source)


@pytest.mark.parametrize("field", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_softcapping_is_refused(field: str, tmp_path: Path) -> None:
    shape = Shape(family="gemma3_text", width=32, heads=2, config={"head_dim": 16, "sliding_window": 8})
    source = save_checkpoint(tmp_path / "gemma", shape, **{field: 30.0})
    assert field in refusal(source)


def test_missing_and_wrong_weights_are_named(source: Path) -> None:
    whole = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    change(source, lambda weights: {key: value for key, value in weights.items() if key != name})
    assert name in refusal(source)
    change(source, lambda weights: whole | {name: torch.zeros(96, 48, dtype=torch.int8)})
    assert name in refusal(source) and "floating-point" in refusal(source)
    change(source, lambda weights: whole | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 48)})
    assert "merge_and_unload" in refusal(source)


def test_wrappers_buffers_and_further_weights(source: Path) -> None:
    """Names of a wrapped model are understood, old buffers are dropped silently, and anything else with a note."""
    plain = collect_weights(load_checkpoint(str(source)).model)
    change(
        source,
        lambda weights: (
            {f"module.{key}": value for key, value in weights.items()}
            | {"module.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "v_head.weight": torch.ones(1, 48)}
        ),
    )
    checkpoint = load_checkpoint(str(source))
    (note,) = checkpoint.notes
    assert "'v_head.weight'" in note
    for a, b in zip(plain.products, collect_weights(checkpoint.model).products, strict=True):
        assert (a.weight == b.weight).all()


def test_a_tied_head_with_other_values_is_left_out_with_a_note(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "tied", Shape(family="qwen2", width=32, heads=2))
    change(source, lambda weights: weights | {"lm_head.weight": torch.zeros(300, 32)})
    checkpoint = load_checkpoint(str(source))
    assert any("'lm_head.weight'" in note for note in checkpoint.notes)
    assert collect_weights(checkpoint.model).head is None


@pytest.mark.parametrize("token", [300, -1, "<pad>"])
def test_a_padding_token_without_a_row_changes_nothing(token: object, source: Path) -> None:
    """A tokenizer got a padding token, and the table was not resized; torch builds no such table."""
    plain = collect_weights(load_checkpoint(str(source)).model)
    edit_json(source / "config.json", pad_token_id=token)
    checkpoint = load_checkpoint(str(source))
    assert (collect_weights(checkpoint.model).token_table.weight == plain.token_table.weight).all()
    assert checkpoint.notes == ()


def test_joined_matrices_have_the_names_of_the_checkpoint() -> None:
    zeros = torch.zeros(1, 1).numpy()
    assert Linear("a.{q,k,v}_proj.weight", zeros, None).source_names == (
        "a.q_proj.weight",
        "a.k_proj.weight",
        "a.v_proj.weight",
    )
    assert Linear("a.c_attn.weight", zeros, None).source_names == ("a.c_attn.weight",)


def test_each_family_says_where_its_config_states_the_context() -> None:
    for name, family in FAMILIES.items():
        field = "n_positions" if name == "gpt2" else "max_position_embeddings"
        assert family.context_field == field
