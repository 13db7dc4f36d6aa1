"""One optimizer that trains the matrices of the blocks with Muon and all other parameters with AdamW.

It has a file of its own because it is an algorithm with sources, and the loop knows nothing of it but its name.
"""

from typing import Any

import torch


class MuonAdamW(torch.optim.Optimizer):  # type: ignore[misc]
    """Muon (Jordan et al. 2024) and AdamW.

    Muon replaces the momentum of a matrix by the nearest orthogonal matrix, and scales it to the size of AdamW's steps
    (Liu et al. 2025). So one learning rate suits both. AdamW trains the token and position tables, norms and biases of
    a ``transformers.GPT2LMHeadModel``. Norms and biases have no weight decay; `beta2` is AdamW's.
    """

    def __init__(self, model: Any, learning_rate: float, weight_decay: float, beta2: float) -> None:
        named = dict(model.named_parameters())
        matrices = [p for name, p in named.items() if p.ndim == 2 and ".h." in name]
        tables = [p for name, p in named.items() if p.ndim == 2 and ".h." not in name]
        vectors = [p for p in named.values() if p.ndim != 2]
        self._muon = torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(
            [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=learning_rate,
            betas=(0.9, beta2),
            fused=True,
        )
        super().__init__([{"params": [*matrices, *tables, *vectors]}], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Show the groups of both optimizers as groups of this one, so that a scheduler sets their learning rates."""
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure")
        self._muon.step()
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])
        self._share_groups()
