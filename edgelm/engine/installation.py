"""Which packages are installed, and what ONNX Runtime says about itself. Nothing here imports ONNX Runtime."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgelm.bundle.small_files import status_of
from edgelm.engine import ort_probe
from edgelm.errors import pass_interrupts_on

_PROBE_SECONDS = 120


@dataclass(frozen=True, slots=True)
class OnnxRuntimeFacts:
    """What the installed ONNX Runtime says about itself."""

    error: str | None
    """Why it cannot be used; None if it can."""
    version: str = ""
    folder: str = ""
    providers: tuple[str, ...] = ()
    cuda: str | None = None
    """None where the package has no CUDA provider, "" where CUDA loads, otherwise the reason why it does not."""


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package that edgelm needs."""

    name: str
    version: str | None
    """None if it is not installed."""
    minimum: str | None
    """None if edgelm itself is not installed as a package, so that nothing states it."""

    @property
    def old(self) -> bool:
        """Whether it is older than edgelm needs."""
        return self.version is not None and self.minimum is not None and _numbers(self.version) < _numbers(self.minimum)


def onnxruntime_distributions() -> list[str]:
    """Installed distributions of the package ``onnxruntime``, with versions. Two would overwrite each other's files."""
    found = set()
    for distribution in metadata.distributions():
        name = (distribution.name or "").lower().replace("_", "-")
        if not re.match(r"(onnxruntime|ort)(-|$)", name):
            continue
        files = distribution.read_text("RECORD") or ""
        if re.search(r"^onnxruntime/", files, re.MULTILINE):
            found.add(f"{name} {distribution.version}")
    return sorted(found)


def needed_packages() -> list[Package]:
    """The packages that edgelm itself depends on, ONNX Runtime excepted."""
    minimums: dict[str, str | None] = dict.fromkeys(("click", "numpy", "safetensors", "tokenizers"))
    try:
        for requirement in metadata.requires("edgelm") or []:
            if match := re.fullmatch(r"([\w-]+)\s*>=\s*([\d.]+)", requirement):
                minimums[match[1]] = match[2]
    except metadata.PackageNotFoundError:
        pass
    return [Package(name, _version(name), minimum) for name, minimum in sorted(minimums.items())]


def ask_onnxruntime() -> OnnxRuntimeFacts:
    """Import ONNX Runtime in a child process and ask it; in this process where there can be no child."""
    program = Path(ort_probe.__file__)
    if getattr(sys, "frozen", False) or status_of(program) is None:  # the interpreter is the program itself
        return _read(ort_probe.facts())
    path = os.pathsep.join(folder for folder in sys.path if folder)
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(program)],
            env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8:backslashreplace"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return OnnxRuntimeFacts(f"does not load within {_PROBE_SECONDS} s")
    except OSError as error:
        pass_interrupts_on(error)
        return _read(ort_probe.facts())
    messages = done.stderr.decode("utf-8", "replace")
    try:
        facts = json.loads(done.stdout.decode("utf-8").splitlines()[-1])
    except (ValueError, IndexError) as error:
        pass_interrupts_on(error)
        last = (messages.strip().splitlines() or ["no message"])[-1]
        return OnnxRuntimeFacts(f"ends the process that imports it, with status {done.returncode}: {last}")
    if facts.get("cuda"):
        facts["cuda"] = missing_library(messages) or facts["cuda"]
    return _read(facts)


def missing_library(messages: str) -> str | None:
    """The reason for which a library did not load, out of ONNX Runtime's messages; None if they name none."""
    match = re.search(r"\S+: cannot open shared object file[^\n\x1b]*|(?:libcu\w+|CUDA \w+)[^\n\x1b]*", messages)
    return match[0].strip() if match else None


def _read(facts: dict[str, object]) -> OnnxRuntimeFacts:
    if "error" in facts:
        return OnnxRuntimeFacts(" ".join(str(facts["error"]).split()))
    providers = facts["providers"]
    cuda = facts["cuda"]
    assert isinstance(providers, list)
    return OnnxRuntimeFacts(
        None,
        str(facts["version"]),
        str(facts["folder"]),
        tuple(map(str, providers)),
        None if cuda is None else " ".join(str(cuda).split()),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    return [*map(int, re.findall(r"\d+", version)[:3]), 0, 0, 0][:3]
