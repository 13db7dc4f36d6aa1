"""The MLP's activations: every one transformers knows, as the operators of ONNX Runtime that compute it.

F inner size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from onnx import helper, numpy_helper

from edgelm_export.graph.writer import CONTRIB, LOCAL, OPSET, GraphWriter


@dataclass(frozen=True)
class Activation:
    """One layer's activation."""

    name: str
    """As ``activation_function`` in ``config.json`` says it."""
    parameters: tuple[float, ...] = ()
    """What it learned: the slope of prelu; alpha_p, alpha_n, beta and eps of xielu."""


def collect_activation(name: str, module: Any) -> Activation:
    """Copy an activation out of a loaded model's MLP.

    Args:
        name: a key of `ACTIVATIONS`.
        module: the ``torch.nn.Module`` that computes it.
    """
    learned: tuple[torch.Tensor, ...] = ()
    if name == "prelu":
        learned = (module.weight,)
    if name == "xielu":
        positive, negative = torch.nn.functional.softplus(module.alpha_p), torch.nn.functional.softplus(module.alpha_n)
        learned = (positive, module.beta + negative, module.beta, module.eps)
    return Activation(name, tuple(value.detach().item() for value in learned))


def widen_activation(module: Any) -> None:
    """Give xielu parameters in float32 that make of it, to the last bits, what its own in bfloat16 do.

    It computes with its parameters in bfloat16, whatever type the rest of the model has; ONNX cannot.
    """
    if isinstance(module, transformers.activations.XIELUActivation):
        softplus = torch.nn.functional.softplus
        positive = softplus(module.alpha_p.data).double()
        negative = (module.beta + softplus(module.alpha_n.data)).double() - module.beta.double()
        for parameter, rounded in ((module.alpha_p, positive), (module.alpha_n, negative)):
            parameter.data = torch.log(torch.expm1(rounded)).float()
        module.beta, module.eps = module.beta.float(), module.eps.float()


@dataclass(frozen=True)
class Place:
    """Where an activation is written: its input (B, T, F), the name of its output, the type of both."""

    writer: GraphWriter
    x: str
    out: str
    dtype: type[np.floating]
    parameters: tuple[float, ...]

    def node(self, operator: str, *inputs: str, domain: str = "", **attributes: float) -> str:
        """The last node: it makes the output."""
        return self.writer.node(operator, [self.x, *inputs], self.out, attributes, domain=domain)

    def constant(self, name: str, value: float) -> str:
        """A scalar of the activation's type."""
        return self.writer.weight(f"{self.out}.{name}", np.array(value, self.dtype))


Write = Callable[[Place], str]


def _operator(name: str, domain: str = "", **attributes: float) -> Write:
    return lambda place: place.node(name, domain=domain, **attributes)


def _clip(low: float, high: float) -> Write:
    return lambda place: place.node("Clip", place.constant("low", low), place.constant("high", high))


def _function(name: str, *nodes: tuple[str, str, str], **constants: float) -> Write:
    """A local function of `x` (B, T, F); each node is (operator, its inputs with blanks between, its output)."""

    def write(place: Place) -> str:
        made = [_constant(key, value, place.dtype) for key, value in constants.items()]
        made += [helper.make_node(operator, inputs.split(), [out]) for operator, inputs, out in nodes]
        opset = [helper.make_opsetid("", OPSET)]
        place.writer.function(helper.make_function(LOCAL, name, ["x"], ["y"], made, opset))
        return place.node(name, domain=LOCAL)

    return write


def _constant(name: str, value: float, dtype: npt.DTypeLike) -> Any:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, dtype), name))


def _prelu(place: Place) -> str:
    return place.node("PRelu", place.writer.weight(f"{place.out}.slope", np.array(place.parameters, place.dtype)))


def _xielu(place: Place) -> str:
    names = ("alpha_p", "alpha_n", "beta", "eps")
    function = helper.make_function(
        LOCAL,
        "XIELU",
        ["x", *names],
        ["y"],
        [
            _constant("zero", 0, place.dtype),
            _constant("one", 1, place.dtype),
            helper.make_node("Mul", ["x", "x"], ["square"]),
            helper.make_node("Mul", ["square", "alpha_p"], ["above"]),
            helper.make_node("Min", ["x", "eps"], ["negative"]),
            helper.make_node("Exp", ["negative"], ["exp"]),
            helper.make_node("Sub", ["exp", "one"], ["expm1"]),
            helper.make_node("Sub", ["expm1", "x"], ["bend"]),
            helper.make_node("Mul", ["bend", "alpha_n"], ["below"]),
            helper.make_node("Greater", ["x", "zero"], ["is_positive"]),
            helper.make_node("Where", ["is_positive", "above", "below"], ["curve"]),
            helper.make_node("Mul", ["x", "beta"], ["line"]),
            helper.make_node("Add", ["curve", "line"], ["y"]),
        ],
        [helper.make_opsetid("", OPSET)],
    )
    place.writer.function(function)
    values = [place.constant(name, value) for name, value in zip(names, place.parameters, strict=True)]
    return place.node("XIELU", *values, domain=LOCAL)


_TANH_GELU, _ERF_GELU = _operator("FastGelu", CONTRIB), _operator("Gelu")  # they differ by up to 5e-4
_SILU = _operator("QuickGelu", CONTRIB, alpha=1.0)

_WRITE: dict[str, Write] = {
    "gelu_new": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_python_tanh": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_accurate": _TANH_GELU,
    "gelu": _ERF_GELU,
    "gelu_python": _ERF_GELU,
    "gelu_10": _function("ClippedGelu", ("Gelu", "x", "gelu"), ("Clip", "gelu low high", "y"), low=-10, high=10),
    "quick_gelu": _operator("QuickGelu", CONTRIB, alpha=1.702),
    "silu": _SILU,
    "swish": _SILU,
    "mish": _operator("Mish"),
    "relu": _operator("Relu"),
    "relu2": _function("ReluSquared", ("Relu", "x", "relu"), ("Mul", "relu relu", "y")),
    "relu6": _clip(0, 6),
    "leaky_relu": _operator("LeakyRelu", alpha=0.01),
    "prelu": _prelu,
    "sigmoid": _operator("Sigmoid"),
    "tanh": _operator("Tanh"),
    "linear": _operator("Identity"),
    "laplace": _function(  # (1 + erf((x - mu) / (sigma · √2))) / 2, Ma et al., Mega, arXiv 2209.10655
        "Laplace",
        ("Sub", "x mu", "centred"),
        ("Div", "centred width", "scaled"),
        ("Erf", "scaled", "erf"),
        ("Add", "erf one", "shifted"),
        ("Mul", "shifted half", "y"),
        mu=0.707107,
        width=0.282095 * 2**0.5,
        one=1,
        half=0.5,
    ),
    "xielu": _xielu,
}

ACTIVATIONS = frozenset(_WRITE)
"""All that can be exported: all of transformers 4.57."""


def write_activation(writer: GraphWriter, activation: Activation, x: str, out: str, dtype: type[np.floating]) -> str:
    """Write the activation of `x` (B, T, F).

    Args:
        out: the output's name.
        dtype: of the input and the output.
    """
    return _WRITE[activation.name](Place(writer, x, out, dtype, activation.parameters))
