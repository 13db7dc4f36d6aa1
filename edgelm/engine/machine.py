"""Facts about this machine: the CPUs that this process may use, their name, and what they can compute exactly."""

import math
import os
import platform
import re
from pathlib import Path

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
    """Number of CPUs that this process may use: its affinity, limited by the quota of its cgroup."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cpus()
    return max(1, min(allowed, math.ceil(quota)) if quota else allowed)


def int8_products_may_saturate() -> bool:
    """Whether this may be an x86 CPU without VNNI, which adds products of uint8 and int8 in 16 bits."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError) as error:
        pass_interrupts_on(error)
        return True
    return flags is None or not {"avx512_vnni", "avx_vnni"} & set(flags[1].split())


def _cgroup_cpus() -> float | None:
    """Number of CPUs that the cgroup grants (version 2, then 1); None without a limit or outside Linux."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError) as error:
        pass_interrupts_on(error)
        pass
    try:
        folder = Path("/sys/fs/cgroup/cpu")
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        return quota_us / int((folder / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    except (OSError, ValueError, ZeroDivisionError) as error:
        pass_interrupts_on(error)
        return None
