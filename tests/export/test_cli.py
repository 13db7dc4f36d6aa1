"""``edgelm export`` as a person runs it, and the other commands on the bundle that it makes."""

import json
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgelm.bundle.folder import Bundle
from edgelm.loading import load
from edgelm_export.pipeline import export
from edgelm_export.source.tokenizer import load_tokenizer
from tests.conftest import CommandResult, RunCommand
from tests.export.checkpoints import Shape, TinyExport, edit_json, save_checkpoint

pytestmark = pytest.mark.export

SECONDS = r" \.\.\. \d+\.\d s"
STAGES = [
    r"loading torch, transformers and optimum",
    r"loading checkpoint",
    r"exporting the reference graph with optimum",
    r"drawing 10,000 tokens from the source to measure on",
    r"drawing 8,192 tokens from the source to calibrate on",
    r"smoothing",
    r"writing the graph",
    r"measuring speed and memory in a process of its own",
    r"measuring the bundle against the reference on the text drawn from the source at temperature 1, seed 0",
    r"writing the reference for measuring again",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export-cli")


@pytest.fixture(scope="module")
def exported(folder: Path) -> CommandResult:
    """A whole export in a process of its own: ``bundle`` out of ``checkpoint``."""
    source = save_checkpoint(folder / "checkpoint", Shape(layers=1, context=32, vocab=256))
    edit_json(source / "generation_config.json", guidance_scale=1.5)
    command = [sys.executable, "-m", "edgelm", "export", "checkpoint", "-o", "bundle"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=300)
    return CommandResult(done.returncode, done.stdout.decode(), done.stderr.decode())


def test_progress_goes_to_stderr_and_the_summary_to_stdout(exported: CommandResult) -> None:
    assert exported.status == 0, exported.stderr
    *stages, took, note = exported.stderr.splitlines()
    assert len(stages) == len(STAGES)
    for line, stage in zip(stages, STAGES, strict=True):
        assert re.fullmatch(stage + SECONDS, line), line
    assert re.match(r"took \d+\.\d s: \d+\.\d s \w+", took), took
    assert {r"loading torch, transformers and optimum"} <= set(re.split(r"(?:: |, )\d+\.\d s ", took)), took
    assert note.startswith("note: left out the generation setting guidance_scale=1.5")
    assert re.fullmatch(
        r"bundle: int8, \d+\.\d MB, perplexity x \d\.\d{4}, KL [\d.e-]+ nats, same top token \d+\.\d\d%; "
        r"gate \(perplexity ratio <= 1\.01\) passed\n",
        exported.stdout,
    )


def test_info_and_verify(exported: CommandResult, folder: Path, edgelm_command: RunCommand) -> None:
    bundle = str(folder / "bundle")
    info = edgelm_command("info", bundle, "--json")
    assert info.status == 0, info.stderr
    facts = json.loads(info.stdout)
    assert facts["recipe"]["name"] == "int8"
    assert facts["source"]["name"] == "checkpoint"
    assert facts["certificate"]["passed"] is True
    assert facts["certificate"]["texts"][0]["tokens"] >= 10_000
    footprint = facts["certificate"]["footprint"]
    assert 10_000_000 < footprint["peak_rss_bytes"] < 300_000_000  # that process has not loaded torch
    assert footprint["decode_tokens_per_second"] > 0
    verified = edgelm_command("verify", bundle)
    assert verified.status == 0, verified.stderr
    assert verified.stdout.startswith(f"ok: {len(facts['files']) + 1} files")


def test_files_are_those_of_a_bundle(exported: CommandResult, folder: Path) -> None:
    assert sorted(path.name for path in (folder / "bundle").iterdir()) == [
        "README.md",
        "bundle.json",
        "config.json",
        "generation_config.json",
        "model.onnx",
        "model.onnx.data",
        "reference.bin",
        "tokenizer.json",
        "tokenizer_config.json",
        "value_divisors.bin",
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["bundle", "checkpoint"]


def test_the_result_runs_without_the_build_side(exported: CommandResult, folder: Path) -> None:
    script = (
        "import sys\n"
        "from edgelm.cli import main\n"
        f"sys.argv = ['edgelm', 'run', '-m', {str(folder / 'bundle')!r}, '--json', '-n', '5', 'Hello']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'optimum', 'onnx', 'safetensors', 'edgelm_export'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert len(json.loads(done.stdout)["choices"][0]["token_ids"]) == 5


def test_help(edgelm_command: RunCommand) -> None:
    done = edgelm_command("export", "--help")
    assert done.status == 0
    for words in (
        "Usage: edgelm export [OPTIONS] SOURCE",
        "-o, --output FOLDER",
        "--precision [fp32|fp16|int8|w8a8|int4|int4-small]",
        "--prefix FILE",
        "[default: int8]",
        "--revision REV",
        "--accept-quality-loss",
        "edgelm export gpt2 -o gpt2-int8",
    ):
        assert words in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "args", [(), ("checkpoint",), ("checkpoint", "-o", "x", "--precision", "int3"), ("a", "b", "-o", "x")], ids=str
)
def test_usage_errors(args: tuple[str, ...], edgelm_command: RunCommand) -> None:
    done = edgelm_command("export", *args)
    assert done.status == 2
    assert "edgelm export --help" in done.one_line()


def test_refusal_is_one_line(folder: Path, exported: CommandResult, edgelm_command: RunCommand) -> None:
    for args in (
        (str(folder / "nowhere"), "-o", "out"),
        (str(folder / "bundle"), "-o", "out"),
        (str(folder / "checkpoint"), "-o", str(folder)),
    ):
        done = edgelm_command("export", *args)
        assert done.status == 1
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("edgelm: ")


def test_same_source_gives_the_same_bytes(exported: CommandResult, folder: Path, edgelm_command: RunCommand) -> None:
    done = edgelm_command("export", str(folder / "checkpoint"), "-o", str(folder / "again"))
    assert done.status == 0, done.stderr
    first, again = Bundle.read(folder / "bundle").manifest, Bundle.read(folder / "again").manifest
    # Two exports measure different speed and memory, which are in bundle.json and the model card.
    for name in sorted(first.files.keys() - {"README.md"}):
        assert (folder / "again" / name).read_bytes() == (folder / "bundle" / name).read_bytes(), name
    assert first.certificate is not None and again.certificate is not None
    assert replace(first.certificate, footprint=again.certificate.footprint) == again.certificate


def test_vocabulary_larger_than_the_tokenizer(tiny_export: TinyExport) -> None:
    # Vocabularies are often padded (50,257 to 50,304), and random weights do choose ids without a token.
    model = load(tiny_export(Shape(), "fp32").exported.bundle.path, device="cpu")
    size = load_tokenizer(model.bundle.path).vocab_size
    assert size < model.session.vocab_size == model.tokenizer.vocab_size
    choice = model.generate([290, 1, 2], max_new_tokens=60, eos_token_id=(), temperature=5.0, seed=0).choices[0]
    assert max(choice.token_ids) >= size
    assert choice.text == model.tokenizer.decode([i for i in choice.token_ids if i < size])


def test_an_export_of_a_folder_asks_no_network(
    tmp_path: Path, few_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(host: object, *arguments: object, **options: object) -> None:
        asked.append(host)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    source = save_checkpoint(tmp_path / "source", Shape(layers=1, context=32, vocab=256))
    export(str(source), tmp_path / "out", "fp32", accept_quality_loss=True)
    assert asked == []
