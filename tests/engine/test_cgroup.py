"""Limits of cgroups, versions 1 and 2, at any depth, read from trees that are made by hand."""

from pathlib import Path

import pytest

from edgelm.engine.cgroup import CgroupLimit, cgroup_folders, cpu_limits, memory_limits, thread_limits
from tests.engine.cgroup_trees import version_1, version_2, write_tree

SERVICE = "/system.slice/edgelm.service"


def found(root: Path, limits: list[CgroupLimit]) -> list[tuple[str, float, float]]:
    """Each limit with its file below /sys/fs/cgroup."""
    return [(str(limit.file.relative_to(root / "sys/fs/cgroup")), limit.limit, limit.used) for limit in limits]


def test_a_systemd_service(tmp_path: Path) -> None:
    """MemoryMax=400M and CPUQuota=200% stand in the service's own cgroup, not at the root."""
    root = version_2(
        tmp_path,
        SERVICE,
        {
            "system.slice/edgelm.service/memory.max": "419430400\n",
            "system.slice/edgelm.service/memory.high": "max\n",
            "system.slice/edgelm.service/memory.current": "30000000\n",
            "system.slice/edgelm.service/memory.stat": "anon 5\nfile 9000\ninactive_file 1000000\n",
            "system.slice/edgelm.service/cpu.max": "200000 100000\n",
            "system.slice/edgelm.service/pids.max": "50\n",
            "system.slice/edgelm.service/pids.current": "3\n",
            "system.slice/memory.max": "max\n",
            "system.slice/cpu.max": "max 100000\n",
            "system.slice/pids.max": "max\n",
        },
    )
    service = SERVICE.lstrip("/")
    assert found(root, memory_limits(root)) == [(f"{service}/memory.max", 419430400, 29000000)]
    assert found(root, cpu_limits(root)) == [(f"{service}/cpu.max", 2, 0)]
    assert found(root, thread_limits(root)) == [(f"{service}/pids.max", 50, 3)]


def test_the_cgroups_above_count_too(tmp_path: Path) -> None:
    root = version_2(
        tmp_path,
        "/a/b/c",
        {
            "a/b/c/memory.max": "900\n",
            "a/b/c/memory.high": "800\n",
            "a/b/memory.max": "max\n",
            "a/memory.max": "500\n",
            "a/memory.current": "450\n",
            "a/cpu.max": "50000 100000\n",
            "a/b/c/cpu.max": "300000 100000\n",
        },
    )
    expected = [("a/b/c/memory.max", 900, 0), ("a/b/c/memory.high", 800, 0), ("a/memory.max", 500, 450)]
    assert found(root, memory_limits(root)) == expected
    assert found(root, cpu_limits(root)) == [("a/b/c/cpu.max", 3, 0), ("a/cpu.max", 0.5, 0)]


def test_version_1_at_any_depth(tmp_path: Path) -> None:
    unlimited = "9223372036854771712\n"
    root = version_1(
        tmp_path,
        "/jobs/7",
        {
            "memory/jobs/7/memory.limit_in_bytes": unlimited,
            "memory/jobs/memory.limit_in_bytes": "1000\n",
            "memory/jobs/memory.usage_in_bytes": "900\n",
            "memory/jobs/memory.stat": "inactive_file 7\ntotal_inactive_file 100\ntotal_active_file 50\n"
            "total_mapped_file 20\n",
            "memory/memory.limit_in_bytes": unlimited,
            "cpu,cpuacct/jobs/7/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/jobs/7/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/jobs/cpu.cfs_quota_us": "150000\n",
            "cpu,cpuacct/jobs/cpu.cfs_period_us": "100000\n",
            "pids/jobs/7/pids.max": "20\n",
            "pids/jobs/7/pids.current": "4\n",
        },
    )
    assert found(root, memory_limits(root)) == [("memory/jobs/memory.limit_in_bytes", 1000, 770)]
    assert found(root, cpu_limits(root)) == [("cpu,cpuacct/jobs/cpu.cfs_quota_us", 1.5, 0)]
    assert found(root, thread_limits(root)) == [("pids/jobs/7/pids.max", 20, 4)]


@pytest.mark.parametrize(
    ("path", "mount_root"),
    [
        ("/", "/"),  # a container with a cgroup namespace of its own
        ("/docker/ab12", "/docker/ab12"),  # one without, whose own cgroup is mounted
        ("/docker/ab12", "/"),  # one whose /proc shows the path of the host
        ("/../outside", "/"),  # the process was moved out of the namespace
        ("/docker/ab12", "/other"),
    ],
)
@pytest.mark.parametrize("version", [version_1, version_2])
def test_containers(tmp_path: Path, path: str, mount_root: str, version: object) -> None:
    assert version in (version_1, version_2)
    make, prefix = (version_1, "memory/") if version is version_1 else (version_2, "")
    limit = "memory.limit_in_bytes" if prefix else "memory.max"
    (tmp_path / "sys/fs/cgroup/memory").mkdir(parents=True)
    root = make(tmp_path, "/", {f"{prefix}{limit}": "1000\n"}, mount_root=mount_root)
    membership = root / "proc/self/cgroup"
    membership.write_text(membership.read_text().replace(":/\n", f":{path}\n"))
    assert found(root, memory_limits(root)) == [(f"{prefix}{limit}", 1000, 0)]


def test_the_mount_that_shows_most_of_the_path_counts(tmp_path: Path) -> None:
    root = version_2(tmp_path, "/pod/box", {"pod/box/memory.max": "700\n", "pod/memory.max": "900\n"})
    extra = "31 24 0:26 /pod/box /mnt/my\\040cgroup rw - cgroup2 cgroup2 rw\n"
    (root / "proc/self/mountinfo").open("a").write(extra)
    write_tree(root, {"mnt/my cgroup/memory.max": "600\n"})
    assert [limit.limit for limit in memory_limits(root)] == [600]


def test_without_proc_the_usual_places_are_read(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"sys/fs/cgroup/memory.max": "1000\n", "sys/fs/cgroup/cpu.max": "max 100000\n"})
    assert found(root, memory_limits(root)) == [("memory.max", 1000, 0)]
    assert cpu_limits(root) == [] and thread_limits(root) == []
    other = write_tree(tmp_path / "other", {"sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n"})
    assert found(other, memory_limits(other)) == [("memory/memory.limit_in_bytes", 1000, 0)]


@pytest.mark.parametrize("content", ["", "\n", "x", "-5", "1e9", "9" * 30, "max", "\x00", "١٢"])
def test_a_file_without_a_number_is_no_limit(tmp_path: Path, content: str) -> None:
    names = ("memory.max", "memory.high", "memory.current", "memory.stat", "cpu.max", "pids.max")
    root = version_2(tmp_path, "/a", {f"a/{name}": content for name in names})
    assert memory_limits(root) == [] and cpu_limits(root) == [] and thread_limits(root) == []


@pytest.mark.parametrize(
    ("stat", "used"),
    [
        ("", 900),
        ("inactive_file 200\n", 700),
        ("inactive_file 200\nactive_file 300\nfile_mapped 100\n", 500),  # mapped pages are in use
        ("inactive_file 200\nactive_file 50\nfile_mapped 400\n", 700),
        ("inactive_file 2000\n", 0),
        ("inactive_file\nbroken line here\n", 900),
    ],
)
def test_pages_that_can_be_dropped_are_not_used(tmp_path: Path, stat: str, used: int) -> None:
    files = {"a/memory.max": "1000", "a/memory.current": "900", "a/memory.stat": stat}
    root = version_2(tmp_path, "/a", files)
    assert [limit.used for limit in memory_limits(root)] == [used]


@pytest.mark.parametrize("content", ["garbage", "0:", "0::", "::::", "4:memory\n", "\n\n", "0::/" + "x/" * 500])
def test_any_membership_is_read(tmp_path: Path, content: str) -> None:
    root = version_2(tmp_path, "/", {"memory.max": "1000\n"})
    (root / "proc/self/cgroup").write_text(content)
    assert [limit.limit for limit in memory_limits(root)] == [1000]
    (root / "proc/self/mountinfo").write_text(f"{content} - cgroup2 x y\n24 - cgroup\n")
    assert [limit.limit for limit in memory_limits(root)] == [1000]


def test_the_real_system_can_be_read() -> None:
    assert all(folder.is_absolute() for folder in cgroup_folders("memory"))
    assert all(limit.limit > 0 for limit in [*memory_limits(), *cpu_limits(), *thread_limits()])
