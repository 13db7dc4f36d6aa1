"""What this machine is called, for numbers that depend on it."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor's name as the system gives it, with family and model where Linux says them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        numbers = ", ".join(f"{key} {facts[key]}" for key in ("cpu family", "model", "stepping"))
        return f"{facts['model name']} ({numbers})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine() or "unknown"


def system_name() -> str:
    """Operating system and machine type, such as "Linux x86_64"."""
    return f"{platform.system()} {platform.machine()}"
