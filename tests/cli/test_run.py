"""Stdout, stderr and exit status of ``edgelm run``."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import edgelm
from tests.conftest import TINY_BUNDLE, RunCommand, edit_manifest, replace_file

TINY = ("-m", str(TINY_BUNDLE))


def test_version_and_help(edgelm_command: RunCommand) -> None:
    assert edgelm_command("--version").stdout == f"edgelm {edgelm.__version__}\n"
    for args in (["--help"], ["-h"]):
        shown = edgelm_command(*args)
        assert shown.status == 0
        assert re.findall(r"^  (\w+) ", shown.stdout.split("Commands:")[1], re.MULTILINE) == [
            "run",
            "batch",
            "chat",
            "score",
            "choose",
            "perplexity",
            "embed",
            "explain",
            "latent",
            "serve",
            "bake",
            "pretrain",
            "finetune",
            "distill",
            "evaluate",
            "recipe",
            "export",
            "info",
            "verify",
            "pack",
            "unpack",
            "pull",
            "push",
            "list",
            "rm",
            "compare",
            "bench",
            "doctor",
        ]
    for command in ("run", "score", "choose", "perplexity", "embed", "bake", "export", "info", "verify", "compare"):
        shown = edgelm_command(command, "--help")
        assert shown.status == 0
        assert shown.stdout.startswith(f"Usage: edgelm {command}")


def test_without_arguments_the_help_is_shown(edgelm_command: RunCommand) -> None:
    shown = edgelm_command()
    assert (shown.status, shown.stdout, shown.stderr) == (2, "", edgelm_command("--help").stdout)


def test_run_prints_prompt_and_continuation_and_nothing_else(edgelm_command: RunCommand) -> None:
    result = edgelm_command("run", *TINY, "Hello", "-n", "5")
    expected = edgelm.load(TINY_BUNDLE).generate("Hello", max_new_tokens=5).text
    assert (result.status, result.stdout, result.stderr) == (0, f"Hello{expected}\n", "")
    alone = edgelm_command("run", *TINY, "Hello", "-n", "5", "--no-echo")
    assert alone.stdout == f"{expected}\n"


def test_run_the_embedded_default(edgelm_command: RunCommand) -> None:
    result = edgelm_command("run", "Once upon a time", "--seed", "1", "--stats")
    assert result.status == 0
    assert result.stdout.startswith("Once upon a time, ")
    assert re.fullmatch(
        r"prompt 4 tok in \d+ ms \| \d+ tok, [\d.]+ tok/s \| load [\d.]+ s \| peak \d+ MB \| cpu, \d+ threads\n",
        result.stderr,
    )


def test_model_comes_from_the_environment_too(edgelm_command: RunCommand) -> None:
    env = {"EDGELM_MODEL": str(TINY_BUNDLE)}
    assert "vocabulary 300" in edgelm_command("info", env=env).stdout
    assert "vocabulary 4,096" in edgelm_command("info", env={}).stdout
    assert edgelm_command("info", str(TINY_BUNDLE), env={"EDGELM_MODEL": "/nowhere"}).status == 0


def test_prompt_from_a_file(edgelm_command: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("naïve ☕\n", encoding="utf-8")
    expected = edgelm_command("run", *TINY, "naïve ☕", "-n", "3").stdout
    assert edgelm_command("run", *TINY, "-n", "3", "--file", "prompt.txt").stdout == expected
    assert "cannot read 'none.txt'" in edgelm_command("run", *TINY, "--file", "none.txt").one_line()
    both = edgelm_command("run", *TINY, "x", "--file", "prompt.txt")
    assert both.status == 2 and "a prompt and --file are given" in both.one_line()


def test_a_blank_at_the_end_gets_a_hint(edgelm_command: RunCommand) -> None:
    result = edgelm_command("run", *TINY, "Hello ", "-n", "1")
    assert result.status == 0 and len(result.stderr.splitlines()) == 1
    assert "the prompt ends with a blank, which usually belongs to the next word" in result.stderr


def test_prompt_from_stdin(edgelm_command: RunCommand) -> None:
    expected = edgelm_command("run", *TINY, "naïve ☕", "-n", "3").stdout
    for args in ([], ["-"]):
        assert edgelm_command("run", *TINY, "-n", "3", *args, stdin="naïve ☕\n".encode()).stdout == expected
    assert edgelm_command("run", *TINY, "-n", "3", stdin="naïve ☕\r\n".encode()).stdout == expected


def test_a_given_prompt_never_touches_stdin() -> None:
    """`edgelm run` must not wait for an open pipe to which nobody writes, as under a supervisor."""
    read, write = os.pipe()
    try:
        command = [sys.executable, "-m", "edgelm", "run", *TINY, "Hello", "-n", "1"]
        assert subprocess.run(command, stdin=read, capture_output=True, timeout=60).returncode == 0
    finally:
        os.close(read)
        os.close(write)


def test_json_is_one_object(edgelm_command: RunCommand) -> None:
    result = edgelm_command(
        "run", *TINY, "Hi", "--json", "--seed", "7", "--top-k", "5", "-n", "4", "--num-return-sequences", "2"
    )
    assert result.stdout.count("\n") == 1
    content = json.loads(result.stdout)
    assert content["prompt"] == "Hi" and content["seed"] == 7 and content["precision"] == "fp32"
    assert [len(choice["token_ids"]) for choice in content["choices"]] == [4, 4]
    assert content["stats"]["new_tokens"] == 8
    assert len(content["digest"]) == 64


def test_rows_are_separated_by_a_blank_line(edgelm_command: RunCommand) -> None:
    result = edgelm_command("run", "The", "--seed", "7", "--stop", ".", "--num-return-sequences", "2")
    first, second = result.stdout.split("\n\n")
    assert first.startswith("The") and second.startswith("The") and first != second


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["run", "x", "-m", "/nowhere"], 1, "there is no such folder"),
        (["run", "x", *TINY, "--top-p", "2"], 2, "top_p must be in (0, 1], got 2"),
        (["run", "x", *TINY, "--top-p", "nan"], 2, "top_p must be in (0, 1], got nan"),
        (["run", "x", *TINY, "--temperature", "0"], 2, "--greedy"),
        (["run", "x", *TINY, "-n", "-1"], 2, "max_new_tokens must be a whole number"),
        (["run", "x", *TINY, "-n", "x"], 2, "Invalid value for '-n'"),
        (["run", "x", *TINY, "-n", "9" * 40], 2, "max_new_tokens must be"),
        (["run", "x", *TINY, "--seed", "-5"], 2, "seed must be"),
        (["run", "x", *TINY, "--stop", ""], 2, "stop_strings must be"),
        (["run", "x", *TINY, "--greedy", "--top-k", "3"], 2, "top_k needs sampling"),
        (["run", "x", *TINY, "--max-length", "5", "-n", "5"], 2, "contradict"),
        (["run", "x", *TINY, "--num-return-sequences", "2", "--greedy"], 2, "num_return_sequences=2"),
        (["run", "x", *TINY, "--max-tokens", "5"], 2, "No such option"),
        (["run", "x", "y", *TINY], 2, "unexpected extra argument (y); put each text in quotes"),
        (["run", "Once", "upon", "a", "time"], 2, "extra arguments (upon a time); put each text in quotes"),
        (["run", "x" * 500, *TINY], 1, "this model's context holds 64"),
        (["run", "x", *TINY, "--device", "cuda"], 1, "runs on the cpu only; export one with --precision fp16"),
        (["run", "x", *TINY, "--device", "tpu"], 1, "device must be"),
        (["run", "x", *TINY, "--threads", "0"], 1, "threads must be"),
        (["nonsense"], 2, "No such command 'nonsense'. (see"),
        (["rnu", "x"], 2, "No such command 'rnu'. Did you mean 'run'?"),
        (
            ["run", "x", *TINY, "--num-beams", "2", "--context-overflow", "window"],
            2,
            "--context-overflow window",
        ),
        (["info", "/nowhere"], 1, "there is no such folder"),
        (["info", "/a", "-m", "/b"], 2, "two bundles are given"),
        (["verify", "/nowhere"], 1, "there is no such folder"),
        (["compare", "/nowhere", "/nowhere"], 1, "there is no such folder"),
        (["compare", "/nowhere"], 2, "Missing argument 'B'"),
        (["bench", *TINY, "--prompt-tokens", "60", "-n", "60"], 1, "60 prompt tokens and 60 new ones do not fit"),
        (["bench", "--runs", "0"], 2, "0 is not in the range"),
        (["export"], 2, "Missing argument 'SOURCE'"),
    ],
)
def test_bad_input_is_one_line(edgelm_command: RunCommand, args: list[str], status: int, message: str) -> None:
    result = edgelm_command(*args)
    assert message in result.one_line()
    assert result.status == status


def test_an_empty_prompt_begins_from_bos_where_there_is_one(edgelm_command: RunCommand, tiny_copy: Path) -> None:
    expected = edgelm.load(TINY[1], device="cpu").generate([0], max_new_tokens=3).text
    for args, stdin in ((["run", ""], None), (["run"], b"")):
        result = edgelm_command(*args, *TINY, "-n", "3", stdin=stdin)
        assert result.status == 0, result.stderr
        assert result.stdout.rstrip("\n") == expected.rstrip("\n")
    replace_file(tiny_copy, "generation_config.json", b'{"eos_token_id": 0}')
    for args, stdin in ((["run", ""], None), (["run"], b"")):
        assert "the prompt is empty" in edgelm_command(*args, "-m", str(tiny_copy), stdin=stdin).one_line()


def test_stdin_that_is_no_prompt(edgelm_command: RunCommand) -> None:
    assert "not UTF-8 text (byte 2)" in edgelm_command("run", *TINY, stdin=b"ab\xff").one_line()


WITH_OUTPUT = (
    "info",
    "verify {tiny}",
    "verify --hashes-only",
    "bench {tiny} --runs 1",
    "compare {folder} {folder}",
    "doctor {tiny}",
    "--help",
    "run --help",
    "--version",
    "score {tiny} a b",
)
"""Commands whose answer is on standard output."""


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("shell", "status", "message"),
    [
        ("{edgelm} run {tiny} <&-", 1, "standard input is closed"),
        ("{edgelm} run {tiny} x >&-", 1, "standard output is closed"),
        ("{edgelm} run {tiny} x > /dev/full", 1, "No space left on device"),
        *[(f"{{edgelm}} {command} >&-", 1, "standard output is closed") for command in WITH_OUTPUT],
        *[(f"{{edgelm}} {command} > /dev/full", 1, "No space left on device") for command in WITH_OUTPUT],
        ("{edgelm} run {tiny} x --stats -n 1 > /dev/null 2>&-", 0, ""),
        ("{edgelm} run {tiny} x --stats -n 1 > /dev/null 2> /dev/full", 0, ""),
        ("{edgelm} run {tiny} x -n 1 <&- >/dev/null", 0, ""),
        ("{edgelm} perplexity {tiny} <&-", 1, "standard input is closed"),
    ],
)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_closed_and_full_streams(shell: str, status: int, message: str, locale: str) -> None:
    names = {"edgelm": f"'{sys.executable}' -m edgelm", "tiny": f"-m '{TINY_BUNDLE}'", "folder": f"'{TINY_BUNDLE}'"}
    command = shell.format(**names)
    # In the locale C the streams get another encoding, and then keep what they could not write.
    settings = {**os.environ, "LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, env=settings)
    assert done.returncode == status
    assert message in done.stderr.splitlines()[-1] if message else done.stderr == ""
    assert "Traceback" not in done.stderr and done.stderr.count("edgelm: ") == bool(message)


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_broken_pipe_is_quiet() -> None:
    command = f"'{sys.executable}' -m edgelm run 'Once upon a time' --seed 1; echo status $? >&2"
    done = subprocess.run(["sh", "-c", f"({command}) | head -c 1"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "O"
    assert done.stderr == "status 141\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("command", ["--help", "run --help", "info", "info --json", "doctor"])
def test_a_pipe_without_a_reader_is_quiet_everywhere(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "edgelm", *command.split()]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_prints_a_newline_and_exits_130() -> None:
    command = [sys.executable, "-m", "edgelm", "run", "Once", "--num-return-sequences", "1000", "--seed", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(4)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(timeout=10) == 130
    assert process.stderr.read() == b"\n"


INTERRUPTED = """
import os, signal, sys
where, *sys.argv = sys.argv[1:]

class Interrupt:  # Ctrl-C arrives when the module `where` is about to be imported
    def find_spec(self, name, path=None, target=None):
        if name == where:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
from edgelm.__main__ import main
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize(
    "module",
    ["edgelm.cli", "click", "edgelm.cli.run", "edgelm.model", "numpy", "numpy.linalg", "onnxruntime.capi._ld_preload"],
)
def test_ctrl_c_while_modules_load(module: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, module, "edgelm", "run", "Once", "-n", "1"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, b"", b"")


def test_info_shows_what_was_lost(edgelm_command: RunCommand) -> None:
    shown = edgelm_command("info").stdout
    for words in ("stories-6m", "5,918,720 parameters", "int8", "perplexity", "gate", "apache-2.0"):
        assert words in shown
    content = json.loads(edgelm_command("info", "--json").stdout)
    assert content["recipe"]["name"] == "int8" and content["size_bytes"] < 8_000_000


def test_verify_hashes_everything(edgelm_command: RunCommand, tiny_copy: Path) -> None:
    result = edgelm_command("verify", str(tiny_copy), "--hashes-only")
    assert result.status == 0 and re.fullmatch(r"ok: \d+ files, [\d,]+ bytes, digest [0-9a-f]{64}\n", result.stdout)
    assert result.stderr == f"hashing 9 files ({sum(p.stat().st_size for p in tiny_copy.iterdir()) / 1e6:.1f} MB)\n"
    info = edgelm_command("info", str(tiny_copy)).stdout
    assert "in 9 files" in info and len(list(tiny_copy.iterdir())) == 9
    weights = tiny_copy / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    failed = edgelm_command("verify", str(tiny_copy))
    assert failed.status == 1 and failed.stdout == ""
    assert failed.stderr.splitlines()[-1].startswith("edgelm: ") and "SHA-256 differs" in failed.stderr


def test_verify_notices_an_edited_manifest(edgelm_command: RunCommand, tiny_copy: Path) -> None:
    edit_manifest(tiny_copy, lambda m: m["source"].update(license="mit"), reseal=False)
    assert "does not match its own digest" in edgelm_command("verify", str(tiny_copy)).one_line()


def test_bench(edgelm_command: RunCommand) -> None:
    table = edgelm_command("bench", *TINY, "--runs", "1", "--threads", "1")
    assert table.status == 0 and table.stderr == "" and "{" not in table.stdout
    assert re.search(r"^decode +[\d.]+ tokens/s", table.stdout, re.MULTILINE)
    result = edgelm_command("bench", *TINY, "--runs", "2", "--threads", "1", "--json")
    assert result.status == 0 and result.stderr == ""
    measured = json.loads(result.stdout)
    assert measured["prompt_tokens"] == 32 and measured["new_tokens"] == 33 and measured["threads"] == 1
    for name in ("prefill_tokens_per_second", "first_token_seconds", "decode_tokens_per_second", "load_seconds"):
        assert measured[name] > 0
    assert measured["peak_rss_bytes"] > 10_000_000
