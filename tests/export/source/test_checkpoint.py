"""A checkpoint is judged by its weights: what loads into GPT2LMHeadModel computes what transformers computes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgelm.errors import TrainingError
from edgelm_export.model.families import collect_weights
from edgelm_export.source.checkpoint import Checkpoint, load_checkpoint, quiet_torch
from edgelm_train.models.sizes import load_weights
from tests.export.checkpoints import Shape, TorchModel, edit_json, refusal, save_checkpoint, save_tokenizer

pytestmark = pytest.mark.export

Weights = dict[str, torch.Tensor]
IDS = np.arange(16) * 7 % 54
SMALL = Shape(width=16, context=16, vocab=54)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("pristine") / "checkpoint", SMALL)


@pytest.fixture(scope="module")
def logits(pristine: Path) -> npt.NDArray[np.float32]:
    return TorchModel(pristine).logits(IDS)


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to be changed."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


def change(source: Path, edit: Callable[[Weights], Weights | None], metadata: str | None = "pt") -> None:
    path = source / "model.safetensors"
    weights = load_file(path)
    weights = edit(weights) or weights
    save_file({key: value.clone() for key, value in weights.items()}, path, metadata and {"format": metadata})


def computed(checkpoint: Checkpoint) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = checkpoint.model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    return logits


def prefixed(prefix: str, body: str = "transformer.") -> Callable[[Weights], Weights]:
    """Puts `prefix` before every name, and calls the body `body`."""
    return lambda weights: {prefix + key.replace("transformer.", body): value for key, value in weights.items()}


def with_masks(weights: Weights) -> Weights:
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    return weights | masks | {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}


SAME: dict[str, Callable[[Weights], Weights]] = {
    "trl": prefixed("pretrained_model."),
    "ddp": prefixed("module."),
    "compile": prefixed("_orig_mod."),
    "ddp-compile": prefixed("module._orig_mod."),
    "lightning": prefixed("model."),
    "body": prefixed("", ""),
    "ddp-body": prefixed("module.", ""),
    "named-body": prefixed("", "gpt2."),
    "compiled-blocks": lambda w: {k.replace(".attn.", "._orig_mod.attn."): v for k, v in w.items()},
    "fsdp": lambda w: {k.replace(".mlp.", "._fsdp_wrapped_module.mlp."): v for k, v in w.items()},
    "masks": with_masks,
    "bare-masks": lambda w: prefixed("", "")(with_masks(w)),
    "both-tied": lambda w: w | {"lm_head.weight": w["transformer.wte.weight"]},
    "head-alone": lambda w: {("lm_head.weight" if ".wte." in k else k): v for k, v in w.items()},
    "wrapped-head-alone": lambda w: {"module." + ("lm_head.weight" if ".wte." in k else k): v for k, v in w.items()},
    "double": lambda w: {k: v.double() for k, v in w.items()},
}


@pytest.mark.parametrize("kind", SAME)
def test_weights_under_other_names(kind: str, source: Path, logits: npt.NDArray[np.float32]) -> None:
    change(source, SAME[kind])
    checkpoint = load_checkpoint(str(source))
    assert np.array_equal(computed(checkpoint), logits)
    assert checkpoint.notes == ()
    assert checkpoint.model.lm_head.weight is checkpoint.model.transformer.wte.weight


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": None},
        {"model_type": "llama"},
        {"model_type": ["gpt2"]},
        {"architectures": ["GPT2HeadWithValueModel"]},
        {"architectures": ["AutoModelForCausalLMWithValueHead"]},
        {"architectures": ["GPT2Model"]},
        {"architectures": None},
        {"architectures": "GPT2LMHeadModel"},
        {"return_dict": False, "torchscript": True, "output_attentions": True, "output_hidden_states": True},
        {"torch_dtype": "float99", "problem_type": "none", "transformers_weights": "../x", "id2label": 3},
        {"n_embd": None, "hidden_size": 16, "n_positions": None, "max_position_embeddings": 16},
        {"n_layer": None, "num_hidden_layers": 2, "n_head": None, "num_attention_heads": 4},
        {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 3},
        {"n_ctx": 1024, "summary_type": 7, "gradient_checkpointing": True, "use_cache": False},
        {"_attn_implementation": "flash_attention_2", "attn_implementation": "none"},
    ],
    ids=str,
)
def test_names_in_the_config_do_not_decide(
    changes: dict[str, object], source: Path, logits: npt.NDArray[np.float32]
) -> None:
    edit_json(source / "config.json", **changes)
    checkpoint = load_checkpoint(str(source))
    assert np.array_equal(computed(checkpoint), logits)
    assert checkpoint.notes == ()
    assert checkpoint.architecture.vocab_size == 54
    assert json.loads(checkpoint.config_json)["model_type"] == "gpt2"


def test_a_value_head_is_left_out_with_a_note(source: Path, logits: npt.NDArray[np.float32]) -> None:
    change(source, lambda w: w | {"v_head.summary.weight": torch.ones(1, 16), "v_head.summary.bias": torch.ones(1)})
    checkpoint = load_checkpoint(str(source))
    assert np.array_equal(computed(checkpoint), logits)
    (note,) = checkpoint.notes
    assert "2 weights" in note
    assert "'v_head.summary.bias'" in note


def test_more_layers_than_the_config_states(source: Path) -> None:
    edit_json(source / "config.json", n_layer=1)
    checkpoint = load_checkpoint(str(source))
    assert np.array_equal(computed(checkpoint), TorchModel(source).logits(IDS))
    assert checkpoint.notes == ("left out 1 of 2 layers: config.json states n_layer 1",)


def test_a_head_that_the_config_ties_is_left_out_with_a_note(source: Path) -> None:
    change(source, lambda w: w | {"lm_head.weight": w["transformer.wte.weight"] + 1})
    checkpoint = load_checkpoint(str(source))
    assert np.array_equal(computed(checkpoint), TorchModel(source).logits(IDS))
    (note,) = checkpoint.notes
    assert "'lm_head.weight'" in note
    assert "tie_word_embeddings" in note


@pytest.mark.parametrize("epsilon", [0, 1])
def test_an_epsilon_that_json_writes_as_an_integer(epsilon: int, source: Path) -> None:
    """The graph's LayerNormalization takes a float only."""
    edit_json(source / "config.json", layer_norm_epsilon=epsilon)
    actual = collect_weights(load_checkpoint(str(source)).model).final_norm.epsilon
    assert type(actual) is float and actual == epsilon


def test_an_untied_head_beside_a_bare_body(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "untied", Shape(width=16, context=16, vocab=54, tied=False))
    expected = TorchModel(source).logits(IDS)
    change(source, prefixed("", ""))
    assert np.array_equal(computed(load_checkpoint(str(source))), expected)


def drop(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if not key.endswith(names)}


def replaced(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: value(weights[name])}


C_ATTN = "transformer.h.0.attn.c_attn.weight"
WRONG_WEIGHTS: dict[str, tuple[Callable[[Weights], Weights], list[str]]] = {
    "no-table": (drop("wte.weight"), ["lacks the weight 'transformer.wte.weight'"]),
    "no-layer": (drop("ln_1.bias"), ["lacks 2 weights", "'transformer.h.0.ln_1.bias'"]),
    "two-models": (
        lambda w: prefixed("policy.")(w) | prefixed("reference.")(w),
        ["2 models", "'policy.transformer.'", "'reference.transformer.'"],
    ),
    "both-names": (lambda w: w | prefixed("module.")(w), ["two weights for 'transformer."]),
    "lora": (lambda w: w | {C_ATTN.replace("weight", "lora_A.default.weight"): torch.ones(4, 16)}, ["not merged"]),
    "classifier": (lambda w: w | {"score.weight": torch.ones(2, 16)}, ["'score.weight'", "generates no text"]),
    "cross": (
        lambda w: w | {"transformer.h.0.crossattention.c_attn.weight": torch.ones(16, 32)},
        ["cross attention", "crossattention.c_attn.weight"],
    ),
    "int8": (replaced(C_ATTN, lambda value: value.to(torch.int8)), [C_ATTN, "torch.int8", "float32"]),
    "zero-3": (replaced(C_ATTN, lambda value: value.new_empty(0)), [C_ATTN, "is empty", "zero_to_fp32.py"]),
    "nanogpt": (replaced(C_ATTN, lambda value: value.T.contiguous()), [C_ATTN, "(48, 16)", "(16, 48)", "transposed"]),
    "context": (
        replaced("transformer.wpe.weight", lambda value: value[:12]),
        ["wpe.weight", "(12, 16)", "(16, 16)", "set n_positions to 12"],
    ),
    "vocabulary": (
        replaced("transformer.wte.weight", lambda value: value[:50]),
        ["wte.weight", "(50, 16)", "(54, 16)", "set vocab_size to 50"],
    ),
}


@pytest.mark.parametrize("kind", WRONG_WEIGHTS)
def test_weights_that_do_not_fit(kind: str, source: Path) -> None:
    edit, words = WRONG_WEIGHTS[kind]
    change(source, edit)
    message = refusal(source)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 3}, ["lacks 12 weights", "'transformer.h.2.ln_1.weight'", "2 layers", "n_layer 3"]),
        ({"n_layer": 10**9}, ["lacks 12 weights", "n_layer 1000000000"]),
        ({"n_positions": 32}, ["set n_positions to 16"]),
        ({"n_positions": 10**9}, ["set n_positions to 16"]),
        ({"n_embd": 32}, ["(54, 16)", "(54, 32)", "set n_embd to 16"]),
        ({"n_inner": 80}, ["c_fc.weight", "set n_inner to 64"]),
        ({"n_inner": "64"}, ["n_inner", "'64'"]),
        ({"n_layer": 2.0}, ["n_layer", "2.0"]),
        ({"n_head": True}, ["n_head", "True"]),
        ({"n_head": 3}, ["n_embd 16", "n_head 3"]),
        ({"vocab_size": "54"}, ["vocab_size", "'54'"]),
        ({"layer_norm_epsilon": "1e-5"}, ["layer_norm_epsilon", "'1e-5'"]),
        ({"resid_pdrop": "0.1"}, ["resid_pdrop", "'0.1'"]),
        ({"n_positions": -1}, ["n_positions", "-1"]),
        ({"activation_function": ["gelu"]}, ["activation"]),
        ({"pruned_heads": "none"}, ["config.json"]),
    ],
    ids=str,
)
def test_configs_that_do_not_fit(changes: dict[str, object], words: list[str], source: Path) -> None:
    edit_json(source / "config.json", **changes)
    message = refusal(source)
    for word in words:
        assert word in message


def test_weights_of_another_family_are_named(tmp_path: Path) -> None:
    source = tmp_path / "phi"
    config = transformers.PhiConfig(
        vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.PhiForCausalLM(config).save_pretrained(source)
    save_tokenizer(source, 54)
    message = refusal(source)
    for word in ("'phi'", "lacks", "'transformer.", "gpt2", "llama"):
        assert word in message


def as_pickle(source: Path, content: Callable[[Weights], object]) -> None:
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(content(weights), source / "pytorch_model.bin")


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_weights_inside_a_trainers_pickle(key: str, source: Path, logits: npt.NDArray[np.float32]) -> None:
    as_pickle(source, lambda weights: {key: weights, "step": 3, "args": {"lr": 0.1}})
    assert np.array_equal(computed(load_checkpoint(str(source))), logits)


def test_a_meta_tensor_in_a_pickle(source: Path) -> None:
    as_pickle(source, replaced(C_ATTN, lambda value: value.to("meta")))
    assert f"'{C_ATTN}' is a meta tensor" in refusal(source)


@pytest.mark.parametrize("content", [[], {}, {"a": 1}, 3], ids=str)
def test_a_pickle_without_weights(content: object, source: Path) -> None:
    as_pickle(source, lambda weights: content)
    assert "something other than weights" in refusal(source)


def test_a_pickle_with_objects(source: Path) -> None:
    as_pickle(source, lambda weights: {"config": Shape(), **weights})
    message = refusal(source)
    assert "tests.export.checkpoints.Shape" in message
    assert "save_pretrained" in message


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", POINTER, ["git-lfs pointer", "git lfs pull"]),
        ("config.json", POINTER, ["git-lfs pointer", "git lfs pull"]),
        ("model.safetensors", b"<!DOCTYPE html><html>", ["web page"]),
        ("model.safetensors", b"", ["empty"]),
    ],
)
def test_files_that_stand_in_the_place_of_others(file: str, content: bytes, words: list[str], source: Path) -> None:
    (source / file).write_bytes(content)
    message = refusal(source)
    for word in (file, *words):
        assert word in message


def test_a_git_lfs_pointer_as_pickle(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(POINTER)
    assert "git lfs pull" in refusal(source)


@pytest.mark.parametrize(
    ("file", "library"),
    [("tf_model.h5", "TensorFlow"), ("flax_model.msgpack", "Flax"), ("rust_model.ot", "Rust")],
)
def test_weights_of_another_library(file: str, library: str, source: Path) -> None:
    (source / "model.safetensors").rename(source / file)
    message = refusal(source)
    assert f"weights of {library} ({file})" in message
    assert "from_tf" not in message


def test_safetensors_saved_from_tensorflow(source: Path) -> None:
    change(source, dict, metadata="tf")
    assert "saved from tf" in refusal(source)


def test_safetensors_without_metadata(source: Path, logits: npt.NDArray[np.float32]) -> None:
    change(source, dict, metadata=None)
    assert np.array_equal(computed(load_checkpoint(str(source))), logits)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, ["'../model.safetensors'", "outside"]),
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, ["model-00001-of-00002.safetensors", "missing"]),
        ({"weight_map": {"a": 3}}, ["weight_map"]),
        ({}, ["weight_map"]),
    ],
    ids=str,
)
def test_damaged_index(index: dict[str, object], words: list[str], source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    message = refusal(source)
    for word in words:
        assert word in message


def test_an_adapter_is_no_checkpoint(source: Path) -> None:
    (source / "config.json").unlink()
    (source / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "--adapter" in refusal(source)


def test_an_adapter_config_beside_a_checkpoint_leads_nowhere(source: Path, logits: npt.NDArray[np.float32]) -> None:
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}', encoding="utf-8")
    assert np.array_equal(computed(load_checkpoint(str(source))), logits)


def test_the_model_knows_its_folder(source: Path) -> None:
    """Without it optimum asks the hub for the files beside the weights."""
    model = load_checkpoint(str(source)).model
    assert model.name_or_path == model.config.name_or_path == str(source)


def test_training_loads_weights_alike(source: Path) -> None:
    config = transformers.GPT2Config.from_pretrained(source)
    change(source, SAME["ddp-compile"])
    with quiet_torch():
        model = load_weights(source, config)
    assert torch.equal(model.transformer.wte.weight, load_checkpoint(str(source)).model.transformer.wte.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())
    change(source, drop("ln_f.bias"))
    with pytest.raises(TrainingError, match=r"lacks the weight .transformer\.ln_f\.bias."):
        load_weights(source, config)
