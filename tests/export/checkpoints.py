"""Random checkpoints of any family and shape, their exports, and what torch itself computes for them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgelm.bundle.certificate import Certificate, Footprint
from edgelm.bundle.manifest import FixedPrecision
from edgelm.engine.graph import Graph
from edgelm.engine.session import Session
from edgelm.errors import ExportError
from edgelm_export.certify.optimum_graph import OptimumGraph
from edgelm_export.pipeline import Exported, export
from edgelm_export.source.checkpoint import load_checkpoint

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ."
BYTE_TOKENS = 256


@dataclass(frozen=True)
class Shape:
    """A checkpoint to make: its sizes, how it is stored, and more fields of its config."""

    width: int = 32
    heads: int = 4
    layers: int = 2
    context: int = 64
    vocab: int = 300
    inner: int | None = None
    tied: bool = True
    stored: str = "safetensors"
    """"safetensors", "bin", "sharded", "sharded-bin", "hub" (the names the hub's gpt2 has) or "double-heads"."""
    dtype: str = "float32"
    pruned_heads: tuple[tuple[int, ...], ...] = ()
    """Heads to prune in each layer."""
    seed: int = 0
    family: str = "gpt2"
    """The ``model_type``."""
    kv_heads: int | None = None
    """Heads of keys and values, in families that group them; None for `heads`."""
    config: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """Every field that differs from the default."""
        usual = Shape()
        facts = {key: value for key, value in vars(self).items() if value != getattr(usual, key)}
        facts |= facts.pop("config", {})
        return "-".join(f"{key}={value}" for key, value in facts.items()) or "usual"


WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
"""Kinds of three layers, of which two see a window."""

SMALL_FAMILIES = {
    "llama": Shape(family="llama", width=48, heads=6, kv_heads=2, tied=False),  # head dim 8, padded to 16
    "mistral": Shape(family="mistral", width=48, heads=3, config={"sliding_window": 7}),
    "qwen2": Shape(
        family="qwen2", width=48, heads=6, kv_heads=3, dtype="float16"
    ),  # with biases of queries, keys and values
    "qwen3": Shape(family="qwen3", width=40, heads=4, kv_heads=2, config={"head_dim": 10}),  # norms of padded heads
    "granite": Shape(
        family="granite",
        width=48,
        heads=3,
        kv_heads=1,
        config={
            "embedding_multiplier": 6.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "attention_bias": True,
        },
    ),
    "gemma3_text": Shape(
        family="gemma3_text",
        width=40,
        heads=2,
        kv_heads=1,
        layers=3,
        config={"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 20, "layer_types": WINDOWS},
    ),
}
"""A small checkpoint of every family beside GPT-2, by its ``model_type``."""


def save_checkpoint(folder: Path, shape: Shape | None = None, **changes: Any) -> Path:
    """Write a checkpoint with seeded random weights, large enough that its logits are far from flat.

    Args:
        folder: where the checkpoint goes.
        shape: of the checkpoint; None for the defaults.
        changes: fields to set in the finished checkpoint's config; None removes a field.
    """
    shape = shape or Shape()
    torch.manual_seed(shape.seed)
    if shape.stored == "double-heads":
        model = transformers.GPT2DoubleHeadsModel(_config(shape)).eval()
    else:
        model = transformers.AutoModelForCausalLM.from_config(_config(shape)).eval()
    randomize(model)
    if shape.pruned_heads:
        model.prune_heads(dict(enumerate(shape.pruned_heads)))
    folder.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, shape.dtype)).save_pretrained(
        folder,
        safe_serialization=not shape.stored.endswith("bin"),
        max_shard_size="60KB" if shape.stored.startswith("sharded") else "5GB",
    )
    if shape.stored == "hub":
        _rename_like_the_hub(folder, shape)
    save_tokenizer(folder, shape.vocab)
    if changes:
        edit_json(folder / "config.json", **changes)
    return folder


def _config(shape: Shape) -> transformers.PretrainedConfig:
    special = None if shape.vocab < BYTE_TOKENS else 0
    common = {
        "vocab_size": shape.vocab,
        "bos_token_id": special,
        "eos_token_id": special,
        "tie_word_embeddings": shape.tied,
    }
    if shape.family == "gpt2":
        sizes = {
            "n_positions": shape.context,
            "n_embd": shape.width,
            "n_layer": shape.layers,
            "n_head": shape.heads,
            "n_inner": shape.inner,
        }
    else:
        sizes = {
            "max_position_embeddings": shape.context,
            "hidden_size": shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads or shape.heads,
            "intermediate_size": shape.inner or 2 * shape.width,
            "pad_token_id": None,
        }
    return transformers.AutoConfig.for_model(shape.family, **(common | sizes | shape.config))


def randomize(model: Any) -> None:
    """Weights under which every part of the model matters; the usual 0.02 gives nearly flat logits."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".ln_" in name or "norm" in name:
                # Gemma stores the difference from 1.
                mean = 1.0 if name.endswith("weight") and "Gemma" not in type(model).__name__ else 0.0
                value.normal_(mean=mean, std=0.3)
            elif value.ndim == 1:
                value.normal_(std=0.2)
            elif "wte" in name or "embed_tokens" in name or "lm_head" in name:
                value.normal_(std=3 / value.shape[1] ** 0.5)
            elif "wpe" in name:
                value.normal_(std=1 / value.shape[1] ** 0.5)
            else:  # GPT-2 stores its matrices as (inputs, outputs), the other families as (outputs, inputs)
                value.normal_(std=1.2 / value.shape[0 if "transformer.h." in name else 1] ** 0.5)


def _rename_like_the_hub(folder: Path, shape: Shape) -> None:
    """The hub's gpt2 was saved from the bare body: no prefix, no head, and the causal masks as buffers."""
    path = folder / "model.safetensors"
    weights = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    mask = torch.ones(shape.context, shape.context).tril()[None, None]
    masks = {f"h.{layer}.attn.bias": mask.clone() for layer in range(shape.layers)}
    save_file(weights | masks, path, metadata={"format": "pt"})


def save_tokenizer(folder: Path, vocab: int) -> None:
    """Write a tokenizer.json with a token for each byte, or for each letter where the vocabulary is too small."""
    if vocab >= BYTE_TOKENS:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    else:
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({c: i for i, c in enumerate(LETTERS[:vocab])}, unk_token="a")
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    # Without this file the model type decides the class, and GPT-2's class adds a token <|endoftext|>.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; None removes a field."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def refusal(source: Path) -> str:
    """The one sentence with which a checkpoint is refused."""
    with pytest.raises(ExportError) as caught:
        load_checkpoint(str(source))
    message = str(caught.value)
    assert "\n" not in message
    return message


class TorchModel:
    """The source as transformers loads it by itself, in float32 with eager attention."""

    def __init__(self, folder: Path) -> None:
        is_gpt2 = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "gpt2") == "gpt2"
        # A body of GPT-2's double heads, or with foreign architectures, is no AutoModelForCausalLM.
        kind = transformers.GPT2LMHeadModel if is_gpt2 else transformers.AutoModelForCausalLM
        self.model = kind.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True
        ).eval()

    def logits(self, ids: npt.ArrayLike) -> Logits:
        """Logits (T, V) of the text `ids` (T,)."""
        with torch.no_grad():
            found: Logits = self.model(torch.tensor(np.asarray(ids))[None]).logits[0].numpy()
        return found

    def greedy(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The likeliest continuation of `prompt`; every token computes the whole text again."""
        ids = list(prompt)
        for _ in range(new_tokens):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(prompt) :]


def greedy(session: Session, prompt: list[int], new_tokens: int) -> list[int]:
    """The session's likeliest continuation of `prompt`; every token is a step with the cache."""
    session.reset()
    tokens = [int(session.step(prompt).argmax())]
    while len(tokens) < new_tokens:
        tokens.append(int(session.step([tokens[-1]]).argmax()))
    return tokens


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint and its bundle."""

    shape: Shape
    source: Path
    exported: Exported
    torch: TorchModel

    @property
    def certificate(self) -> Certificate:
        """What the export measured."""
        return self.exported.certificate

    def session(self, threads: int = 1, *, batch_invariant: bool = False) -> Session:
        """A new session of the bundle."""
        return Graph.open(
            self.exported.bundle, device="cpu", threads=threads, batch_invariant=batch_invariant
        ).session()

    def text(self, seed: int = 0) -> Ids:
        """Random ids that fill the context."""
        return np.random.default_rng(seed).integers(0, self.shape.vocab, self.shape.context)


FOOTPRINT = Footprint("a test", "a test", "1.32.0", 1, 8, 8, 1.0, 1.0, 1)
"""Replaces the measurement in a process of its own, which the tests of the command line do."""


class TinyExport:
    """Makes and exports checkpoints, each of them once."""

    def __init__(self, folder: Path, tokens: int) -> None:
        self._folder = folder
        self._tokens = tokens
        self._sources: dict[str, Path] = {}
        self._references: dict[str, OptimumGraph] = {}
        self._done: dict[tuple[str, FixedPrecision, bool, bool], Tiny] = {}

    def __call__(
        self, shape: Shape, precision: FixedPrecision, *, two_stage_head: bool = False, int8_cache: bool = False
    ) -> Tiny:
        key = (shape.name, precision, two_stage_head, int8_cache)
        if key not in self._done:
            if shape.name not in self._sources:
                self._sources[shape.name] = save_checkpoint(self._folder / f"checkpoint-{len(self._sources)}", shape)
            source, output = self._sources[shape.name], self._folder / f"bundle-{len(self._done)}"

            def reference(model: Any, folder: Path) -> OptimumGraph:
                if shape.name not in self._references:
                    self._references[shape.name] = OptimumGraph(model, folder)
                return self._references[shape.name]

            with (
                mock.patch("edgelm_export.pipeline.OptimumGraph", reference),  # it does not depend on the precision
                mock.patch("edgelm_export.pipeline.EVALUATION_TOKENS", self._tokens),
                mock.patch("edgelm_export.fit.CALIBRATION_TOKENS", self._tokens),
                mock.patch("edgelm_export.certify.certificate.measure_footprint", lambda bundle: FOOTPRINT),
            ):
                # Random weights are harder to quantize than trained ones. The tests judge the loss themselves.
                exported = export(
                    str(source),
                    output,
                    precision,
                    two_stage_head=two_stage_head,
                    int8_cache=int8_cache,
                    accept_quality_loss=True,
                )
            self._done[key] = Tiny(shape, source, exported, TorchModel(source))
        return self._done[key]
