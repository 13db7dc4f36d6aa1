"""The folder of a LoRA adapter is a base too: LoRA goes on with it, the other methods start from the merged model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgelm.errors import TrainingError
from edgelm_export.source.adapter import merge_adapter
from edgelm_export.source.checkpoint import load_checkpoint
from edgelm_train.distill import distill
from edgelm_train.finetune import finetune
from edgelm_train.models.base import find_base
from edgelm_train.options import DistillOptions, FinetuneOptions
from tests.export.checkpoints import Shape, save_checkpoint
from tests.train.conftest import Playground

pytest.importorskip("peft", reason="peft is not installed: pip install 'edgelm[train]'")

pytestmark = pytest.mark.export

QUICK = FinetuneOptions(epochs=1, evaluations=1, learning_rate=1e-2, prefix_tokens=4)


@pytest.fixture(scope="module")
def adapter(playground: Playground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first") / "adapter"
    finetune(str(playground.base), playground.reversals, out, replace(QUICK, rank=4))
    return out


def test_distillation_and_latent_parts_are_for_gpt2(tmp_path: Path, playground: Playground) -> None:
    source = save_checkpoint(tmp_path / "llama", Shape(family="llama"))
    message = "takes GPT-2 only, and '.*llama' is a model of the type 'llama'"
    with pytest.raises(TrainingError, match=f"edgelm distill {message}"):
        find_base(str(source), None).refuse_other_families("edgelm distill")
    with pytest.raises(TrainingError, match=f"edgelm distill {message}"):
        distill(str(source), playground.text, tmp_path / "out", DistillOptions())
    with pytest.raises(TrainingError, match=f"--latent {message}"):
        finetune(str(source), playground.text, tmp_path / "out", FinetuneOptions(latent=True))
    assert not (tmp_path / "out").exists()


def test_lora_goes_on_with_it(adapter: Path, playground: Playground, tmp_path: Path) -> None:
    first = json.loads((adapter / "report.json").read_text(encoding="utf-8"))["losses"]["after"]
    said: list[str] = []
    done = finetune(str(adapter), playground.reversals, tmp_path / "out", QUICK, say=said.append)
    assert done.report is not None and any("goes on with the adapter" in line for line in said)
    assert done.report.losses["before"] == pytest.approx(first, abs=1e-5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 4
    merged = merge_adapter(load_checkpoint(str(playground.base)), str(tmp_path / "out"))
    again = merge_adapter(load_checkpoint(str(playground.base)), str(adapter))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (merged.model(ids).logits - again.model(ids).logits).abs().max() > 0.01
    assert done.report.next_steps[0].startswith(f"edgelm export {playground.base} --adapter {tmp_path / 'out'}")


def test_another_rank_is_refused(adapter: Path, playground: Playground, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the adapter has the rank 4, .* leave out --rank 8"):
        finetune(str(adapter), playground.reversals, tmp_path / "out", replace(QUICK, rank=8))
    assert not (tmp_path / "out").exists()


def test_full_and_distillation_start_from_the_merged_model(
    adapter: Path, playground: Playground, tmp_path: Path
) -> None:
    first = json.loads((adapter / "report.json").read_text(encoding="utf-8"))["losses"]["after"]
    done = finetune(str(adapter), playground.reversals, tmp_path / "full", replace(QUICK, method="full"))
    assert done.report is not None and done.report.losses["before"] == pytest.approx(first, abs=1e-4)
    assert (tmp_path / "full" / "model.safetensors").is_file()
    options = DistillOptions(layers=1, tokens=1000, batch_tokens=256, evaluations=1, alone=False)
    (tmp_path / "text.txt").write_text(playground.text.read_text(encoding="utf-8") * 3, encoding="utf-8")
    taught = distill(str(adapter), tmp_path / "text.txt", tmp_path / "small", options)
    plain = distill(str(playground.base), tmp_path / "text.txt", tmp_path / "other", options)
    assert taught.report is not None and plain.report is not None
    assert taught.report.losses["teacher"] != plain.report.losses["teacher"]


def test_a_prefix_names_the_adapter_of_its_base(adapter: Path, playground: Playground, tmp_path: Path) -> None:
    done = finetune(str(adapter), playground.reversals, tmp_path / "out", replace(QUICK, method="prefix"))
    assert done.report is not None
    assert done.report.next_steps[0] == f"edgelm export {playground.base} --adapter {adapter} -o adapter-int8"


def test_its_base_is_found_beside_it_or_named(adapter: Path, playground: Playground, tmp_path: Path) -> None:
    moved = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((moved / "adapter_config.json").read_text(encoding="utf-8"))
    for named, words in (("/gone/far", "is an adapter of '/gone/far', which is not here"), (None, "names no base")):
        content = json.dumps({**config, "base_model_name_or_path": named})
        (moved / "adapter_config.json").write_text(content, encoding="utf-8")
        with pytest.raises(TrainingError, match=words) as caught:
            find_base(str(moved), None)
        assert "base_model_name_or_path" in str(caught.value)
    shutil.copytree(playground.base, tmp_path / "far")
    config["base_model_name_or_path"] = "/gone/far"
    (moved / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    found = find_base(str(moved), None)
    assert (Path(found.source), found.adapter, found.context_length) == (tmp_path / "far", moved, 64)
