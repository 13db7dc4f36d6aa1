"""Facts about this machine: the CPUs that this process may use, their name, and what they can compute exactly."""

import math
import os
import platform
import re
from pathlib import Path

from edgelm.engine.cgroup import cpu_limits
from edgelm.errors import pass_interrupts_on


def cpu_name() -> str:
    """The name of the processor as the system gives it, on Linux with family, model and stepping."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        numbers = ", ".join(f"{key} {facts[key]}" for key in ("cpu family", "model", "stepping"))
        return f"{facts['model name']} ({numbers})"
    except (OSError, KeyError) as error:
        pass_interrupts_on(error)
        return platform.processor() or platform.machine() or "unknown"


def system_name() -> str:
    """Operating system and machine type, such as "Linux x86_64"."""
    return f"{platform.system()} {platform.machine()}"


def default_threads() -> int:
    """Number of CPUs that this process may use: its affinity, limited by the quotas of its cgroups."""
    return min([usable_cpus(), *(max(1, math.ceil(quota.limit)) for quota in cpu_limits())])


def usable_cpus() -> int:
    """Number of CPUs in the affinity of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_x86() -> bool:
    """Whether this is a 64-bit x86 processor."""
    return platform.machine().lower() in ("x86_64", "amd64")


def cpu_flags() -> frozenset[str] | None:
    """The features of the processor as Linux names them; None where it does not tell."""
    try:
        content = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError as error:
        pass_interrupts_on(error)
        return None
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", content, re.MULTILINE)
    return None if match is None else frozenset(match[1].split())


def int8_products_may_saturate() -> bool:
    """Whether this may be an x86 CPU without VNNI, which adds products of uint8 and int8 in 16 bits."""
    flags = cpu_flags()
    return is_x86() and (flags is None or not {"avx512_vnni", "avx_vnni"} & flags)
