"""Hashes of weights: one that identifies a checkpoint, and one that ignores its vocabulary."""

import hashlib
from collections.abc import Mapping

import torch
import transformers


def body_sha256(model: transformers.PreTrainedModel) -> str:
    """SHA-256 (hex) of a model's weights in float32, without the token table and the head.

    A learned prefix fits every bundle whose source has this body: `edgelm.reuse.prefix.write_learned_prefix`.
    """
    body = model.base_model
    table = body.get_input_embeddings().weight
    tables = {name for name, value in body.named_parameters() if value is table}
    return _sha256({name: value for name, value in body.state_dict().items() if name not in tables})


def model_sha256(model: transformers.PreTrainedModel) -> str:
    """SHA-256 (hex) of all weights of a model in float32."""
    return _sha256(model.state_dict())


def _sha256(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().to(torch.float32).contiguous().numpy().data)
    return digest.hexdigest()
