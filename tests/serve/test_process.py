"""``edgelm serve`` as a user runs it: the start screen, ``--check``, signals, and errors in one line."""

import os
import signal
import socket
import threading
from pathlib import Path

import httpx
import pytest

from edgelm import load
from tests.conftest import TINY_BUNDLE, RunCommand
from tests.serve.conftest import post, read_all, server_process, wait_until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")

LONG = {"prompt": "H", "max_tokens": 60, "n": 8, "temperature": 1.0, "stream": True, "eos_token_id": []}


def test_sigterm_lets_running_texts_finish() -> None:
    with server_process("--max-rows", "1") as server, server.connect() as connection, server.connect() as idle:
        idle.sendall(b"GET /hea")
        connection.sendall(post("/v1/completions", LONG))
        first = connection.recv(100)
        server.process.send_signal(signal.SIGTERM)
        answer = first + read_all(connection)
        assert b"data: [DONE]" in answer
        assert answer.count(b'"edgelm_finish_reason":"context"') + answer.count(b'"edgelm_finish_reason":"length"') == 8
        assert server.process.wait(60) == 0
        said = server.read_stderr()
    assert "edgelm: stopping" in said
    assert "Traceback" not in said


def test_after_the_drain_texts_are_cut_short() -> None:
    with server_process("--max-rows", "1", "--drain", "0.2") as server, server.connect() as connection:
        connection.sendall(post("/v1/completions", {**LONG, "prompt": ["H"] * 8}))
        first = connection.recv(100)
        server.process.send_signal(signal.SIGINT)
        answer = first + read_all(connection)
        assert server.process.wait(60) == 130
    assert b'"edgelm_finish_reason":"cancelled"' in answer
    assert b"data: [DONE]" in answer


def test_a_second_signal_ends_at_once() -> None:
    with server_process("--max-rows", "1") as server, server.connect() as connection:
        connection.sendall(post("/v1/completions", {**LONG, "prompt": ["H"] * 8}))
        connection.recv(100)
        server.process.send_signal(signal.SIGINT)
        assert server.process.stderr is not None
        while "stopping" not in server.process.stderr.readline():
            pass
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 130


def test_keys_of_the_environment_and_a_file(tmp_path: Path, edgelm_command: RunCommand) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("# the office\na-key-of-the-office-01\n")
    keys.chmod(0o600)
    with server_process("--api-key-file", str(keys)) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        header = {"authorization": "Bearer a-key-of-the-office-01"}
        assert httpx.get(f"{server.url}/v1/models", headers=header).status_code == 200
    done = edgelm_command(
        "serve", "--check", "--port", "0", "--host", "0.0.0.0", "-m", str(TINY_BUNDLE),
        env={"EDGELM_API_KEYS": "a-key-of-the-environment"},
    )  # fmt: skip
    assert done.status == 0
    assert "would start on http://0.0.0.0:" in done.stderr


def test_check_says_whether_it_would_start(edgelm_command: RunCommand, tmp_path: Path) -> None:
    with load(TINY_BUNDLE) as model:
        model.save_prefix(tmp_path / "greeting.prefix", "Hello there, ")
    prefix = f"greeting={tmp_path / 'greeting.prefix'}"
    done = edgelm_command("serve", "--check", "--port", "0", "-m", f"small={TINY_BUNDLE}", "--prefix", prefix)
    assert done.status == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith("small: loads, and takes about ")
    assert done.stderr.splitlines()[1].startswith("greeting: loads, and takes about ")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = edgelm_command("serve", "--check", "--port", str(port), "-m", str(TINY_BUNDLE))
        assert done.status == 2
        assert "Address already in use" in done.one_line() or "give another" in done.one_line()
    done = edgelm_command("serve", "--host", "0.0.0.0", "-m", str(TINY_BUNDLE))
    assert done.status == 2
    assert "give API keys" in done.one_line()
    done = edgelm_command("serve", "-m", str(tmp_path / "missing"))
    assert done.status == 1
    assert "missing" in done.one_line()


def test_a_model_that_does_not_load_ends_the_server(edgelm_command: RunCommand) -> None:
    done = edgelm_command("serve", "--port", "0", "-m", str(TINY_BUNDLE), "--device", "cuda:9")
    assert done.status == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("edgelm: ")


def test_memory_stays_where_it_is() -> None:
    """The server of 100 requests takes hardly more memory than that of the first 20."""
    with server_process() as server:
        body = {"prompt": "Hello there", "max_tokens": 16, "temperature": 1.2, "n": 2}

        def ask(count: int) -> None:
            with httpx.Client() as client:
                for _ in range(count):
                    assert client.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200

        ask(20)
        before = server.resident_bytes
        threads = [threading.Thread(target=ask, args=(20,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.resident_bytes - before < 20 * 2**20
        wait_until(lambda: server.metric('edgelm_model_users{model="tiny-gpt2"}') == 0)
