"""Every graph that the exporter writes keeps the rules by which the runtime reads it."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers

from edgelm.bundle.manifest import FixedPrecision
from edgelm.errors import ExportError
from edgelm_export.graph.decoder import write_graph
from edgelm_export.model.activations import ACTIVATIONS, widen_activation
from edgelm_export.model.families import collect_weights
from edgelm_export.quantize.calibrate import StoredDecoder, store
from edgelm_export.quantize.recipe import BLOCK4_FINE, StorageRecipe, fixed_recipe

pytestmark = pytest.mark.export

RECIPES: tuple[FixedPrecision, ...] = get_args(FixedPrecision)
ODD: dict[str, Any] = {"n_embd": 36, "n_head": 3, "n_inner": 52}
"""Heads of 12, which are padded to 16; widths that no block size divides, so the table's rows are widened."""
WIDE: dict[str, Any] = {"n_embd": 64, "n_head": 4, "n_inner": 512, "tie_word_embeddings": False}
LARGE: dict[str, Any] = {"n_embd": 512, "n_head": 4, "n_layer": 1}
"""Norms and biases that go to the weights file."""


def stored(recipe_name: FixedPrecision, **config: Any) -> StoredDecoder:
    sizes: dict[str, Any] = {"vocab_size": 300, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | config))).eval()
    for module in model.modules():
        widen_activation(module)
    weights = collect_weights(model)
    recipe = fixed_recipe(recipe_name, weights)
    rows = np.random.default_rng(0).integers(0, 300, (2, 32)) if recipe.is_quantized else None
    return store(weights, recipe, rows)


@pytest.mark.parametrize("config", [{}, ODD, WIDE, LARGE], ids=["usual", "odd", "wide", "large"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_and_sizes(recipe: FixedPrecision, config: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_graph(stored(recipe, **config), tmp_path)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "granite", "gemma3_text"])
@pytest.mark.parametrize(
    ("sizes", "widest"),
    [
        ({"hidden_size": 96, "head_dim": 16, "intermediate_size": 20}, 96),
        ({"hidden_size": 48, "head_dim": 20, "intermediate_size": 20}, 128),  # four heads, padded to 32
        ({"hidden_size": 48, "head_dim": 8, "intermediate_size": 60}, 120),
    ],
    ids=["hidden", "heads", "inner"],
)
def test_the_widest_activation_is_that_of_the_graph(
    family: str, sizes: dict[str, int], widest: int, tmp_path: Path
) -> None:
    config = transformers.AutoConfig.for_model(
        family, vocab_size=300, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    weights = collect_weights(model)
    assert weights.architecture.widest_activation == widest
    write_graph(store(weights, fixed_recipe("fp32", weights), None), tmp_path)


@pytest.mark.parametrize("recipe", ["fp32", "fp16"])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name: str, recipe: FixedPrecision, tmp_path: Path) -> None:
    write_graph(stored(recipe, activation_function=name), tmp_path)


def test_bits_chosen_matrix_by_matrix(tmp_path: Path) -> None:
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    )
    weights = collect_weights(model.eval())
    names = [linear.name for linear in weights.products]
    storage = dict(fixed_recipe("int4", weights).storage)
    storage[names[0]] = fixed_recipe("fp32", weights).storage[names[0]]
    storage[names[1]] = BLOCK4_FINE
    storage[names[2]] = fixed_recipe("w8a8", weights).storage[names[2]]
    rows = np.random.default_rng(0).integers(0, 300, (2, 32))
    write_graph(store(weights, StorageRecipe("mixed", storage), rows), tmp_path)


def test_an_operator_that_the_rules_do_not_know_is_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelm_export.graph import activations

    monkeypatch.setitem(activations._WRITE, "relu", activations._operator("Softsign"))
    with pytest.raises(ExportError, match=r"'h.0.active' \(Softsign\): it is of a kind .*; please report this"):
        write_graph(stored("fp32", activation_function="relu"), tmp_path)
