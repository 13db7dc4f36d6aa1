"""Reads the files of weights in a folder. Pickles are read as weights only, so no code of theirs ever runs."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from edgelm.errors import ExportError
from edgelm_export.source.hub import POINTER, first_line, read_json

_SINGLE = ("model.safetensors", "pytorch_model.bin")
WEIGHT_FILES = tuple(name + end for name in _SINGLE for end in ("", ".index.json"))
"""Names of the weights' file, or of the index of its parts. The first file that exists is read, as in transformers."""

_NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which trainers put the weights inside a larger pickle."""
_FOREIGN = {
    "tf_model.h5": "TensorFlow",
    "*.ckpt.index": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "*.gguf": "GGUF",
    "rust_model.ot": "Rust",
    "*.onnx": "ONNX",
}


def read_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint, under the names in its files.

    Args:
        folder: of the checkpoint.
        name: name of the checkpoint, for messages.

    Raises:
        ExportError: the folder has no weights of PyTorch, or a file is missing, damaged, or something else.
    """
    chosen = next((file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if chosen is None:
        raise ExportError(f"cannot load the weights of {name!r}: {_no_weights(folder)}")
    if not chosen.endswith(".json"):
        return read_weights_file(folder / chosen, name)
    index = read_json(folder / chosen).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ExportError(f"cannot load the weights of {name!r}: {chosen} has no weight_map of file names")
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(set(index.values())):
        if Path(file).name != file:
            raise ExportError(f"cannot load the weights of {name!r}: {chosen} names {file!r} outside its folder")
        if not (folder / file).is_file():
            raise ExportError(f"cannot load the weights of {name!r}: the file {file}, which {chosen} names, is missing")
        weights |= read_weights_file(folder / file, name)
    return weights


def read_weights_file(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights in one safetensors file or one pickle.

    Args:
        path: of the file.
        name: name of the checkpoint or adapter, for messages.

    Raises:
        ExportError: the file is damaged, or contains something other than weights.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if trouble := _no_weights_file(head):
            raise ValueError(trouble)
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except Exception as error:  # safetensors, torch and pickle each raise their own kinds
        raise ExportError(f"cannot load the weights of {name!r}: {path.name}: {_sentence(error)}") from None


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        origin = (file.metadata() or {}).get("format")
        if origin in ("tf", "flax"):
            raise ValueError(f"it was saved from {origin}, whose layout edgelm does not read; save it from PyTorch")
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    while isinstance(content, Mapping) and (inner := _nested(content)) is not None:
        content = inner
    weights = {}
    if isinstance(content, Mapping):
        weights = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not weights or not all(isinstance(key, str) for key in weights):
        raise ValueError("it contains something other than weights")
    return weights


def _nested(content: Mapping[Any, Any]) -> Mapping[Any, Any] | None:
    """The weights inside a trainer's pickle; None where `content` itself has them."""
    inner = (content[key] for key in _NESTED if isinstance(content.get(key), Mapping))
    return next(inner, None)


def _sentence(error: Exception) -> str:
    """An error of torch, pickle or safetensors without the advice to run the code of a pickle."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it contains the Python object {found[1]}, and edgelm loads no objects; save it with save_pretrained"
    if "Weights only load failed" in str(error):
        return "it is damaged, or contains objects other than weights; save it with save_pretrained"
    return first_line(error)


def _no_weights_file(head: bytes) -> str | None:
    """What a file is that begins with these bytes, where people put such files in the place of weights."""
    if head.startswith(POINTER):
        return "it is a git-lfs pointer, not the file; run `git lfs pull` in its folder"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page, not the file; download it again"
    return None if head else "it is empty; download it again"


def _no_weights(folder: Path) -> str:
    looked = f"looked for {', '.join(WEIGHT_FILES)}"
    for pattern, library in _FOREIGN.items():
        if foreign := sorted(folder.glob(pattern)):
            if library == "GGUF":
                return f"the folder has the GGUF file {foreign[0].name}; export that file itself"
            return f"they are weights of {library} ({foreign[0].name}); save them as model.safetensors; {looked}"
    return f"the folder has none; {looked}"
