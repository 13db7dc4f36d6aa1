"""How a checkpoint lies on the disk: kinds of files of weights, links, odd names, odd JSON."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.against_transformers.combinations.draft import Draft

FOLDERS = ["checkpoint", "mein Modell", "модель-今天", "a.b-c_1", "v1.0 (final)", "x" * 60, "gpt2", "'quoted'"]
SNAPSHOT = "models--someone--some-gpt2/snapshots/0123456789abcdef0123456789abcdef01234567"
WEIGHTS = ["safetensors", "safetensors", "sharded", "bin", "old bin", "sharded bin", "safetensors beside a broken bin"]
JSON = [*["plain", "CRLF", "indented", "escaped", "UTF-8"] * 4, "BOM"]
EXTRAS = ["nothing", "nothing", "a card", "state of a trainer", "weights of other libraries", "links", "read-only"]


def draw_layout(rng: random.Random) -> dict[str, str]:
    """A random layout: the folder's name, the kind of weights, of JSON, and what else is there."""
    folder = SNAPSHOT if rng.random() < 0.1 else rng.choice(FOLDERS)
    return {
        "folder": folder,
        "weights": rng.choice(WEIGHTS),
        "json": rng.choice(JSON),
        "extra": rng.choice(EXTRAS),
    }


def write(draft: Draft, root: Path, layout: dict[str, str]) -> Path:
    """Write the draft's files under `root`; returns the checkpoint's folder."""
    folder = root / layout["folder"]
    folder.mkdir(parents=True)
    for name, content in {"config.json": draft.config, **draft.json_files}.items():
        (folder / name).write_bytes(_encoded(content, layout["json"]))
    for name, data in draft.other_files.items():
        is_text = name.endswith(".txt") and layout["json"] == "CRLF"
        (folder / name).write_bytes(data.replace(b"\n", b"\r\n") if is_text else data)
    _WRITERS[layout["weights"]](draft.weights, folder)
    _add(layout["extra"], folder)
    return folder


def _encoded(content: Any, kind: str) -> bytes:
    text = json.dumps(content, indent=None if kind == "plain" else 2, ensure_ascii=kind in ("plain", "escaped"))
    data = text.encode("utf-8", "surrogatepass")
    return {"CRLF": data.replace(b"\n", b"\r\n"), "BOM": b"\xef\xbb\xbf" + data}.get(kind, data)


def _safetensors(weights: dict[str, torch.Tensor], path: Path) -> None:
    save_file({key: value.clone() for key, value in weights.items()}, path, metadata={"format": "pt"})


def _single(weights: dict[str, torch.Tensor], folder: Path) -> None:
    _safetensors(weights, folder / "model.safetensors")


def _pickle(weights: dict[str, torch.Tensor], folder: Path) -> None:
    torch.save(weights, folder / "pytorch_model.bin")


def _old_pickle(weights: dict[str, torch.Tensor], folder: Path) -> None:
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _sharded(weights: dict[str, torch.Tensor], folder: Path) -> None:
    _shards(weights, folder, "model-{:05}-of-00003.safetensors", "model.safetensors.index.json", _safetensors)


def _sharded_pickle(weights: dict[str, torch.Tensor], folder: Path) -> None:
    _shards(weights, folder, "pytorch_model-{:05}-of-00003.bin", "pytorch_model.bin.index.json", torch.save)


def _shards(weights: dict[str, Any], folder: Path, pattern: str, index: str, save: Callable[[Any, Path], Any]) -> None:
    names = sorted(weights)
    files = {name: pattern.format(1 + i % 3) for i, name in enumerate(names)}
    for file in set(files.values()):
        save({name: weights[name] for name in names if files[name] == file}, folder / file)
    content = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / index).write_text(json.dumps(content), encoding="utf-8")


def _beside_broken(weights: dict[str, torch.Tensor], folder: Path) -> None:
    _single(weights, folder)
    (folder / "pytorch_model.bin").write_bytes(b"not weights at all")


_WRITERS: dict[str, Callable[[dict[str, torch.Tensor], Path], None]] = {
    "safetensors": _single,
    "sharded": _sharded,
    "bin": _pickle,
    "old bin": _old_pickle,
    "sharded bin": _sharded_pickle,
    "safetensors beside a broken bin": _beside_broken,
}

CARD = "---\nlicense: mit\nlanguage: [de, zh]\ntags:\n- text-generation\n---\n# Ein Modell 🎉\n\n<b>Text</b>\n"


def _add(kind: str, folder: Path) -> None:
    if kind == "a card":
        (folder / "README.md").write_text(CARD, encoding="utf-8")
        (folder / ".gitattributes").write_text("*.bin filter=lfs\n", encoding="utf-8")
    elif kind == "state of a trainer":
        for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
            (folder / name).write_bytes(b"\x80\x04")
        (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
        (folder / "checkpoint-500").mkdir()
    elif kind == "weights of other libraries":
        for name in ("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "onnx/decoder_model.onnx"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"other")
    elif kind == "links":  # as the hub's cache has it: names are links to blobs
        blobs = folder.parent / f"{folder.name}-blobs"
        blobs.mkdir()
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(blobs / str(number))
            path.symlink_to(Path("..") / blobs.name / str(number))
    elif kind == "read-only":
        for path in folder.iterdir():
            path.chmod(0o400)
        folder.chmod(0o500)
