"""Which activation a config means: every name that transformers 4.57 knows, and what a checkpoint learned for it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor
from torch.nn.functional import softplus

ACTIVATIONS = {
    "gelu_new": "tanh_gelu",
    "gelu_pytorch_tanh": "tanh_gelu",
    "gelu_python_tanh": "tanh_gelu",
    "gelu_fast": "tanh_gelu",
    "gelu_accurate": "tanh_gelu",
    "gelu": "erf_gelu",  # differs from tanh_gelu by up to 5e-4
    "gelu_python": "erf_gelu",
    "gelu_10": "clipped_gelu",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "leaky_relu": "leaky_relu",
    "prelu": "prelu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "linear": "linear",
    "laplace": "laplace",
    "xielu": "xielu",
}
"""The function that each name in a config stands for. `edgelm_export.graph.activations` writes these functions."""


@dataclass(frozen=True)
class Activation:
    """The activation of one layer's MLP."""

    name: str
    """A key of `ACTIVATIONS`, as the config spells it."""
    function: Callable[[Tensor], Tensor] = field(compare=False)
    """The ``torch.nn.Module`` that computes it in the checkpoint's model."""
    parameters: tuple[float, ...] = ()
    """What training adjusts: the slope of prelu; alpha_p, alpha_n, beta and eps of xielu."""


def collect_activation(name: str, module: torch.nn.Module) -> Activation:
    """Describe the activation `name`, a key of `ACTIVATIONS`, which `module` of a loaded model computes."""
    learned: tuple[Tensor, ...] = ()
    if name == "prelu":
        learned = (module.weight,)
    elif name == "xielu":
        learned = (softplus(module.alpha_p), module.beta + softplus(module.alpha_n), module.beta, module.eps)
    return Activation(name, module, tuple(value.detach().item() for value in learned))


def widen_activation(module: torch.nn.Module) -> None:
    """Give xielu float32 parameters that compute, up to the last bits, what its bfloat16 parameters compute.

    xielu computes with its parameters in bfloat16, whatever dtype the model has; ONNX cannot.
    """
    if isinstance(module, transformers.activations.XIELUActivation):
        positive = softplus(module.alpha_p.data).double()
        negative = (module.beta + softplus(module.alpha_n.data)).double() - module.beta.double()
        for parameter, rounded in ((module.alpha_p, positive), (module.alpha_n, negative)):
            parameter.data = torch.log(torch.expm1(rounded)).float()
        module.beta, module.eps = module.beta.float(), module.eps.float()
