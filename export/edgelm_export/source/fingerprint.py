"""What tells one checkpoint from another, and its body however its vocabulary was cut."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch


def body_sha256(model: Any) -> str:
    """SHA-256 (hex) of the weights of a ``GPT2LMHeadModel`` in float32, but for the token table and the head.

    A learned prefix fits every bundle whose source has this body: `edgelm.reuse.prefix.write_learned_prefix`.
    """
    weights = model.transformer.state_dict()
    return _sha256({name: value for name, value in weights.items() if name != "wte.weight"})


def model_sha256(model: Any) -> str:
    """SHA-256 (hex) of all weights of a model in float32."""
    return _sha256(model.state_dict())


def _sha256(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().to(torch.float32).contiguous().numpy().data)
    return digest.hexdigest()
