"""What the cgroups of this process allow (Linux, versions 1 and 2): CPUs, memory, and the number of threads.

A limit may stand in the process's own cgroup or in any cgroup above it, and all of them hold. cpusets are not read
here, because the affinity of the process already follows them. Every function takes the root of the file system.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from edgelm.bundle.small_files import is_folder
from edgelm.errors import pass_interrupts_on

Controller = Literal["cpu", "memory", "pids"]

ROOT = Path("/")
_UNLIMITED = 2**60
"""Version 1 writes "no limit" as a number near 2**63."""


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    """A limit in a cgroup's file, and how much of it is used."""

    file: Path
    limit: float
    """Bytes, CPUs or threads."""
    used: float
    """In the same unit: what the cgroup and those below it use now; 0 where no file says it. Not counted for CPUs."""


@dataclass(frozen=True, slots=True)
class _Mount:
    controllers: frozenset[str]
    """Names of the controllers of version 1; empty for version 2."""
    root: str
    """The cgroup that the mount point shows."""
    point: Path


def cpu_limits(root: Path = ROOT) -> list[CgroupLimit]:
    """The CPU quotas that hold for this process, in CPUs."""
    limits: list[CgroupLimit] = []
    for folder in cgroup_folders("cpu", root):
        quota, period = [*_words(folder / "cpu.max"), "", ""][:2]
        _add_cpus(limits, folder / "cpu.max", _whole(quota), _whole(period))
        file = folder / "cpu.cfs_quota_us"
        _add_cpus(limits, file, _number(file), _number(folder / "cpu.cfs_period_us"))
    return limits


def memory_limits(root: Path = ROOT) -> list[CgroupLimit]:
    """The memory limits that hold for this process. Cached file pages count as free unless they are mapped.

    Above ``memory.high`` the kernel kills nothing but makes every allocation wait, so it counts as a limit too.
    """
    limits = []
    for folder in cgroup_folders("memory", root):
        for limit_name, used_name, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.high", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            limit = _number(folder / limit_name)
            if limit is not None:
                used = (_number(folder / used_name) or 0) - _droppable_bytes(folder / "memory.stat", prefix)
                limits.append(CgroupLimit(folder / limit_name, limit, max(0, used)))
    return limits


def thread_limits(root: Path = ROOT) -> list[CgroupLimit]:
    """How many processes and threads the cgroups of this process may have."""
    limits = []
    for folder in cgroup_folders("pids", root):
        limit = _number(folder / "pids.max")
        if limit is not None:
            limits.append(CgroupLimit(folder / "pids.max", limit, _number(folder / "pids.current") or 0))
    return limits


def cgroup_folders(controller: Controller, root: Path = ROOT) -> list[Path]:
    """The folders of this process's cgroups that `controller` may limit: its own first, then those above it.

    Where /proc does not tell, these are the usual mount points.
    """
    mounts = _mounts(root, tuple(_lines(root / "proc/self/mountinfo")))
    folders: list[Path] = []
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller not in names.split(",") and (number, names) != ("0", ""):
            continue
        fitting = [mount for mount in mounts if (controller in mount.controllers if names else not mount.controllers)]
        if fitting:
            folders += _upwards(fitting, path)
    if not folders:
        folders = [root / "sys/fs/cgroup" / controller, root / "sys/fs/cgroup"]
    return folders


def _upwards(mounts: Sequence[_Mount], path: str) -> list[Path]:
    """The cgroup `path` and those above it, as far as one of `mounts`, of the same hierarchy, shows them."""
    holding = [mount for mount in mounts if _inside(mount.root, path) is not None]
    if holding:
        mount = max(holding, key=lambda mount: len(mount.root))
        inside = _inside(mount.root, path) or ""
    else:  # the path is that of the host, or of another cgroup namespace
        mount, inside = mounts[0], path
    parts = [part for part in inside.split("/") if part]
    if ".." in parts or not is_folder(mount.point.joinpath(*parts)):
        parts = []
    return [mount.point.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _inside(folder: str, path: str) -> str | None:
    """`path` relative to `folder`; None if it is outside."""
    folder = folder.rstrip("/")
    return path[len(folder) :] if path == folder or path.startswith(f"{folder}/") else None


@lru_cache(1)  # asked for each controller
def _mounts(root: Path, mountinfo: tuple[str, ...]) -> tuple[_Mount, ...]:
    """The mounted cgroups among the lines of mountinfo."""
    mounts = []
    for line in mountinfo:
        # id, parent, device, root, mount point, options, optional fields, "-", type, source, options of the type
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = frozenset(kind[2].split(",")) if kind[0] == "cgroup" else frozenset[str]()
        mounts.append(_Mount(controllers, _unescaped(fields[3]), root / _unescaped(fields[4]).lstrip("/")))
    return tuple(mounts)


def _unescaped(field: str) -> str:
    """A field of mountinfo, which writes a space as ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _add_cpus(limits: list[CgroupLimit], file: Path, quota: int | None, period: int | None) -> None:
    if quota is not None and period and quota > 0:
        limits.append(CgroupLimit(file, quota / period, 0))


def _droppable_bytes(stat: Path, prefix: str) -> int:
    """The cached file pages that the system can drop: the inactive ones, and active ones that no process has mapped."""
    facts = {name: _whole(value) or 0 for name, _, value in (line.partition(" ") for line in _lines(stat))}
    inactive, active, mapped = (
        facts.get(prefix + name, 0) for name in ("inactive_file", "active_file", _MAPPED[prefix])
    )
    return max(inactive, inactive + active - mapped)


_MAPPED = {"": "file_mapped", "total_": "mapped_file"}
"""The name of the same fact in version 2 and in version 1."""


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no such file, it cannot be read, or it states no limit."""
    words = _words(file)
    value = _whole(words[0]) if words else None
    return None if value is None or value >= _UNLIMITED else value


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def _words(file: Path) -> list[str]:
    return [word for line in _lines(file) for word in line.split()]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except (OSError, ValueError) as error:
        pass_interrupts_on(error)
        return []
