"""The activations of the MLP, as the operators of ONNX Runtime that compute them.

Shapes: B batch, T new tokens, F inner size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgelm_export.graph.writer import CONTRIB, LOCAL, OPSET, GraphWriter
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
        """Write the node that makes the output; returns the output's name.

        Args:
            operator: name of the operator.
            inputs: names of its inputs after the first, which is `x`.
            domain: of the operator.
            attributes: of the node.
        """
        return self.writer.node(operator, [self.x, *inputs], self.out, attributes, domain=domain)

    def constant(self, name: str, value: float) -> str:
        """Store a scalar of the activation's type; returns its full name."""
        return self.writer.weight(f"{self.out}.{name}", np.array(value, self.dtype))


Write = Callable[[Place], str]
"""Writes an activation at a place; returns the output's name."""


def _operator(name: str, domain: str = "", **attributes: float) -> Write:
    return lambda place: place.node(name, domain=domain, **attributes)


def _clip(low: float, high: float) -> Write:
    return lambda place: place.node("Clip", place.constant("low", low), place.constant("high", high))


def _function(name: str, *nodes: tuple[str, str, str], **constants: float) -> Write:
    """A local function of `x` (B, T, F), which makes `y`.

    Args:
        name: of the function.
        nodes: (operator, its inputs separated by blanks, its output) each.
        constants: scalars that the nodes may take as inputs.
    """

    def write(place: Place) -> str:
        made = [_constant(key, value, place.dtype) for key, value in constants.items()]
        made += [helper.make_node(operator, inputs.split(), [out]) for operator, inputs, out in nodes]
        opset = [helper.make_opsetid("", OPSET)]
        place.writer.function(helper.make_function(LOCAL, name, ["x"], ["y"], made, opset))
        return place.node(name, domain=LOCAL)

    return write


def _constant(name: str, value: float, dtype: npt.DTypeLike) -> onnx.NodeProto:
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


_WRITE: dict[str, Write] = {
    "tanh_gelu": _operator("FastGelu", CONTRIB),
    "erf_gelu": _operator("Gelu"),
    "clipped_gelu": _function("ClippedGelu", ("Gelu", "x", "gelu"), ("Clip", "gelu low high", "y"), low=-10, high=10),
    "quick_gelu": _operator("QuickGelu", CONTRIB, alpha=1.702),
    "silu": _operator("QuickGelu", CONTRIB, alpha=1.0),
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


def write_activation(writer: GraphWriter, activation: Activation, x: str, out: str, dtype: type[np.floating]) -> str:
    """Write an activation; returns the name of its output.

    Args:
        writer: where to write.
        activation: which one.
        x: name of the input, (B, T, F).
        out: name of the output.
        dtype: of the input and the output.
    """
    return _WRITE[ACTIVATIONS[activation.name]](Place(writer, x, out, dtype, activation.parameters))
