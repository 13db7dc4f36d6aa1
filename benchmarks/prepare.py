"""Makes the models that are compared, all from one checkpoint, and keeps them for the next run.

    python -m benchmarks.prepare --work DIR

Benchmarks start it as a process of its own: exporting loads torch and takes gigabytes of memory, which must be free
again when the measuring begins. Nothing is downloaded.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path

import edgelm_export
from benchmarks import make_gpt2
from benchmarks.make_gpt2 import Shape, add_shape_options, shape_of
from edgelm.bundle.manifest import FORMAT_VERSION, FixedPrecision

DEFAULT_WORK = Path(tempfile.gettempdir()) / "edgelm-benchmark"
OPTIMUM = "optimum-int8"
GRAPH_ROOMS = ("graph", "model", "quantize")
"""Folders of `edgelm_export` whose code decides what is in a bundle's graph."""
PRECISIONS: tuple[FixedPrecision, ...] = ("int8", "w8a8", "int4", "int4-small")


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the folder of the models made from it."""

    name: str
    checkpoint: Path
    folder: Path
    made_by: str
    """Code and versions that the checkpoint depends on. When they change, all models are made again."""

    @property
    def is_gpt2(self) -> bool:
        config = json.loads((self.checkpoint / "config.json").read_text(encoding="utf-8"))
        return bool(config["model_type"] == "gpt2")


def random_source(work: Path, shape: Shape) -> Source:
    """The checkpoint of `shape` with random weights, which `prepare` makes."""
    folder = work / "gpt2-{}x{}-{}heads-{}vocabulary-{}context-seed{}".format(*astuple(shape))
    made_by = f"{versions('torch', 'transformers')}, make_gpt2 {hash_of(Path(make_gpt2.__file__))}"
    return Source(folder.name, folder / "checkpoint", folder, made_by)


def given_source(work: Path, checkpoint: Path) -> Source:
    """A checkpoint folder in Hugging Face layout."""
    weights = hash_of(checkpoint / "model.safetensors", checkpoint / "config.json")
    return Source(checkpoint.name, checkpoint, work / f"{checkpoint.name}-{weights}", f"weights {weights}")


def model_folder(work: Path, shape: Shape, name: str) -> Path:
    """Folder of a model with random weights.

    Args:
        work: folder that keeps all models.
        shape: shape of the model.
        name: "checkpoint", "optimum-int8", or "edgelm-" and a precision.
    """
    return random_source(work, shape).folder / name


def prepare(work: Path, shape: Shape, only: Collection[str] | None = None) -> None:
    """Make the models with random weights that are missing or were made by other code than today's.

    Args:
        work: folder that keeps all models.
        shape: shape of the models.
        only: names of the models to make; None for all.
    """
    source = random_source(work, shape)
    keep(source.checkpoint, source.made_by, lambda folder: make_gpt2.make_checkpoint(folder, shape))
    make_models(source, only)


def make_models(source: Source, only: Collection[str] | None = None) -> None:
    """Make the models of an existing checkpoint that are missing or were made by other code than today's."""
    if only is None or OPTIMUM in only:
        keep(
            source.folder / OPTIMUM,
            f"{source.made_by}, {versions('optimum-onnx', 'onnxruntime')}, prepare {hash_of(Path(__file__))}",
            lambda folder: _export_optimum(source.checkpoint, folder),
        )
    exporter = f"{source.made_by}, bundle format {FORMAT_VERSION}, edgelm_export {hash_of(*graph_modules())}"
    for precision in PRECISIONS:
        if only is None or f"edgelm-{precision}" in only:
            keep(
                source.folder / f"edgelm-{precision}",
                exporter,
                lambda folder, precision=precision: _export_edgelm(source.checkpoint, folder, precision),  # type: ignore[misc]
            )


def keep(folder: Path, made_by: str, make: Callable[[Path], object]) -> None:
    """Have `make` fill `folder`, unless it was filled under the same `made_by` before."""
    stamp = folder.with_name(f"{folder.name}.made-by")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == made_by:
        return
    stamp.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"making {folder}", file=sys.stderr)
    make(folder)
    stamp.write_text(made_by, encoding="utf-8")  # written last, so that an unfinished model is made again


def versions(*packages: str) -> str:
    """Names and installed versions of packages."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def hash_of(*files: Path) -> str:
    """Hash of the contents of files, 16 hexadecimal digits."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def graph_modules() -> list[Path]:
    """Source files that decide what is in a bundle's graph."""
    folder = Path(edgelm_export.__file__).parent
    return [path for room in GRAPH_ROOMS for path in sorted((folder / room).glob("*.py"))]


def _export_edgelm(checkpoint: Path, folder: Path, precision: FixedPrecision) -> None:
    from edgelm_export import fit
    from edgelm_export import pipeline as export

    # Few tokens, because random weights have no quality to measure and drawing text from them takes minutes.
    export.EVALUATION_TOKENS = fit.CALIBRATION_TOKENS = 512
    export.export(
        str(checkpoint),
        folder,
        precision,
        accept_quality_loss=True,  # random weights have no quality to lose
        report=lambda stage: print(f"  {stage}", file=sys.stderr),
    )


def _export_optimum(checkpoint: Path, folder: Path) -> None:
    """Export and quantize as optimum's documentation does, with the preset for AVX512-VNNI."""
    from optimum.onnxruntime import AutoQuantizationConfig, ORTModelForCausalLM, ORTQuantizer

    model = ORTModelForCausalLM.from_pretrained(checkpoint, export=True)
    preset = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    ORTQuantizer.from_pretrained(model).quantize(preset, save_dir=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the models that the other benchmarks compare.")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, metavar="DIR", help="default %(default)s")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint folder instead of random weights")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models to make, such as edgelm-int8; default all")
    add_shape_options(parser)
    options = parser.parse_args()
    if options.checkpoint:
        make_models(given_source(options.work, options.checkpoint), options.only)
    else:
        prepare(options.work, shape_of(options), options.only)


if __name__ == "__main__":
    main()
