"""The recipes that have a name: how each of them stores each kind of matrix."""

from pathlib import Path

import pytest

from edgelm.bundle.manifest import FixedPrecision
from edgelm_export.model.decoder import DecoderWeights
from edgelm_export.model.families import collect_weights
from edgelm_export.quantize.recipe import fixed_recipe
from edgelm_export.quantize.storage import FLOAT16, FLOAT32, INT8_ROW, Storage
from tests.against_transformers.test_variants import FAMILY_SHAPES
from tests.export.checkpoints import Shape, TorchModel, save_checkpoint

pytestmark = pytest.mark.export

LLAMA = next(shape for shape in FAMILY_SHAPES if shape.family == "llama")


def weights_of(shape: Shape, place: Path) -> DecoderWeights:
    return collect_weights(TorchModel(save_checkpoint(place / "m", shape)).model)


@pytest.mark.parametrize(
    ("name", "products", "gated", "tables", "gated_tables"),
    [
        ("fp32", FLOAT32, FLOAT32, FLOAT32, FLOAT32),
        ("fp16", FLOAT16, FLOAT16, FLOAT16, FLOAT16),
        ("w8a8", INT8_ROW, INT8_ROW, Storage("block", 8, 256), Storage("block", 8, 256)),
        ("int8", Storage("block", 8, 256), Storage("block", 8, 32), Storage("block", 8, 256), Storage("block", 8, 32)),
        ("int4", Storage("block", 4, 256), Storage("block", 4, 64), Storage("block", 8, 256), Storage("block", 8, 256)),
        (
            "int4-small",
            Storage("block", 4, 256),
            Storage("block", 4, 64),
            Storage("block", 4, 256),
            Storage("block", 4, 256),
        ),
    ],
)
def test_how_a_recipe_stores_a_matrix(
    name: FixedPrecision, products: Storage, gated: Storage, tables: Storage, gated_tables: Storage, tmp_path: Path
) -> None:
    """`gated` is the product behind a gate, and `gated_tables` are the tables of a model whose MLPs have gates."""
    for shape, of_tables in ((Shape(), tables), (LLAMA, gated_tables)):
        weights = weights_of(shape, tmp_path / shape.name)
        storage = fixed_recipe(name, weights).storage
        behind_gates = {layer.mlp_out.name for layer in weights.layers if layer.is_gated}
        assert bool(behind_gates) == (shape is LLAMA)
        of_products = {linear.name: gated if linear.name in behind_gates else products for linear in weights.products}
        assert storage == of_products | {table.name: of_tables for table in weights.tables}
