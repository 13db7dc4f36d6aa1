"""Two runs in one folder: the second is told who the first is; a dead process holds nothing."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgelm.errors import TrainingError
from edgelm_train.run.lock import LOCK_FILE, is_empty, locked

pytestmark = pytest.mark.export

HOLD = """
import sys
from pathlib import Path
from edgelm_train.run.lock import locked
with locked(Path(sys.argv[1]), "edgelm distill"):
    print("held", flush=True)
    sys.stdin.read()
print(sorted({"torch", "transformers"} & sys.modules.keys()))
"""


def holder(out: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    first = holder(out)
    words = rf"another run is at work in .*out: process {first.pid} \(edgelm distill, since "
    with pytest.raises(TrainingError, match=words), locked(out, "edgelm finetune"):
        pass
    stdout, _ = first.communicate("", timeout=30)
    assert stdout == "[]\n", "torch is not loaded"
    assert not out.parent.exists(), "what the lock made is removed"
    with locked(out, "edgelm finetune"):
        assert is_empty(out)


def test_a_lock_of_a_dead_process_does_not_block(tmp_path: Path) -> None:
    first = holder(tmp_path)
    if sys.platform == "win32":
        first.kill()
    else:
        os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=30)
    assert (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path, "edgelm finetune"):
        pass
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_thread_is_told_too_and_a_block_inside_is_not(tmp_path: Path) -> None:
    caught: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path, "edgelm finetune"):
                pass
        except TrainingError as error:
            caught.append(str(error))

    with locked(tmp_path, "edgelm finetune"), locked(tmp_path / ".." / tmp_path.name, "edgelm finetune"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (tmp_path / LOCK_FILE).exists()
    assert len(caught) == 1 and f"process {os.getpid()}" in caught[0]
    other()
    assert len(caught) == 1


def test_what_a_run_wrote_stays(tmp_path: Path) -> None:
    with locked(tmp_path / "out", "edgelm finetune"):
        (tmp_path / "out" / "mine").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes of this kind")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(TrainingError, match="cannot write into"), locked(tmp_path / "out", "edgelm finetune"):
        pass
