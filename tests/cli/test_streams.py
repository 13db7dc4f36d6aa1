"""Text arrives in every encoding, and a long command shows how far it is."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelm.cli.progress import FILE_FIRST_SECONDS, FILE_NEXT_SECONDS, percent, progress, prompt_progress
from tests.conftest import TINY_BUNDLE, RunCommand

TINY = ("-m", str(TINY_BUNDLE))
OTHER_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""Standard output is ASCII then, as it is cp1252 on Windows."""
TEXT = "naïve ☕"


def run(*args: str, stdin: str = TEXT, **env: str) -> tuple[int, bytes, bytes]:
    """Status, standard output and standard error of ``edgelm ARGS``."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "COLUMNS")} | env
    command = [sys.executable, "-m", "edgelm", *args]
    done = subprocess.run(command, input=stdin.encode(), capture_output=True, env=environment, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_a_file_or_a_pipe_gets_utf_8() -> None:
    status, out, err = run("run", *TINY, "-n", "1", **OTHER_LOCALE)
    assert status == 0 and out.decode("utf-8").startswith(TEXT), err
    status, out, err = run("run", *TINY, "-n", "1", "--json", **OTHER_LOCALE)
    assert json.loads(out.decode("utf-8"))["prompt"] == TEXT
    assert TEXT.encode() in out  # not escaped
    status, out, err = run("score", *TINY, "--json", stdin=f"a\t {TEXT}", **OTHER_LOCALE)
    assert json.loads(out.decode("utf-8"))["continuation"] == f" {TEXT}"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("latin-1", "naïve ?"), ("cp1252", "naïve ?"), ("ascii", "na?ve ?"), ("utf-16-le", TEXT), ("utf-8", TEXT)],
)
def test_the_encoding_that_the_user_chose(encoding: str, shown: str) -> None:
    status, out, err = run("run", *TINY, "-n", "1", PYTHONIOENCODING=encoding)
    assert status == 0 and out.decode(encoding).startswith(shown), err
    status, out, _ = run("run", *TINY, "-n", "1", "--json", PYTHONIOENCODING=encoding)
    assert json.loads(out.decode(encoding))["prompt"] == TEXT  # JSON escapes what it must


def test_the_errors_that_the_user_chose() -> None:
    assert run("run", *TINY, "-n", "1", PYTHONIOENCODING="ascii:xmlcharrefreplace")[1].startswith(b"na&#239;ve &#9749;")
    status, _, err = run("run", *TINY, "-n", "1", PYTHONIOENCODING="ascii:strict")
    assert status == 1 and err == b"edgelm: standard output cannot show '\\xef' in ascii: unset PYTHONIOENCODING\n"


def test_line_ends_stay_as_they_are_where_the_system_has_other_ones() -> None:
    """On Windows a stream of text writes CR LF for each LF."""
    code = (
        "import io, sys; from edgelm.cli.streams import prepare_streams\n"
        "sys.stdout = io.TextIOWrapper(sys.stdout.detach(), 'cp1252', newline='\\r\\n'); prepare_streams()\n"
        "sys.stdout.write('one\\ntwo\\r\\n☕'); sys.stdout.flush()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert done.stdout == "one\ntwo\r\n☕".encode()


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudoterminal")
def test_a_terminal_shows_question_marks_for_characters_that_it_lacks() -> None:
    import pty

    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING"} | OTHER_LOCALE
    command = [sys.executable, "-m", "edgelm", "run", *TINY, "-n", "1"]
    done = subprocess.run(
        command, input=TEXT.encode(), stdout=theirs, stderr=subprocess.PIPE, env=environment, timeout=60
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.read(ours, 1000).startswith(b"na?ve ?")
    os.close(ours)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder whose name is no text")
def test_names_that_are_no_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(folder)).symlink_to(TINY_BUNDLE)
    for command, status in ((b"info", 0), (b"info --json", 0), (b"verify", 1), (b"doctor", 1), (b"run x -m", 1)):
        words = [os.fsencode(sys.executable), b"-m", b"edgelm", *command.split(), folder]
        done = subprocess.run(words, capture_output=True, timeout=60)
        assert done.returncode == status and b"Traceback" not in done.stderr, (command, done.stderr)
        assert status == 0 or b"because its path is not UTF-8" in b" ".join((done.stdout + done.stderr).split())
        done.stdout.decode("utf-8")
    shown = subprocess.run([sys.executable, "-m", "edgelm", "info", folder + b"x"], capture_output=True, timeout=60)
    assert shown.returncode == 1 and shown.stderr.count(b"\n") == 1 and b"no such folder" in shown.stderr
    assert b"Traceback" not in shown.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX descriptors")
def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "import os; from edgelm.cli.streams import prepare_streams; prepare_streams();"
        f"assert os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY) > 2"
    )
    command = f"'{sys.executable}' -c \"{code}\" <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/x", "cannot write '/nowhere/x': there is no folder '/nowhere'"),
        (".", "cannot write '.': it is a folder; give a file"),
        ("/proc/self/nothing/x", "there is no folder '/proc/self/nothing'"),
    ],
)
def test_outputs_are_checked_before_anything_is_computed(
    path: str, message: str, edgelm_command: RunCommand, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("Hello")
    assert message in edgelm_command("run", "x", "-m", "/no/bundle", "--state", path).one_line()
    assert message in edgelm_command("bake", "text.txt", "-m", "/no/bundle", "-o", path).one_line()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_error_of_writing_names_the_user_s_file(edgelm_command: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "x.state"
    code = (
        "import pathlib, sys\n"
        "open_file = pathlib.Path.open\n"
        "def refuse(path, *args, **options):\n"
        "    if path.name.startswith('.edgelm-'): raise OSError(28, 'No space left on device', str(path))\n"
        "    return open_file(path, *args, **options)\n"
        "pathlib.Path.open = refuse\n"
        f"sys.argv = ['edgelm', 'run', 'x', '-n', '1', '-m', {str(TINY_BUNDLE)!r}, '--state', {str(target)!r}]\n"
        "from edgelm.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == f"edgelm: {target}: No space left on device\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def seconds() -> Iterator[float]:
    return iter([0.0, 0.5, 1.5, 1.55, 2.0])


def test_a_terminal_has_one_line_that_changes_and_goes(
    monkeypatch: pytest.MonkeyPatch, seconds: Iterator[float]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("measured", lambda: next(seconds)) as show:
        for share in (0.1, 0.25, 0.3, 1.0):  # the first comes too early, the third too soon after the second
            percent(show)(share)
    assert terminal.getvalue() == "\rmeasured: 25%\rmeasured: 100%\r              \r"


def test_a_log_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    first = FILE_FIRST_SECONDS
    times = iter([0.0, first - 1, first, first + 1, first + FILE_NEXT_SECONDS + 1])
    with progress("answered", lambda: next(times)) as show:
        for count in range(4):
            show(f"{count} lines")
    assert log.getvalue() == "edgelm: answered: 1 lines\nedgelm: answered: 3 lines\n"


def test_without_standard_error_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    times = iter([0.0, 1e6])
    with progress("answered", lambda: next(times)) as show:
        show("all")


def test_a_long_prompt_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the line goes before the first text; a short prompt is computed in one piece and tells nothing."""
    with prompt_progress("short") as option:
        assert option is None
    monkeypatch.setattr("edgelm.cli.progress.TERMINAL_FIRST_SECONDS", 0.0)
    monkeypatch.setattr("edgelm.cli.progress.TERMINAL_NEXT_SECONDS", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with prompt_progress("long " * 500) as option:
        assert option is not None
        option(64, 128)
        assert terminal.getvalue() == "\rreading the prompt: 64 of 128 tokens"
        option(128, 128)
        assert terminal.getvalue().endswith(" \r"), "the line is gone before the first text comes"


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudoterminal and SIGINT")
def test_a_long_perplexity_shows_progress_and_can_be_cancelled(tmp_path: Path) -> None:
    import pty
    import signal

    text = tmp_path / "long.txt"
    text.write_text("The cat sat on the mat. " * 40_000)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "edgelm", "perplexity", *TINY, "--file", str(text), "--stride", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    while b"%" not in shown:
        shown += os.read(ours, 1000)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130 and time.monotonic() - began < 10
    assert b"perplexity: " in shown and b"Traceback" not in shown
    assert process.stdout is not None and process.stdout.read() == b""
    os.close(ours)
