"""What tells one checkpoint's body from another's, however its vocabulary was cut."""

import hashlib
from typing import Any

import torch


def body_sha256(model: Any) -> str:
    """SHA-256 (hex) of the weights of a ``GPT2LMHeadModel`` in float32, but for the token table and the head.

    A learned prefix fits every bundle whose source has this body: `edgelm.prefix_file.write_learned_prefix`.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.transformer.state_dict().items()):
        if name != "wte.weight":
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().to(torch.float32).contiguous().numpy().data)
    return digest.hexdigest()
