"""A checkpoint, from the hub or a folder: fetched, checked, loaded. What edgelm cannot export is refused by name."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from edgelm.errors import ExportError, TokenizerError
from edgelm.text.tokenizer import Tokenizer
from edgelm_export.graph.activations import ACTIVATIONS, widen_activation
from edgelm_export.source.hub import first_line, locate, read_json
from edgelm_export.source.tokenizer import TOKENIZER_FILES, load_tokenizer

_MAX_CARD_CHARACTERS = 100_000


@dataclass(frozen=True)
class Checkpoint:
    """A loaded source: the torch model in float32 with eager attention, its tokenizer and its papers."""

    name: str
    """Hub id, or the folder's name."""
    revision: str | None
    license: str | None
    card: str
    """The source's own model card without its front matter; empty where it has none."""
    model: Any
    """A ``transformers.GPT2LMHeadModel`` in eval mode."""
    tokenizer: Tokenizer
    config_json: str
    generation_settings: dict[str, object]
    """The source's ``generation_config.json``, or what its ``config.json`` says instead."""
    parameters: int
    """How many numbers the source has learned."""
    vocab_size: int
    """Rows of the source's token table, before any were pruned."""
    adapter: str | None = None
    """Name of the adapter that was merged into `model`, with its commit where it came from the hub."""
    notes: tuple[str, ...] = ()
    """What the person should know."""


def load_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Load a GPT-2 checkpoint.

    Args:
        source: a folder in Hugging Face layout, or a hub id such as "gpt2".
        revision: a branch, tag or commit of a hub id.

    Raises:
        ExportError: the source is missing, is no GPT-2, uses what edgelm does not export, or is damaged.
    """
    folder, name, commit = locate(source, revision, _files_to_fetch, "checkpoint")
    if (folder / "bundle.json").exists():
        raise ExportError(f"{source!r} is a bundle already; export needs the original checkpoint")
    license_name, card = _card(folder)
    config = read_json(folder / "config.json")
    _refuse_unsupported(config, name)
    model = _load_model(folder, name)
    try:
        with quiet_torch():
            tokenizer = load_tokenizer(folder)
    except TokenizerError as error:
        raise ExportError(f"{name!r} has no usable tokenizer: {error}") from None
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ExportError(
            f"{name!r}: its tokenizer knows {tokenizer.vocab_size} tokens, its model only {model.config.vocab_size}"
        )
    return Checkpoint(
        name=name,
        revision=commit,
        license=license_name,
        card=card,
        model=model,
        tokenizer=tokenizer,
        config_json=(folder / "config.json").read_text(encoding="utf-8"),
        generation_settings=_generation_settings(folder, config),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=model.config.vocab_size,
    )


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Keeps the warnings and progress bars of torch, transformers and optimum off the terminal."""
    transformers.utils.logging.disable_progress_bar()
    levels = {name: logging.getLogger(name).level for name in ("transformers", "optimum", "torch.onnx")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _files_to_fetch(names: set[str]) -> set[str]:
    weights = {name for name in names if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)}
    if not weights:
        weights = {n for n in names if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?", n)}
    return {"README.md", "config.json", "generation_config.json"} | TOKENIZER_FILES | weights


def _card(folder: Path) -> tuple[str | None, str]:
    """The license the source's model card names in its front matter, and the card's text after it."""
    path = folder / "README.md"
    if not path.is_file():
        return None, ""
    text = path.read_text(encoding="utf-8", errors="replace")[:_MAX_CARD_CHARACTERS]
    front, body = "", text
    if match := re.match(r"---\n(.*?)\n---\n", text, re.DOTALL):
        front, body = match[1], text[match.end() :]
    license_line = re.search(r"^license:\s*['\"]?([\w.-]+)['\"]?\s*$", front, re.MULTILINE)
    return (license_line[1] if license_line else None), body.strip()


def _refuse_unsupported(config: dict[str, Any], name: str) -> None:
    kind = config.get("model_type")
    if kind != "gpt2":
        raise ExportError(f"{name!r} is a {kind!r} model; edgelm exports GPT-2 (model_type 'gpt2') only")
    architectures = config.get("architectures")
    if architectures and "GPT2LMHeadModel" not in architectures and "GPT2DoubleHeadsModel" not in architectures:
        raise ExportError(f"{name!r} is a {architectures[0]}, which generates no text; export needs a GPT2LMHeadModel")
    activation = config.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise ExportError(
            f"{name!r} uses the activation {activation!r}, which transformers {transformers.__version__} does not "
            f"know; edgelm exports {', '.join(sorted(ACTIVATIONS))}"
        )
    if config.get("n_layer", config.get("num_hidden_layers")) == 0:
        raise ExportError(f"{name!r} has no layers (n_layer 0): there is nothing to export")
    if config.get("add_cross_attention"):
        raise ExportError(f"{name!r} has cross attention (add_cross_attention), which edgelm does not export")
    if config.get("quantization_config"):
        raise ExportError(f"{name!r} is quantized already (quantization_config); export needs the float checkpoint")
    if config.get("auto_map"):
        raise ExportError(f"{name!r} brings code of its own (auto_map), which edgelm never runs")


def _load_model(folder: Path, name: str) -> Any:
    try:
        with quiet_torch():
            model, loading = transformers.GPT2LMHeadModel.from_pretrained(
                folder,
                # The default attention ignores scale_attn_by_inverse_layer_idx and scale_attn_weights=False.
                attn_implementation="eager",
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                weights_only=True,
            )
    except Exception as error:  # safetensors, torch and transformers each raise their own kinds
        raise ExportError(f"cannot load the weights of {name!r}: {first_line(error)}") from None
    for block in model.transformer.h:
        widen_activation(block.mlp.act)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ExportError(f"{name!r} lacks {len(missing)} weights, the first is {missing[0]!r}: it is incomplete")
    restore_pruned_heads(model)
    bad = [key for key, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise ExportError(f"the weight {bad[0]!r} of {name!r} holds NaN or infinity: it is damaged")
    return model.eval().requires_grad_(False)


def _generation_settings(folder: Path, config: dict[str, Any]) -> dict[str, object]:
    path = folder / "generation_config.json"
    if path.is_file():
        return read_json(path)
    return {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}


def restore_pruned_heads(model: Any) -> None:
    """Give every layer of a ``GPT2LMHeadModel`` all its heads again; a head of zeros adds nothing, exactly."""
    heads = model.config.n_head
    for block in model.transformer.h:
        attention = block.attn
        kept = [head for head in range(heads) if head not in attention.pruned_heads]
        if len(kept) == heads:
            continue
        dim = attention.head_dim
        attention.c_attn.weight.data = _spread(attention.c_attn.weight.data, kept, heads, dim)  # (D, 3·H·h)
        attention.c_attn.bias.data = _spread(attention.c_attn.bias.data[None], kept, heads, dim)[0]  # (3·H·h,)
        attention.c_proj.weight.data = _spread(attention.c_proj.weight.data.T, kept, heads, dim).T.contiguous()
        attention.c_attn.nf = 3 * attention.embed_dim
        attention.split_size, attention.num_heads, attention.pruned_heads = attention.embed_dim, heads, set()
    model.config.pruned_heads = {}


def _spread(columns: torch.Tensor, kept: list[int], heads: int, head_dim: int) -> torch.Tensor:
    """Columns (N, G·K·h) of G groups, with zeros where heads are missing: (N, G·H·h)."""
    cut = columns.reshape(len(columns), -1, len(kept), head_dim)  # (N, G, K, h)
    full = cut.new_zeros(*cut.shape[:2], heads, head_dim)
    full[:, :, kept] = cut
    return full.reshape(len(columns), -1)
