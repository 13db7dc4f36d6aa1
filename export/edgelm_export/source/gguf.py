"""A GGUF file as a source: transformers reads it, and edgelm refuses what transformers would silently leave out."""

import io
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from edgelm.errors import ExportError
from edgelm_export.source.gguf_tokenizer import write_tokenizer
from edgelm_export.source.hub import first_line

_ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")
"""Of the architectures that transformers reads from GGUF files. A file of Gemma 3 lacks the scale of its attention."""
_ASSUMED = {"gpt2": {"context_length": 1024}, "qwen3": {"attention.key_length": 128}}
"""Facts that transformers does not read, and the value that it takes for each."""
_HARMLESS = re.compile(
    r"vocab_size|attention\.(key|value)_length|rope\.dimension_count|attention\.causal|rope\.scaling\.type"
)
"""Facts of a model that follow from others, or are checked here."""
_USUAL_ROTARY = ("none", "linear")
"""Values of ``rope.scaling.type`` that change nothing without a factor, which would be a key of its own."""


@contextmanager
def unpacked(file: Path, *, with_tokenizer: bool) -> Iterator[Path]:
    """The checkpoint in a GGUF file as a folder in Hugging Face layout, which exists inside the ``with`` block.

    Quantized weights become the floats that they stand for: 4 bytes of disk for a parameter.

    Args:
        file: the GGUF file.
        with_tokenizer: whether the file's own tokenizer is needed.

    Raises:
        ExportError: the file cannot be read, belongs to no family that edgelm exports, or has a fact or a weight that
            transformers does not read.
    """
    if find_spec("gguf") is None:
        raise ExportError(f"reading {str(file)!r} needs the package gguf: pip install 'edgelm[export]'")
    reader = _open(file)
    license_name, tokenizer_facts = _check(file, reader)
    load = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            # The stream takes a progress bar that nothing else silences.
            with _parsed_once(file, reader), redirect_stderr(io.StringIO()):
                model, facts = transformers.AutoModelForCausalLM.from_pretrained(
                    **load, dtype=torch.float32, output_loading_info=True
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(**load) if with_tokenizer else None
        except Exception as error:  # gguf, torch and transformers each raise their own kinds
            raise ExportError(f"transformers cannot read {str(file)!r}: {first_line(error)}") from None
        if missing := [key for key in facts["missing_keys"] if key != "lm_head.weight" or not _is_tied(model)]:
            raise ExportError(f"{str(file)!r} lacks the weight {sorted(missing)[0]!r}: it is incomplete")
        model.save_pretrained(folder)
        del model
        if tokenizer is not None:
            try:
                write_tokenizer(tokenizer, tokenizer_facts, folder)
            except ExportError as error:
                raise ExportError(f"{str(file)!r} has no usable tokenizer: {error}") from None
        if license_name is not None:
            (folder / "README.md").write_text(f"---\nlicense: {license_name}\n---\n", encoding="utf-8")
        yield folder


def _open(file: Path) -> Any:
    """The reader of the package gguf. It parses every token of the vocabulary, which takes seconds."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        reader.fields["general.architecture"].contents()
    except Exception as error:  # numpy and gguf each raise their own kinds for damaged files
        raise ExportError(f"{str(file)!r} is no whole GGUF file: {first_line(error)}") from None
    return reader


@contextmanager
def _parsed_once(file: Path, reader: Any) -> Iterator[None]:
    """Gives `reader` to transformers, which opens `file` four times: for the config, the weights and the tokenizer."""
    import gguf

    original = gguf.GGUFReader

    def opened(path: Any, *rest: Any) -> Any:
        return reader if not rest and Path(path).samefile(file) else original(path, *rest)

    gguf.GGUFReader = opened
    try:
        yield
    finally:
        gguf.GGUFReader = original


def _check(file: Path, reader: Any) -> tuple[str | None, dict[str, Any]]:
    """Refuse a file whose facts or weights transformers would not read, because it would compute something else.

    Returns the license that the file states, and its facts about its tokenizer.
    """
    architecture = str(reader.fields["general.architecture"].contents())
    if architecture not in _ARCHITECTURES:
        raise ExportError(
            f"{str(file)!r} has the architecture {architecture!r}; edgelm exports GGUF files of "
            f"{', '.join(_ARCHITECTURES)}"
        )
    known = GGUF_CONFIG_MAPPING[architecture]
    for name, value in _ASSUMED.get(architecture, {}).items():
        field = reader.fields.get(f"{architecture}.{name}")
        if field is not None and field.contents() != value:
            raise ExportError(
                f"{str(file)!r} states {architecture}.{name} {field.contents()}, but transformers "
                f"{transformers.__version__} takes it for {value}; export the checkpoint that the file was made of"
            )
    for name in reader.fields:
        fact = name.removeprefix(f"{architecture}.")
        if fact != name and known.get(fact) is None and not _HARMLESS.fullmatch(fact):
            raise ExportError(
                f"{str(file)!r} states {name}, which transformers {transformers.__version__} does not read; export the "
                "checkpoint that the file was made of"
            )
    scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
    if scaling is not None and scaling.contents() not in _USUAL_ROTARY:
        raise ExportError(f"{str(file)!r} scales its rotary embedding ({scaling.contents()!r}), which cannot be read")
    if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ExportError(
            f"{str(file)!r} has the frequencies of its rotary embedding as a tensor (rope_freqs.weight), which "
            f"transformers {transformers.__version__} does not read; export the checkpoint that the file was made of"
        )
    stated, prefix = reader.fields.get("general.license"), "tokenizer.ggml."
    tokenizer = {
        name.removeprefix(prefix): field.contents() for name, field in reader.fields.items() if name.startswith(prefix)
    }
    return None if stated is None else str(stated.contents()), tokenizer


def _is_tied(model: transformers.PreTrainedModel) -> bool:
    return bool(model.config.tie_word_embeddings)
