"""A task for a bundle that exists: a copy with the task in it, and nothing is computed again."""

import json
import os
from dataclasses import replace
from pathlib import Path

from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import PREFIX_FILE, TASK_FEATURE, TASK_FILE
from edgelm.bundle.small_files import MAX_TEXT_BYTES
from edgelm.bundle.whole_folder import move_into_place
from edgelm.decoding.generation_config import GenerationConfig
from edgelm.errors import ConfigError, ExportError
from edgelm.generation.task_format import TaskFormat
from edgelm.reuse.prefix import baked_prefix
from edgelm.text.tokenizer import Tokenizer
from edgelm_export.publish.card import model_card, quoted_card
from edgelm_export.publish.folder import seal, workshop
from edgelm_export.publish.task import plan_task

_CARD = "README.md"


def copy_with_task(bundle: Bundle, task: Path, output: Path) -> Bundle:
    """Write a copy of `bundle` into the folder `output`, with the task of the file `task` in place of its own.

    Every file is checked against its hash while it is copied. The model card says what the task does and scored.

    Raises:
        ExportError: the output is taken or not writable, or the bundle cannot do the task.
        BundleError: a file of the bundle is damaged.
    """
    planned, manifest, certificate = plan_task(task), bundle.manifest, bundle.manifest.certificate
    if certificate is None:
        raise ExportError(f"the bundle {bundle.name!r} has no quality certificate: export the checkpoint again")
    try:
        tokenizer, config = Tokenizer.of_bundle(bundle), GenerationConfig.of_bundle(bundle)
        TaskFormat.of_task(planned.task, bundle, tokenizer, config, f"the task {os.fspath(task)!r}")
    except ConfigError as error:
        raise ExportError(f"cannot use the task: {error}") from None
    kept = {name: fact for name, fact in manifest.files.items() if name not in (_CARD, TASK_FILE)}
    features = tuple(name for name in manifest.required_features if name != TASK_FEATURE)
    output = output.absolute()
    with workshop(output) as (draft, _):
        for name in kept:
            with (draft / name).open("wb") as stream:
                for block in bundle.blocks(name):
                    stream.write(block)
        (draft / TASK_FILE).write_bytes(planned.content)
        old_card = bundle.read_file(_CARD, MAX_TEXT_BYTES).decode("utf-8") if _CARD in manifest.files else ""
        model_type = json.loads((draft / "config.json").read_text(encoding="utf-8"))["model_type"]
        manifest = replace(manifest, files=kept, required_features=(*features, TASK_FEATURE))
        card = model_card(
            manifest,
            certificate,
            output.name,
            model_type,
            quoted_card(old_card),
            baked_prefix(bundle) if PREFIX_FILE in kept else None,
            planned.task,
        )
        (draft / _CARD).write_text(card, encoding="utf-8")
        seal(draft, manifest)
        move_into_place(draft, output)
    return Bundle.read(output)
