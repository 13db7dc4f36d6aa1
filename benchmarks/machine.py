"""The machine that numbers are measured on: processor, versions, CPU time, memory."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from edgelm.engine.machine import cpu_name, system_name

PACKAGES = ("edgelm", "onnxruntime", "torch", "transformers", "optimum-onnx", "numpy")


def machine_facts() -> dict[str, str | int]:
    """Processor, system, and the versions of the compared packages."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "system": system_name(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def busy_cpu_seconds() -> float:
    """CPU time that all processes of the machine have used since it started; 0 where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
        user, nice, system, _, _, irq, softirq = (int(field) for field in fields[1:8])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, which the system cannot drop; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return 0
