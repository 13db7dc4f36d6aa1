"""A refused or interrupted export leaves nothing behind; a refusal is one sentence that names the reason."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgelm.errors import ExportError
from edgelm_export.pipeline import export
from edgelm_export.quantize.budget import Budget
from edgelm_export.source.checkpoint import load_checkpoint
from tests.export.checkpoints import Shape, edit_json, save_checkpoint

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("few_tokens")]

SMALL = Shape(layers=1, context=16)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("pristine") / "checkpoint", SMALL)


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint to be damaged, in an empty folder."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


def refusal(source: Path | str, output: Path) -> str:
    """The sentence with which the export is refused, after a check that the export left nothing behind."""
    before = sorted(output.parent.rglob("*")) if output.parent.is_dir() else []
    with pytest.raises(ExportError) as caught:
        export(str(source), output, "fp32")
    assert (sorted(output.parent.rglob("*")) if output.parent.is_dir() else []) == before
    message = str(caught.value)
    assert "\n" not in message
    assert message
    return message


def test_arguments_that_exclude_each_other(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="two_stage_head goes with the name of a recipe, not with a budget"):
        export(str(source), tmp_path / "out", Budget(max_disk_bytes=10**9), two_stage_head=True)
    with pytest.raises(ExportError, match="prefix_dtype is given without a prefix"):
        export(str(source), tmp_path / "out", "fp32", prefix_dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


UNSUPPORTED: list[tuple[dict[str, object], list[str]]] = [
    ({"activation_function": "glu"}, ["activation", "'glu'", "gelu_new"]),
    ({"n_layer": 0}, ["no layers", "n_layer"]),
    ({"add_cross_attention": True}, ["cross attention", "add_cross_attention"]),
    ({"quantization_config": {"quant_method": "gptq"}}, ["quantized already", "quantization_config"]),
    (
        {"model_type": "aragpt2", "auto_map": {"AutoModelForCausalLM": "evil.M"}},
        ["auto_map", "'aragpt2'", "never runs"],
    ),
    ({"model_type": None, "auto_map": {"AutoConfig": "evil.C"}}, ["auto_map", "set model_type to 'gpt2'"]),
    ({"architectures": ["GPT2ForSequenceClassification"]}, ["GPT2ForSequenceClassification", "GPT2LMHeadModel"]),
]


@pytest.mark.parametrize(("changes", "words"), UNSUPPORTED, ids=[next(iter(c)) + str(w[0]) for c, w in UNSUPPORTED])
def test_unsupported_configs(source: Path, tmp_path: Path, changes: dict[str, object], words: list[str]) -> None:
    content = json.loads((source / "config.json").read_text(encoding="utf-8")) | changes
    (source / "config.json").write_text(json.dumps(content), encoding="utf-8")
    message = refusal(source, tmp_path / "out")
    for word in words:
        assert word in message


CODE = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}


@pytest.mark.parametrize("model_type", ["gpt2", "evil"])
def test_auto_map_runs_no_code(source: Path, tmp_path: Path, model_type: str) -> None:
    """transformers has classes for GPT-2, and takes them as long as nobody trusts the checkpoint's code."""
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    edit_json(source / "config.json", auto_map=CODE, model_type=model_type)
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    if model_type == "gpt2":
        assert export(str(source), tmp_path / "out", "fp32").notes == (
            "left out the checkpoint's own code (auto_map: AutoConfig, AutoModelForCausalLM, AutoTokenizer): "
            "transformers' classes take its place",
        )
    else:
        refusal(source, tmp_path / "out")
        edit_json(source / "config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
        (note,) = load_checkpoint(str(source)).notes
        assert "auto_map: AutoTokenizer" in note
    assert not (tmp_path / "ran").exists()


def test_context_too_short(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "checkpoint", Shape(layers=1, context=3))
    assert "context" in refusal(source, tmp_path / "out")


def test_no_such_folder(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("name", ["", "a b", "-x", "owner/name/more", "../up", "nul\0byte"])
def test_neither_folder_nor_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    refusal(name, tmp_path / "out")


def test_file_instead_of_folder(source: Path, tmp_path: Path) -> None:
    assert "is a file" in refusal(source / "model.safetensors", tmp_path / "out")


def test_folder_without_config(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    assert "config.json" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"null", b"\xff\xfe{}", b'{"model_type": ["gpt2"]}'])
def test_broken_config(source: Path, tmp_path: Path, content: bytes) -> None:
    (source / "config.json").write_bytes(content)
    refusal(source, tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [{"n_embd": "wide"}, {"n_embd": 31}, {"n_head": 3}, {"n_layer": "two"}, {"n_positions": -1}, {"vocab_size": 0}],
    ids=str,
)
def test_nonsense_sizes(source: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    edit_json(source / "config.json", **changes)
    refusal(source, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_truncated_weights(source: Path, tmp_path: Path, keep: float) -> None:
    path = source / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    assert "cannot load the weights of 'checkpoint'" in refusal(source, tmp_path / "out")


def test_no_weights(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    assert "cannot load the weights" in refusal(source, tmp_path / "out")


def test_pickled_code_is_not_run(source: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (source / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Evil()}, source / "pytorch_model.bin")
    assert "cannot load the weights" in refusal(source, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def change_weights(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def test_missing_weight(source: Path, tmp_path: Path) -> None:
    change_weights(source, lambda weights: weights.pop("transformer.h.0.mlp.c_fc.weight"))
    message = refusal(source, tmp_path / "out")
    assert "lacks the weight" in message
    assert "transformer.h.0.mlp.c_fc.weight" in message


def test_missing_head_of_an_untied_model(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "checkpoint", Shape(layers=1, context=16, tied=False))
    change_weights(source, lambda weights: weights.pop("lm_head.weight"))
    assert "lm_head.weight" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_damaged_numbers(source: Path, tmp_path: Path, bad: float) -> None:
    change_weights(source, lambda weights: weights["transformer.h.0.ln_1.bias"].__setitem__(3, bad))
    message = refusal(source, tmp_path / "out")
    assert "'transformer.h.0.ln_1.bias'" in message
    assert "NaN or infinity" in message


def test_sizes_that_do_not_fit_the_config(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", vocab_size=301)
    assert "cannot load the weights" in refusal(source, tmp_path / "out")


def test_no_tokenizer(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    assert "tokenizer" in refusal(source, tmp_path / "out")


def test_broken_tokenizer(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "tokenizer" in refusal(source, tmp_path / "out")


def test_bundle_as_source(source: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export(str(source), bundle, "fp32")
    assert "is a bundle already" in refusal(bundle, tmp_path / "out")


def test_revision_of_a_folder(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--revision 'main' belongs to a hub id"):
        export(str(source), tmp_path / "out", "fp32", revision="main")
    assert not (tmp_path / "out").exists()


def test_output_folder_not_empty(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("keep", encoding="utf-8")
    assert "not empty" in refusal(source, output)
    assert (output / "precious.txt").read_text(encoding="utf-8") == "keep"


def test_output_is_a_file(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_text("keep", encoding="utf-8")
    assert "is a file" in refusal(source, output)


def test_output_under_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep", encoding="utf-8")
    refusal(source, tmp_path / "file" / "out")


def test_output_is_a_broken_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    refusal(source, tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_output_where_nobody_may_write(source: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "cannot write" in refusal(source, locked / "out")


def test_empty_output_folder_is_used_and_parents_are_made(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert export(str(source), tmp_path / "empty", "fp32").certificate.passed
    assert export(str(source), tmp_path / "a" / "b" / "c", "fp32").certificate.passed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "checkpoint", "empty"]


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_missed_gate(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr("edgelm_export.certify.judgement.PERPLEXITY_GATES", {precision: 0.0})
    output = tmp_path / "out"
    with pytest.raises(ExportError, match=f"the {precision} bundle missed its gate .*--accept-quality-loss"):
        export(str(source), output, precision)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
    exported = export(str(source), output, precision, accept_quality_loss=True)  # type: ignore[arg-type]
    assert not exported.certificate.passed
    stored = exported.bundle.manifest.certificate
    assert stored == exported.certificate
    assert "**missed**" in (output / "README.md").read_text(encoding="utf-8")


def test_missed_fp32_gate(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelm_export.certify.judgement.FP32_LOGIT_GATE", 0.0)
    assert "missed its gate" in refusal(source, tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("stage", "number", "status"),
    [
        ("loading torch", signal.SIGINT, 130),
        ("exporting the reference", signal.SIGINT, 130),
        ("measuring", signal.SIGTERM, 143),
    ],
    ids=["loading torch", "exporting the reference", "measuring"],
)
def test_interrupted_export_leaves_nothing(source: Path, tmp_path: Path, stage: str, number: int, status: int) -> None:
    command = [sys.executable, "-m", "edgelm", "export", "checkpoint", "-o", "out", "--precision", "int8"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    assert process.stderr is not None
    seen = b""
    try:
        while stage.encode() not in seen:
            piece = process.stderr.read(1)
            assert piece, f"it ended before {stage!r}: {seen.decode()}"
            seen += piece
        process.send_signal(number)
        stdout, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    stderr = (seen + rest).decode()
    assert "Traceback" not in stderr, stderr
    assert "Error" not in stderr, stderr
    assert stdout == b""
    assert process.returncode == status, stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
