"""Servers for tests: an app without sockets, a server in a thread, and a server in a process of its own."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import httpx
from starlette.testclient import TestClient

from edgelm import Model, load
from edgelm.bundle.folder import Bundle
from edgelm.serve.app import create_app
from edgelm.serve.loading import load_place
from edgelm.serve.server import Server, listen
from edgelm.serve.settings import ServeSettings
from edgelm.serve.shelf import Place, ServedModel, Shelf, place_of
from tests.conftest import ROOT, TINY_BUNDLE

NAME = "tiny"
WAIT_SECONDS = 60.0
"""Long enough for a busy machine."""


def loaded(place: Place, base: ServedModel | None, settings: ServeSettings) -> ServedModel:
    """A place's model on one CPU thread."""
    return load_place(place, base, settings, device="cpu", threads=1)


def tiny_shelf(settings: ServeSettings, names: Sequence[str] = (NAME,), bundle: Path = TINY_BUNDLE) -> Shelf:
    """A shelf with `bundle` under each name."""
    places = [place_of(Bundle.read(bundle), name) for name in names]
    return Shelf(places, settings, lambda place, base: loaded(place, base, settings))


@contextmanager
def app_client(
    settings: ServeSettings | None = None, names: Sequence[str] = (NAME,), bundle: Path = TINY_BUNDLE
) -> Iterator[TestClient]:
    """A client of an app without sockets, whose first model is loaded."""
    settings = settings or ServeSettings()
    with TestClient(create_app(settings, tiny_shelf(settings, names, bundle)), base_url="http://localhost") as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        yield client


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A client of an app with the default settings."""
    with app_client() as client:
        yield client


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The model that the servers have, for comparison."""
    with load(TINY_BUNDLE, device="cpu", threads=1) as model:
        yield model


def wait_until(holds: Any, seconds: float = WAIT_SECONDS) -> None:
    """Wait until ``holds()`` is true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


@dataclass
class Running:
    """A server that listens on loopback."""

    port: int
    process_id: int
    server: Server | None = None
    """Where it runs in a thread of this process."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        """A connection of its own."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_SECONDS)

    def answer(self, *pieces: bytes) -> bytes:
        """Send `pieces`, and read until the server hangs up."""
        with self.connect() as connection:
            try:
                for piece in pieces:
                    connection.sendall(piece)
            except OSError:  # the server has answered and hung up
                pass
            return read_all(connection)

    def metric(self, line: str) -> float:
        """The value of a line of /metrics that begins with `line`; 0 without such a line."""
        page = httpx.get(f"{self.url}/metrics").text
        values = [float(row.rpartition(" ")[2]) for row in page.splitlines() if row.startswith(line)]
        return values[0] if values else 0.0

    @property
    def resident_bytes(self) -> int:
        """Resident memory of the process; 0 where the system does not tell."""
        try:
            status = Path(f"/proc/{self.process_id}/status").read_text(encoding="ascii")
        except OSError:
            return 0
        found = re.search(r"VmRSS:\s+(\d+)", status)
        return 0 if found is None else int(found[1]) * 1024


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other end hangs up."""
    content = b""
    try:
        while piece := connection.recv(1 << 16):
            content += piece
    except ConnectionError:
        pass
    return content


def post(path: str, body: object, *, host: str = "localhost", headers: str = "") -> bytes:
    """The bytes of a POST of JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@contextmanager
def running_server(
    settings: ServeSettings, bundle: Path = TINY_BUNDLE, name: str = NAME, shelf: Shelf | None = None
) -> Iterator[Running]:
    """A server in a thread, whose model is loaded: `bundle`, called `name`, or all models of `shelf`."""
    with listen(settings) as listener:
        app = create_app(settings, shelf or tiny_shelf(settings, [name], bundle))
        server = Server(app, settings, lambda words: None)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        running = Running(listener.getsockname()[1], os.getpid(), server)
        try:
            wait_until(lambda: server.started and httpx.get(f"{running.url}/health").status_code == 200)
            yield running
        finally:
            server.should_exit = True
            thread.join(WAIT_SECONDS)


@dataclass
class ServerProcess(Running):
    """A server in a process of its own."""

    process: "subprocess.Popen[str]" = field(kw_only=True)

    def read_stderr(self) -> str:
        """What is left of the standard error."""
        assert self.process.stderr is not None
        return self.process.stderr.read()


@contextmanager
def server_process(*arguments: str, model: str | Path = TINY_BUNDLE) -> Iterator[ServerProcess]:
    """``edgelm serve`` in a process of its own, whose model is loaded."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EDGELM_")}
    command = [sys.executable, "-m", "edgelm", "serve", "--port", "0", "--threads", "1", "-m", str(model), *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    assert process.stderr is not None
    try:
        first = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", first)
        assert found, first + process.stderr.read()
        running = ServerProcess(int(found[1]), process.pid, process=process)
        wait_until(lambda: httpx.get(f"{running.url}/health").status_code == 200)
        yield running
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def official(chat_bundle: Path) -> Iterator[Any]:
    """OpenAI's client of chats, on a server that listens on loopback."""
    openai = pytest.importorskip("openai")
    with running_server(ServeSettings(port=0), chat_bundle) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
