"""The activations of the MLP, as the operators of ONNX Runtime that compute them.

Shapes: B batch, T new tokens, F inner size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import helper

from edgelm.bundle.operators import CONTRIB, LOCAL, OPSET
from edgelm_export.graph.writer import GraphWriter, constant_node
from edgelm_export.model.activations import ACTIVATIONS, Activation


@dataclass(frozen=True)
class Place:
    """Where an activation is written."""

    writer: GraphWriter
    x: str
    """Name of the input, (B, T, F)."""
    out: str
    """Name of the output, (B, T, F)."""
    dtype: type[np.floating]
    """Of the input and the output."""
    parameters: tuple[float, ...]
    """Of the activation: `Activation.parameters`."""

    def node(self, operator: str, *inputs: str, domain: str = "", **attributes: float) -> str:
        """Write the node that makes the output of `x` and further `inputs`; returns the output's name."""
        return self.writer.node(operator, [self.x, *inputs], self.out, attributes, domain=domain)

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        """Store a constant of the activation's type; returns its full name."""
        return self.writer.weight(f"{self.out}.{name}", np.array(value, self.dtype))


Write = Callable[[Place], str]
"""Writes an activation at a place; returns the output's name."""


def _operator(name: str, domain: str = "", **attributes: float) -> Write:
    return lambda place: place.node(name, domain=domain, **attributes)


def _function(name: str, *nodes: tuple[str, str, str], parameters: tuple[str, ...] = (), **constants: float) -> Write:
    """A local function `name` of ``x`` (B, T, F) and the activation's `parameters`, which makes ``y``.

    Each of the `nodes` is an operator, its inputs separated by blanks, and its output. The inputs may be `constants`.
    """

    def write(place: Place) -> str:
        made = [constant_node(key, np.array(value, place.dtype)) for key, value in constants.items()]
        made += [helper.make_node(operator, inputs.split(), [out]) for operator, inputs, out in nodes]
        opset = [helper.make_opsetid("", OPSET)]
        place.writer.function(helper.make_function(LOCAL, name, ["x", *parameters], ["y"], made, opset))
        values = [place.constant(key, value) for key, value in zip(parameters, place.parameters, strict=True)]
        return place.node(name, *values, domain=LOCAL)

    return write


_WRITE: dict[str, Write] = {
    "tanh_gelu": _operator("FastGelu", CONTRIB),
    "erf_gelu": _operator("Gelu"),
    "clipped_gelu": _function("ClippedGelu", ("Gelu", "x", "gelu"), ("Clip", "gelu low high", "y"), low=-10, high=10),
    "quick_gelu": _operator("QuickGelu", CONTRIB, alpha=1.702),
    "silu": _operator("QuickGelu", CONTRIB, alpha=1.0),
    "mish": _operator("Mish"),
    "relu": _operator("Relu"),
    "relu2": _function("ReluSquared", ("Relu", "x", "relu"), ("Mul", "relu relu", "y")),
    "relu6": lambda place: place.node("Clip", place.constant("low", 0), place.constant("high", 6)),
    "leaky_relu": _operator("LeakyRelu", alpha=0.01),
    "prelu": lambda place: place.node("PRelu", place.constant("slope", place.parameters)),
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
    "xielu": _function(
        "XIELU",
        ("Mul", "x x", "square"),
        ("Mul", "square alpha_p", "above"),
        ("Min", "x eps", "negative"),
        ("Exp", "negative", "exp"),
        ("Sub", "exp one", "expm1"),
        ("Sub", "expm1 x", "bend"),
        ("Mul", "bend alpha_n", "below"),
        ("Greater", "x zero", "is_positive"),
        ("Where", "is_positive above below", "curve"),
        ("Mul", "x beta", "line"),
        ("Add", "curve line", "y"),
        parameters=("alpha_p", "alpha_n", "beta", "eps"),
        zero=0,
        one=1,
    ),
}


def write_activation(writer: GraphWriter, activation: Activation, x: str, out: str, dtype: type[np.floating]) -> str:
    """Write `activation` from the input `x` (B, T, F) of type `dtype` to the output `out`; returns the name `out`."""
    return _WRITE[ACTIVATIONS[activation.name]](Place(writer, x, out, dtype, activation.parameters))
