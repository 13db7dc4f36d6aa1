"""A virtual environment for every peer, filled from PyPI and kept for the next run.

Peers have conflicting dependencies (OpenVINO's converter and optimum-onnx need different versions of optimum), and a
peer's process should hold that peer alone.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_CACHE = Path(tempfile.gettempdir()) / "edgelm-peers"


@dataclass(frozen=True)
class Environment:
    """The packages of a peer. Versions are pinned, because a measured number belongs to one version."""

    name: str
    requirements: tuple[str, ...]
    build_variables: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Environment variables for pip, which control builds from source."""
    unwanted: tuple[str, ...] = ()
    """Dependencies to uninstall afterwards."""

    @property
    def version(self) -> str:
        """Version of the peer's own package."""
        return self.requirements[0].partition("==")[2]


class EnvironmentFailed(Exception):
    """A peer cannot be installed here. The message says why in one line."""


TORCH = "torch==2.13.0"  # a looser pin may fetch several GB of CUDA packages

LLAMA_CPP = Environment(
    "llama-cpp",
    ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0"),
    # Built here for this processor (GGML_NATIVE); pip's cache might have a wheel that was built otherwise. The parts
    # that only llama.cpp's own programs need are left out, which is more than half.
    {
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF "
        f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={Path(__file__).with_name('llama_cpp_library_only.cmake')}",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
        "PIP_NO_BINARY": "llama-cpp-python",
        "PIP_NO_CACHE_DIR": "1",
    },
)
OPENVINO = Environment("openvino", ("openvino-genai==2026.4.1.0",))
CTRANSLATE2 = Environment("ctranslate2", ("ctranslate2==4.8.5",))
ONNXRUNTIME_GENAI = Environment("onnxruntime-genai", ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"))
ONNXRUNTIME_GENAI_BUILDER = Environment(
    "onnxruntime-genai-builder",
    (*ONNXRUNTIME_GENAI.requirements, "onnx==1.23.2", "onnx-ir==1.1.0", "transformers==5.5.4", TORCH),
)
"""onnxruntime-genai with what its own model builder needs."""
CONVERTERS = Environment(
    "converters",
    ("optimum-intel[openvino]==2.2.0", "nncf==3.4.0", "ctranslate2==4.8.5", "transformers==5.5.4", TORCH),
    # PyPI's torchvision does not match a CPU build of torch, and then breaks transformers.
    unwanted=("torchvision",),
)
"""Makes the models of OpenVINO and CTranslate2."""


def python_of(environment: Environment, cache: Path) -> Path:
    """The interpreter of `environment`, which is built under `cache` if it is missing or has other versions.

    Raises:
        EnvironmentFailed: pip could not install it.
    """
    folder, stamp = cache / environment.name, cache / f"{environment.name}.made-by"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    made_by = "\n".join(
        [sys.version, *environment.requirements, *environment.unwanted, *environment.build_variables.values()]
    )
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == made_by:
        return python
    stamp.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    print(f"installing {', '.join(environment.requirements)} into {folder}", file=sys.stderr)
    log = cache / f"{environment.name}.log"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    commands = [[sys.executable, "-m", "venv", str(folder)], [*pip, "install", *environment.requirements]]
    if environment.unwanted:
        commands.append([*pip, "uninstall", "--yes", *environment.unwanted])
    with log.open("w", encoding="utf-8") as output:
        for command in commands:
            variables = {**os.environ, **environment.build_variables}
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=variables).returncode:
                raise EnvironmentFailed(f"its environment could not be built: {_last_line(log)} (whole log: {log})")
    stamp.write_text(made_by, encoding="utf-8")  # written last, so that an unfinished environment is built again
    return python


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no output"])[-1][:300]
