"""A file is replaced in one step; what a killed writer leaves behind goes, and what a living one writes stays."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest

from edgelm.bundle import whole_file
from edgelm.bundle.whole_file import write_whole_file
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from edgelm.bundle import whole_file

def replace(path, target):
    print("ready", flush=True)
    time.sleep(600)

Path.replace = replace
whole_file.write_whole_file(Path(sys.argv[1]), b"half")
"""


def begin(target: Path) -> subprocess.Popen[str]:
    """Start a process that has written its temporary file, and waits before it renames it."""
    command = [sys.executable, "-c", HOLD, str(target)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def temporaries(folder: Path) -> list[Path]:
    return sorted(folder.glob(".edgelm-*.tmp"))


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a"
    write_whole_file(target, b"old")
    write_whole_file(target, b"new")
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name != "posix", reason="POSIX has this mask")
def test_the_mask_of_the_process_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole_file(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "a"
    write_whole_file(target, b"old")
    with mock.patch.object(Path, "replace", side_effect=OSError("full")), pytest.raises(OSError, match="full"):
        write_whole_file(target, b"new")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name != "posix", reason="Windows waits for a minute")
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    killed, alive = begin(tmp_path / "a"), begin(tmp_path / "b")
    try:
        assert len(temporaries(tmp_path)) == 2
        end(killed)
        write_whole_file(tmp_path / "c", b"whole")  # another name in the same folder
        assert [path.read_bytes() for path in temporaries(tmp_path)] == [b"half"]  # of the living one
        assert not (tmp_path / "a").exists() and (tmp_path / "c").read_bytes() == b"whole"
    finally:
        end(alive)
    write_whole_file(tmp_path / "c", b"again")
    assert list(tmp_path.iterdir()) == [tmp_path / "c"]


def test_other_files_stay(tmp_path: Path) -> None:
    names = [".edgelm-1.tmp", ".edgelm-0123456789abcdef.tmp.bak", ".a.0123456789abcdef", "edgelm-0123456789abcdef.tmp"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".edgelm-0123456789abcdef.tmp").mkdir()
    write_whole_file(tmp_path / "a", b"")
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".edgelm-0123456789abcdef.tmp", *names}


@pytest.mark.skipif(os.name != "posix", reason="makes links and pipes")
def test_links_and_pipes_are_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"content")
    (tmp_path / ".edgelm-0000000000000000.tmp").symlink_to("precious")
    os.mkfifo(tmp_path / ".edgelm-0000000000000001.tmp")
    write_whole_file(tmp_path / "a", b"")
    assert len(temporaries(tmp_path)) == 2 and (tmp_path / "precious").read_bytes() == b"content"


@pytest.mark.skipif(os.name != "posix", reason="on Windows an open file cannot be removed")
def test_a_writer_whose_file_is_taken_for_abandoned_takes_another_one(tmp_path: Path) -> None:
    """Another writer finds the file after it was made and before it was locked."""
    found, lock = list[Path](), whole_file.lock

    def found_before(file: object) -> None:
        if not found:
            found.extend(temporaries(tmp_path))
            found[0].unlink()
        lock(file)  # type: ignore[arg-type]

    with mock.patch.object(whole_file, "lock", found_before):
        write_whole_file(tmp_path / "a", b"whole")
    assert len(found) == 1 and list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_file_system_without_locks_still_takes_files(tmp_path: Path) -> None:
    with mock.patch.object(whole_file, "lock", side_effect=OSError("no locks available")):
        write_whole_file(tmp_path / "a", b"whole")
        assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_writers_of_one_process_leave_each_other_alone(tmp_path: Path) -> None:
    errors = list[BaseException]()

    def write(number: int) -> None:
        try:
            for _ in range(50):
                write_whole_file(tmp_path / str(number % 2), bytes([number]) * 1000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and {path.name for path in tmp_path.iterdir()} == {"0", "1"}
    assert all(len(set(path.read_bytes())) == 1 and path.stat().st_size == 1000 for path in tmp_path.iterdir())
