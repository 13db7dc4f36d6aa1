"""How much more memory this process may take: what cgroups, the process's own limits, and the machine leave."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from edgelm.engine.cgroup import ROOT, memory_limits
from edgelm.errors import pass_interrupts_on


@dataclass(frozen=True, slots=True)
class Room:
    """How much more memory this process may take, and the limit that says so."""

    free_bytes: int
    limit: str
    counts_mapped_files: bool = False
    """RLIMIT_AS counts mapped files. The other limits count only memory that cannot be dropped and read again."""


def rooms(root: Path = ROOT) -> list[Room]:
    """What each known limit leaves. `root` is the root of the file system."""
    cgroups = [Room(int(limit.limit - limit.used), f"the cgroup limit {limit.file}") for limit in memory_limits(root)]
    return [*cgroups, *_process_rooms(root), *_machine_room(root)]


def _process_rooms(root: Path) -> list[Room]:
    """What the process's own limits leave, as far as the system tells what it uses of them."""
    if sys.platform == "win32":
        return []
    import resource

    found = []
    for name, field in (("RLIMIT_AS", "VmSize:"), ("RLIMIT_DATA", "VmData:")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY:
            used = status_bytes(field, root)
            found.append(Room(limit - used, name, counts_mapped_files=name == "RLIMIT_AS"))
    return found


def _machine_room(root: Path) -> list[Room]:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        facts = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return [Room(facts["MemAvailable"] + facts.get("SwapFree", 0), "this machine's available memory")]
    except (OSError, ValueError, KeyError, IndexError) as error:
        pass_interrupts_on(error)
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError) as error:  # Windows
        pass_interrupts_on(error)
        return []
    return [Room(total, "this machine's memory")] if total > 0 else []


def status_bytes(field: str, root: Path = ROOT) -> int:
    """An amount of memory from /proc/self/status; 0 where there is no such file or field."""
    try:
        status = (root / "proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))
    except (OSError, ValueError, IndexError, StopIteration) as error:
        pass_interrupts_on(error)
        return 0
