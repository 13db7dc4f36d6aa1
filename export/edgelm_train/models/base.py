"""The checkpoint that training starts from: a folder, hub id or GGUF file, or the folder of an adapter and its base.

What is wrong with a folder is found without torch, because a command looks before it loads torch.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.errors import ExportError, TrainingError
from edgelm_export.source.hub import GGUF_SUFFIX, folder_of, is_gguf, read_json

if TYPE_CHECKING:
    from edgelm_export.source.checkpoint import Checkpoint

_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Base:
    """Where a base lies: a checkpoint, and perhaps an adapter that was trained on it."""

    source: str
    """Folder, hub id or GGUF file of the checkpoint."""
    revision: str | None
    adapter: Path | None = None

    @property
    def context_length(self) -> int | None:
        """The context that config.json states; None where it cannot be known without loading."""
        fields = self._config()
        stated = (fields.get(name) for name in ("n_positions", "n_ctx", "max_position_embeddings"))
        return next((length for length in stated if type(length) is int and length > 0), None)

    @property
    def short_name(self) -> str:
        """The last part of where it lies, of an adapter that is merged if there is one, for the names of results."""
        return Path(self.adapter or self.source).name.removesuffix(GGUF_SUFFIX)

    def refuse_other_families(self, what: str) -> None:
        """Raise TrainingError, without torch, where config.json is that of no GPT-2. The message calls training `what`.

        Old GPT-2 checkpoints state many types, or none; but a GPT-2 calls its inner width n_inner.
        """
        fields = self._config()
        if fields.get("model_type") not in (None, "gpt2") and "intermediate_size" in fields:
            raise _other_type(what, self.source, fields["model_type"])

    def load_gpt2(self, what: str) -> "Checkpoint":
        """The checkpoint as by `load`; raises TrainingError, which calls training `what`, if it is no GPT-2."""
        self.refuse_other_families(what)
        checkpoint = self.load()
        if (kind := checkpoint.model.config.model_type) != "gpt2":
            raise _other_type(what, self.source, kind)
        return checkpoint

    def load(self, *, merged: bool = True) -> "Checkpoint":
        """The checkpoint, with the adapter merged into it unless `merged` is false.

        Raises:
            ExportError: the checkpoint or the adapter cannot be loaded.
        """
        from edgelm_export.source.adapter import merge_adapter
        from edgelm_export.source.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(self.source, self.revision)
        if self.adapter is None or not merged:
            return checkpoint
        return merge_adapter(checkpoint, str(self.adapter))

    def trainable(self, checkpoint: "Checkpoint") -> Any:
        """The model of `checkpoint`, which was loaded without the adapter, with the adapter beside it to go on with."""
        from edgelm_export.source.adapter import trainable_adapter

        assert self.adapter is not None
        return trainable_adapter(checkpoint, self.adapter)

    def _config(self) -> dict[str, Any]:
        """The content of config.json; empty where there is none to read."""
        path = Path(self.source, "config.json")
        return read_json(path) if path.is_file() else {}


def find_base(base: str, revision: str | None) -> Base:
    """Find the checkpoint `base`. The base of an adapter is the one that its adapter_config.json names.

    Raises:
        ExportError: `base` is no folder of a checkpoint, no hub id and no GGUF file.
        TrainingError: it is an adapter whose base is not here.
    """
    if is_gguf(base, revision):
        return Base(base, None)
    folder = folder_of(base, revision, "checkpoint")
    if folder is None:
        return Base(base, revision)
    if (folder / "bundle.json").exists():
        raise TrainingError(f"{base!r} is a bundle; training needs the checkpoint that it was made of")
    if (folder / "config.json").exists() or not (folder / _ADAPTER_CONFIG).exists():
        read_json(folder / "config.json")
        return Base(base, revision)
    config = read_json(folder / _ADAPTER_CONFIG)
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        message = f"{base!r} is an adapter, and its {_ADAPTER_CONFIG} names no base"
        raise TrainingError(f'{message}; write the base\'s folder into "base_model_name_or_path"')
    beside = folder.resolve().parent / Path(named).name
    is_there = Path(named).is_dir() or is_gguf(named, None)
    is_beside = (beside / "config.json").is_file() or is_gguf(str(beside), None)
    source = str(beside) if is_beside and not is_there else named
    try:
        found = find_base(source, config.get("revision") if source == named and not is_there else None)
    except ExportError:
        raise TrainingError(
            f"{base!r} is an adapter of {named!r}, which is not here; put the right folder or hub id into "
            f'"base_model_name_or_path" of its {_ADAPTER_CONFIG}'
        ) from None
    if found.adapter is not None:
        raise TrainingError(f"{base!r} is an adapter of the adapter {named!r}; merge that one into a checkpoint first")
    return replace(found, adapter=folder)


def _other_type(what: str, source: str, kind: object) -> TrainingError:
    return TrainingError(f"{what} takes GPT-2 only, and {source!r} is a model of the type {kind!r:.40}")
