"""The checkpoint that training starts from: a folder or a hub id, or the folder of a LoRA adapter and its base.

What is wrong with a folder is found without torch, because a command looks before it loads torch.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.errors import ExportError, TrainingError
from edgelm_export.source.hub import folder_of, read_json

if TYPE_CHECKING:
    from edgelm_export.source.checkpoint import Checkpoint

_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Base:
    """Where a base lies: a checkpoint, and perhaps an adapter that was trained on it."""

    source: str
    """Folder or hub id of the checkpoint."""
    revision: str | None
    adapter: Path | None = None

    @property
    def context_length(self) -> int | None:
        """The context that config.json states; None where it cannot be known without loading."""
        path = Path(self.source, "config.json")
        fields = read_json(path) if path.is_file() else {}
        context = fields.get("n_positions", fields.get("n_ctx"))
        return context if type(context) is int and context > 0 else None

    def load(self, *, merged: bool = True) -> "Checkpoint":
        """The checkpoint, with the adapter merged into it unless `merged` is false.

        Raises:
            ExportError: the checkpoint or the adapter cannot be loaded.
            TrainingError: it is no GPT-2.
        """
        from edgelm_export.source.adapter import merge_adapter
        from edgelm_export.source.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(self.source, self.revision)
        kind = checkpoint.model.config.model_type
        if kind != "gpt2":
            raise _other_type(self.source, kind)
        if self.adapter is None or not merged:
            return checkpoint
        return merge_adapter(checkpoint, str(self.adapter))

    def trainable(self, checkpoint: "Checkpoint") -> Any:
        """The model of `checkpoint`, which was loaded without the adapter, with the adapter beside it to go on with."""
        from edgelm_export.source.adapter import trainable_adapter

        assert self.adapter is not None
        return trainable_adapter(checkpoint, self.adapter)


def find_base(base: str, revision: str | None) -> Base:
    """Find the checkpoint `base`. The base of an adapter is the one that its adapter_config.json names.

    Raises:
        ExportError: `base` is no folder of a checkpoint and no hub id.
        TrainingError: it is an adapter whose base is not here, or its config.json is that of no GPT-2.
    """
    folder = folder_of(base, revision, "checkpoint")
    if folder is None:
        return Base(base, revision)
    if (folder / "bundle.json").exists():
        raise TrainingError(f"{base!r} is a bundle; training needs the checkpoint that it was made of")
    if (folder / "config.json").exists() or not (folder / _ADAPTER_CONFIG).exists():
        fields = read_json(folder / "config.json")
        # Old GPT-2 checkpoints state many types, or none; but a GPT-2 calls its inner width n_inner.
        if fields.get("model_type") not in (None, "gpt2") and "intermediate_size" in fields:
            raise _other_type(base, fields["model_type"])
        return Base(base, revision)
    config = read_json(folder / _ADAPTER_CONFIG)
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        message = f"{base!r} is an adapter, and its {_ADAPTER_CONFIG} names no base"
        raise TrainingError(f'{message}; write the base\'s folder into "base_model_name_or_path"')
    beside = folder.resolve().parent / Path(named).name
    source = str(beside) if not Path(named).is_dir() and (beside / "config.json").is_file() else named
    try:
        found = find_base(source, config.get("revision") if source == named and not Path(named).is_dir() else None)
    except ExportError:
        raise TrainingError(
            f"{base!r} is an adapter of {named!r}, which is not here; put the right folder or hub id into "
            f'"base_model_name_or_path" of its {_ADAPTER_CONFIG}'
        ) from None
    if found.adapter is not None:
        raise TrainingError(f"{base!r} is an adapter of the adapter {named!r}; merge that one into a checkpoint first")
    return replace(found, adapter=folder)


def _other_type(source: str, kind: object) -> TrainingError:
    return TrainingError(f"training takes GPT-2 only, and {source!r} is a model of the type {kind!r:.40}")
