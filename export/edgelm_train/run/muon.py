"""One optimizer that trains the matrices of the blocks with Muon and all other parameters with AdamW.

It has a file of its own because it is an algorithm with sources, and the loop knows nothing of it but its name.
"""

import math
import time
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.95


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly the nearest orthogonal matrix: that of `matrix` with all singular values between about 0.7 and 1.2.

    The Newton-Schulz iteration of Jordan et al. On a CPU it stays in float32, because many processors multiply bfloat16
    ten times slower, and torch.optim.Muon knows bfloat16 only.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class _Muon(torch.optim.Optimizer):  # type: ignore[misc]
    """Muon of matrices, with Nesterov's momentum and decoupled weight decay."""

    def __init__(self, matrices: list[torch.Tensor], learning_rate: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"]
                momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
                update = orthogonal(matrix.grad.lerp(momentum, _MOMENTUM))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                # As large as AdamW's steps (Liu et al.).
                matrix.add_(update, alpha=-0.2 * math.sqrt(max(matrix.shape)) * group["lr"])


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
        self._muon = _Muon(matrices, learning_rate, weight_decay)
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


def muon_seconds(model: Any) -> float:
    """The seconds that one step of `MuonAdamW` takes. Weights stay as they are; gradients are dropped."""
    optimizer = MuonAdamW(model, learning_rate=0.0, weight_decay=0.0, beta2=0.95)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    seconds = []
    for _ in range(2):  # the first step makes the optimizer's state
        began = time.perf_counter()
        optimizer.step()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    return min(seconds)
