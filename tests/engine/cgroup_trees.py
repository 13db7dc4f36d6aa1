"""Trees of files as /proc and /sys show them, made by hand."""

from pathlib import Path


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """Write `files`, paths below `root` with their contents; returns `root`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return root


def version_2(root: Path, path: str, files: dict[str, str], *, mount_root: str = "/") -> Path:
    """A system whose process is in the cgroup `path` of version 2; `files` are below the mount point."""
    mountinfo = (
        f"24 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
        f"30 24 0:26 {mount_root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    (root / "sys/fs/cgroup").joinpath(*[part for part in path.split("/") if part != ".."]).mkdir(
        parents=True, exist_ok=True
    )
    inside = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    return write_tree(root, {"proc/self/cgroup": f"0::{path}\n", "proc/self/mountinfo": mountinfo, **inside})


def version_1(root: Path, path: str, files: dict[str, str], *, mount_root: str = "/") -> Path:
    """A system whose process is in the cgroup `path` of each controller of version 1, beside an empty version 2."""
    mountinfo = (
        f"33 31 0:31 {mount_root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
        f"34 31 0:32 {mount_root} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
        f"35 31 0:33 {mount_root} /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids\n"
        f"41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
    )
    membership = f"5:pids:{path}\n4:memory:{path}\n3:cpu,cpuacct:{path}\n1:name=systemd:{path}\n0::/\n"
    inside = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    return write_tree(root, {"proc/self/cgroup": membership, "proc/self/mountinfo": mountinfo, **inside})
