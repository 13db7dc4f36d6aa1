"""``edgelm batch`` as users meet it: killed at any moment, resumed, refused in one sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgelm.cli import cli
from edgelm.errors import ConfigError, EdgelmError
from tests.conftest import TINY_BUNDLE

TINY = ("-m", str(TINY_BUNDLE), "--threads", "1")
SAMPLED = (*TINY, "--do-sample", "--seed", "5", "-n", "6", "--rows", "3")
KILLED = """
import os, sys
import edgelm.batch.output as output
rows, torn = int(sys.argv.pop(1)), sys.argv.pop(1) == "torn"
write = output.Output.write
def dying_write(self, answer):
    if len(self.written.lines) == rows:
        if torn:
            self._file.write(answer.line.encode()[:9])
        os.kill(os.getpid(), 9)
    write(self, answer)
output.Output.write = dying_write
from edgelm.cli import main
main()
"""
"""A program that runs edgelm, and dies at the write after ROWS answers, perhaps in the middle of it."""


@dataclass(frozen=True)
class Result:
    """What became of a command that ran in this process."""

    status: int
    message: str
    """What it wrote on standard error, or the error that `edgelm.cli.main` would write there."""


def batch(*arguments: str) -> Result:
    """Run ``edgelm batch`` in the present folder."""
    done = CliRunner().invoke(cli, ["batch", *arguments])
    assert done.exception is None or isinstance(done.exception, (SystemExit, EdgelmError)), done.exception
    if isinstance(done.exception, EdgelmError):
        return Result(2 if isinstance(done.exception, ConfigError) else 1, str(done.exception))
    return Result(done.exit_code, done.output)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with an input of 13 lines, the 8th of which is bad."""
    lines = [json.dumps({"prompt": f"The cat {n}", "id": n, "max_new_tokens": 1 + n % 6}) for n in range(12)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:7], "{", *lines[7:]]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("flags, kills", [((), (("0", "whole"), ("5", "torn"))), (("--unordered",), (("6", "torn"),))])
def test_a_killed_run_goes_on(folder: Path, flags: tuple[str, ...], kills: tuple[tuple[str, str], ...]) -> None:
    """Killed before the first answer, and in the middle of another one."""
    command = ("in.jsonl", "out.jsonl", *SAMPLED, *flags)
    output = folder / "out.jsonl"
    for rows, how in kills:
        killed = subprocess.run([sys.executable, "-c", KILLED, rows, how, "batch", *command], timeout=120)
        assert killed.returncode == -signal.SIGKILL and output.read_bytes().count(b"\n") == int(rows)
    begun = output.read_bytes()
    assert not begun.endswith(b"\n")
    resumed = batch(*command)
    assert resumed.status == 1 and f"has {rows} of 13 answers already" in resumed.message
    assert "1 of 13 lines could not be answered" in resumed.message
    whole = output.read_bytes()
    assert whole.startswith(begun[: begun.rindex(b"\n") + 1])  # nothing is computed again
    assert batch("in.jsonl", "alone.jsonl", *SAMPLED, "--rows", "1").status == 1
    expected = (folder / "alone.jsonl").read_bytes()
    assert whole == expected or flags
    assert sorted(whole.splitlines()) == sorted(expected.splitlines())
    answers = [json.loads(line) for line in expected.splitlines()]
    assert [answer["line"] for answer in answers] == list(range(1, 14))
    assert [answer.get("id") for answer in answers] == [*range(7), None, *range(7, 12)] and "error" in answers[7]
    again = batch(*command)
    assert again.status == 1 and "has 13 of 13" in again.message and output.read_bytes() == whole


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "The cat"}\n' * 100_000)
    command = ("batch", "in.jsonl", "out.jsonl", *TINY, "-n", "3")
    output = tmp_path / "out.jsonl"
    with subprocess.Popen([sys.executable, "-m", "edgelm", *command], cwd=tmp_path, stderr=subprocess.PIPE) as run:
        while not output.exists() or not output.stat().st_size:
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        stderr = run.communicate(timeout=60)[1].decode()
    done = output.read_bytes().count(b"\n")
    assert run.returncode == 130 and output.read_bytes().endswith(b"\n")
    assert stderr.splitlines()[-1] == (
        f"edgelm: stopped after {done:,} of 100,000 answers; give the same command again to go on"
    )


def test_what_is_refused(folder: Path) -> None:
    """Each in one sentence, without an output of it."""
    (folder / "folder").mkdir()
    (folder / "mood.json").write_text('{"kind": "choose", "template": "{a}", "choices": {"b": " b", "c": " c"}}')
    for words, status, arguments in (
        ("No such file", 1, ("none.jsonl", "out.jsonl")),
        ("cannot read 'folder'", 1, ("folder", "out.jsonl")),
        ("the same file", 2, ("in.jsonl", "in.jsonl")),
        ("there is no folder", 1, ("in.jsonl", "no/out.jsonl")),
        ("it is a folder", 1, ("in.jsonl", "folder")),
        ("--workers is about Ray", 2, ("in.jsonl", "out.jsonl", "--workers", "2")),
        ("temperature must be", 2, ("in.jsonl", "out.jsonl", "--temperature", "-1")),
        ("has no effect with --as score", 2, ("in.jsonl", "out.jsonl", "--as", "score", "-n", "3")),
        ("drop --task or --as", 2, ("in.jsonl", "out.jsonl", "--as", "score", "--task", "mood.json")),
        ("generates no text", 2, ("in.jsonl", "out.jsonl", "--task", "mood.json", "--top-k", "3")),
        ("max_rows must be", 2, ("in.jsonl", "out.jsonl", "--rows", "0")),
    ):
        result = batch(*TINY, *arguments)
        assert result.status == status and words in result.message, result
        if words != "max_rows must be":
            assert not (folder / "out.jsonl").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_no_input(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert "save its input in a file" in batch(*TINY, "pipe", "out.jsonl").message


def test_a_changed_command_is_refused(folder: Path) -> None:
    assert batch("in.jsonl", "out.jsonl", *SAMPLED).status == 1
    whole = (folder / "out.jsonl").read_bytes()
    for words, flags in (("another seed", ("--seed", "6")), ("value of temperature", ("--temperature", "2"))):
        assert words in batch("in.jsonl", "out.jsonl", *SAMPLED, *flags).message
    with (folder / "in.jsonl").open("a") as stream:
        stream.write('{"prompt": "a"}\n')
    assert "another input" in batch("in.jsonl", "out.jsonl", *SAMPLED).message
    assert (folder / "out.jsonl").read_bytes() == whole


def test_a_task_and_a_constraint(folder: Path) -> None:
    task = {"kind": "choose", "template": "The {who} sat on the", "choices": {"rug": " mat", "home": " house"}}
    (folder / "task.json").write_text(json.dumps(task))
    (folder / "in.jsonl").write_text('{"who": "cat"}')  # no line end
    result = batch(*TINY, "in.jsonl", "out.jsonl", "--task", "task.json")
    assert result.status == 0 and "edgelm: 1 of 1, " in result.message
    assert json.loads((folder / "out.jsonl").read_text())["label"] in ("rug", "home")
    pytest.importorskip("llguidance")
    (folder / "in.jsonl").write_text('{"prompt": "The cat"}\n')
    cut = batch(*TINY, "in.jsonl", "cut.jsonl", "--regex", " [a-z]{40}", "-n", "9")
    if "least" not in (folder / "cut.jsonl").read_text():
        assert cut.status == 3 and "allow more tokens" in cut.message
