"""What clients may do to a connection: each abuse is answered or cut, and others notice nothing."""

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from edgelm.serve.settings import ServeSettings
from tests.serve.conftest import Running, post, read_all, running_server, wait_until

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
PROMPT = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}
LONG = {"prompt": "H", "max_tokens": 60, "n": 8, "temperature": 1.0, "eos_token_id": []}
MEMORY_BYTES = 20 * 2**20


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    settings = ServeSettings(port=0, idle_seconds=2.0, body_seconds=2.0, send_seconds=2.0, max_connections=260)
    with running_server(settings) as server:
        httpx.post(f"{server.url}/v1/completions", json=PROMPT)
        yield server


def status(answer: bytes) -> int:
    """The status of an answer that is JSON in the shape of all errors."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert json.loads(body)["error"]["message"]
    return int(head.split()[1])


@pytest.mark.parametrize(
    ("kind", "host", "expected"),
    [("text/plain", "localhost", 415), ("application/json", "evil.example", 403)],
)
def test_a_refused_body_is_read_so_that_the_answer_arrives(
    server: Running, kind: str, host: str, expected: int
) -> None:
    """A connection that is closed with unread bytes is reset, and the client may lose the answer."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: 1000000\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode() + b"a" * 900_000)
        time.sleep(0.1)  # the server has seen the head by now
        connection.sendall(b"a" * 100_000)
        answer = b""
        while piece := connection.recv(1 << 16):  # a reset raises
            answer += piece
    assert status(answer) == expected


def test_who_waits_to_send_a_body_is_not_asked_for_it(server: Running) -> None:
    """With "Expect: 100-continue" the refusal comes at once, and there is nothing to read."""
    head = HEAD.replace(b"application/json", b"text/plain") + b"Expect: 100-continue\r\nContent-Length: 200000\r\n\r\n"
    assert status(server.answer(head)) == 415


@pytest.mark.parametrize(
    "pieces, expected",
    [
        ([b"GARBAGE\r\n\r\n"], {400}),
        ([b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2**20 + b"\r\n\r\n"], {400, 431}),
        ([b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: a\r\n" % n for n in range(10_000)) + b"\r\n"], {400, 431}),
        ([b"GET /" + b"a" * 10_000_000 + b" HTTP/1.1\r\n\r\n"], {400}),
        ([b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"], {400}),
        ([b"GET /health HTTP/1.1\r\nHost: \x00\r\n\r\n"], {400}),
        ([b"GET /health HTTP/1.0\r\n\r\n"], {403}),
        ([CHUNKED + b"-2\r\nab\r\n"], {400}),
        ([CHUNKED + b"fffffffffffffffffff\r\n"], {400, 408, 413}),
        ([CHUNKED] + [b"10000\r\n" + b"a" * 65_536 + b"\r\n"] * 200, {413}),
        ([CHUNKED] + [b"1\r\na\r\n" * 10_000] * 100, {400, 413}),
        ([HEAD + b"Content-Length: 3000000\r\n\r\n", b"a" * 3_000_000], {413}),
        ([HEAD + b"Content-Length: -5\r\n\r\nabcde"], {400}),
        ([HEAD + b"Content-Length: 99999999999999999999999999\r\n\r\nabcde"], {400, 413}),
        ([HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"], {400}),
        ([HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"], {400}),
        ([HEAD + b"Content-Length: 60000\r\n\r\n" + b"[" * 60_000], {400}),
        ([HEAD + b"Content-Length: 2\r\n\r\n{}{}"], {400}),
    ],
)
def test_abuse_is_answered(server: Running, pieces: list[bytes], expected: set[int]) -> None:
    before = server.resident_bytes
    assert status(server.answer(*pieces)) in expected
    assert server.resident_bytes - before < MEMORY_BYTES
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("length", [50, 10**6])
def test_a_body_shorter_than_its_length(server: Running, length: int) -> None:
    assert status(server.answer(HEAD + f"Content-Length: {length}\r\n\r\n".encode() + b"{")) == 408


def test_requests_in_one_piece(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(post("/v1/completions", PROMPT) * 10 + HEAD + b"Content-Length: 2\r\n\r\n{}")
        answers = read_all(connection)
    assert answers.count(b"HTTP/1.1 200 OK") == 10
    assert answers.count(b"HTTP/1.1 400 Bad Request") == 1


def test_slow_clients_are_cut_and_disturb_nobody(server: Running) -> None:
    slow = [server.connect() for _ in range(200)]
    open_ones, rest = list(slow), bytearray(b"POST /v1/completions HTTP/1.1\r\n" + b"X-Slow: 1\r\n" * 100)

    def drip() -> bool:
        """Send another byte on each; returns whether all of them were cut."""
        for connection in list(open_ones):
            try:
                connection.sendall(rest[:1])
                connection.setblocking(False)
                if connection.recv(1) == b"":
                    open_ones.remove(connection)
            except BlockingIOError:
                connection.setblocking(True)
            except OSError:
                open_ones.remove(connection)
        del rest[:1]
        return not open_ones

    try:
        drip()
        for _ in range(3):
            assert httpx.post(f"{server.url}/v1/completions", json=PROMPT).status_code == 200
        wait_until(drip)
    finally:
        for connection in slow:
            connection.close()


def test_a_newcomer_takes_the_place_of_the_quietest(server: Running) -> None:
    quiet = [server.connect() for _ in range(300)]
    try:
        assert httpx.post(f"{server.url}/v1/completions", json=PROMPT).status_code == 200
        assert quiet[0].recv(1) == b""
    except ConnectionResetError:
        pass
    finally:
        for connection in quiet:
            connection.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(server: Running, stream: bool) -> None:
    abandoned = 'edgelm_texts_total{model="tiny",reason="abandoned"}'
    before = server.metric(abandoned)
    clients = [server.connect() for _ in range(6)]
    for connection in clients:
        connection.sendall(post("/v1/completions", {**LONG, "stream": stream}))
    wait_until(lambda: server.metric('edgelm_model_decoding{model="tiny"}') > 0)
    for connection in clients:  # as a killed process leaves
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    wait_until(lambda: server.metric('edgelm_model_users{model="tiny"}') == 0)
    wait_until(lambda: server.metric('edgelm_model_decoding{model="tiny"}') == 0)
    assert server.metric('edgelm_model_waiting{model="tiny"}') == 0
    assert server.metric(abandoned) > before


def test_a_client_that_reads_nothing_is_dropped(server: Running) -> None:
    assert server.server is not None
    connections = server.server.server_state.connections
    wait_until(lambda: not connections)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    with client:
        client.setblocking(False)
        requests = memoryview(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        client.send(requests)
        wait_until(lambda: len(connections) == 1)
        wait_until(lambda: not connections)


def test_many_clients_at_once(server: Running) -> None:
    texts: list[str] = []

    def ask(number: int) -> None:
        body = {"prompt": f"Hello {number % 4}", "max_tokens": 12, "seed": number % 4, "temperature": 1.3}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        texts.append(f"{number % 4}: {answer.json()['choices'][0]['text']}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 12
    assert len(set(texts)) == 4


def test_large_bodies_together_have_a_limit() -> None:
    with running_server(ServeSettings(port=0, max_bodies_bytes=2**20)) as server:

        def refused_beside_another() -> bool:
            with server.connect() as waiting:  # whichever of the two comes later is refused
                waiting.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + b" " * 999_000)
                return status_of_large(server) == 503

        wait_until(refused_beside_another)
        wait_until(lambda: status_of_large(server) == 400)


def status_of_large(server: Running) -> int:
    """The status of a request with half a megabyte of nothing."""
    return status(server.answer(HEAD + b"Content-Length: 500000\r\n\r\n" + b" " * 500_000))


def test_a_full_queue_says_when_to_come_back() -> None:
    with running_server(ServeSettings(port=0, max_rows=1, max_waiting=1)) as server:
        clients = [server.connect() for _ in range(6)]
        for connection in clients:
            connection.sendall(post("/v1/completions", {**LONG, "n": 4}, headers="Connection: close\r\n"))
        answers = [read_all(connection) for connection in clients]
        for connection in clients:
            connection.close()
    refused = [answer for answer in answers if b" 429 " in answer[:20]]
    assert refused
    assert all(b"\r\nretry-after: " in answer for answer in refused)
    assert {status(answer) for answer in refused} == {429}
    assert sum(answer.startswith(b"HTTP/1.1 200 OK") for answer in answers) + len(refused) == 6
