"""The compared engines, each with its environment, loader and model."""

from dataclasses import dataclass

from benchmarks.peers.environments import (
    CONVERTERS,
    CTRANSLATE2,
    LLAMA_CPP,
    ONNXRUNTIME_GENAI,
    ONNXRUNTIME_GENAI_BUILDER,
    OPENVINO,
    Environment,
)


@dataclass(frozen=True)
class Converter:
    """The command that makes a peer's model: `python -m module CHECKPOINT FOLDER *arguments`."""

    module: str
    arguments: tuple[str, ...] = ()
    environment: Environment | None = None
    """None for the environment of the benchmark itself, edgelm's build side."""


@dataclass(frozen=True)
class Peer:
    """An engine, a row of the tables."""

    bits: int
    """Bits of the weights, without the token table. Engines with equal bits are compared with each other."""
    loader: str
    model: str
    """Name of the model's folder; "checkpoint" is the source itself."""
    environment: Environment | None = None
    """None for the environment of the benchmark itself, edgelm with the extras `[cpu]` and `[export]`."""
    converter: Converter | None = None
    """None where `benchmarks.prepare` makes the model."""
    builder: Converter | None = None
    """Takes the place of the converter for all checkpoints but those of GPT-2; None for the same converter."""


OWN = "edgelm"
"""The names of edgelm's own rows begin with this."""

_HERE = "benchmarks.engines"
_PEERS = "benchmarks.peers.engines"
_CONVERT = "benchmarks.peers.convert"


def _llama_cpp(bits: int, file_type: str) -> Peer:
    converter = Converter(f"{_CONVERT}_llama_cpp", (file_type,), LLAMA_CPP)
    return Peer(bits, f"{_PEERS}:load_llama_cpp", f"llama-cpp-{file_type}", LLAMA_CPP, converter)


def _openvino(bits: int) -> Peer:
    converter = Converter(f"{_CONVERT}_openvino", (f"int{bits}",), CONVERTERS)
    return Peer(bits, f"{_PEERS}:load_openvino", f"openvino-int{bits}", OPENVINO, converter)


def _onnxruntime_genai(bits: int) -> Peer:
    converter = Converter(f"{_CONVERT}_onnxruntime_genai", (str(bits),))
    builder = Converter("benchmarks.peers.build_onnxruntime_genai", (str(bits),), ONNXRUNTIME_GENAI_BUILDER)
    loader = f"{_PEERS}:load_onnxruntime_genai"
    return Peer(bits, loader, f"onnxruntime-genai-int{bits}", ONNXRUNTIME_GENAI, converter, builder)


PEERS = {
    "edgelm int8": Peer(8, f"{_HERE}:load_edgelm", "edgelm-int8"),
    "edgelm w8a8": Peer(8, f"{_HERE}:load_edgelm", "edgelm-w8a8"),
    "OpenVINO GenAI int8": _openvino(8),
    "llama.cpp Q8_0": _llama_cpp(8, "Q8_0"),
    "onnxruntime-genai int8": _onnxruntime_genai(8),
    "CTranslate2 int8": Peer(
        8,
        f"{_PEERS}:load_ctranslate2",
        "ctranslate2-int8",
        CTRANSLATE2,
        Converter(f"{_CONVERT}_ctranslate2", (), CONVERTERS),
    ),
    "optimum int8": Peer(8, f"{_HERE}:load_optimum", "optimum-int8"),
    "edgelm int4": Peer(4, f"{_HERE}:load_edgelm", "edgelm-int4"),
    "edgelm int4-small": Peer(4, f"{_HERE}:load_edgelm", "edgelm-int4-small"),
    "OpenVINO GenAI int4": _openvino(4),
    "llama.cpp Q4_0": _llama_cpp(4, "Q4_0"),
    "onnxruntime-genai int4": _onnxruntime_genai(4),
    "transformers fp32": Peer(32, f"{_HERE}:load_transformers", "checkpoint"),
}
