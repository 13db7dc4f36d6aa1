"""`edgelm serve` under load: beside llama-cpp-python's server, and over many short requests.

    python -m benchmarks.serving BUNDLE --gguf FILE --python PYTHON    eight clients at once, both servers in turn
    python -m benchmarks.serving BUNDLE --requests 10000               memory, descriptors and threads

PYTHON is an interpreter with `llama-cpp-python[server]`; FILE holds the same weights as BUNDLE. All servers run on
`--threads` threads. A client sends its next request when the last one is answered, and reads the answer as a stream.
Tokens of all answers are counted with BUNDLE's tokenizer. Prints Markdown; progress goes to stderr. Needs Linux.
"""

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from edgelm.bundle.folder import Bundle
from edgelm.engine.machine import default_threads
from edgelm.text.tokenizer import Tokenizer

STORIES = Path(__file__).parent / "texts" / "stories.txt"
PROMPT_CHARACTERS = 400
START_SECONDS = 120.0
ANSWER_SECONDS = 600.0
SAMPLE_REQUESTS = 1000


@dataclass(frozen=True)
class Answer:
    """What a client saw of one request."""

    first_text_seconds: float
    text: str


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    port: int
    process_id: int

    def stream(self, body: dict[str, object]) -> Answer:
        """Send a completion request, and read its answer to the end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        started, first, pieces = time.perf_counter(), 0.0, list[str]()
        try:
            connection.request(
                "POST",
                "/v1/completions",
                json.dumps(body | {"stream": True}).encode(),
                {"Content-Type": "application/json"},
            )
            response = connection.getresponse()
            if response.status != 200:
                raise SystemExit(f"{self.name} answered {response.status}: {response.read(500)!r}")
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                text = "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
                if text and not pieces:
                    first = time.perf_counter() - started
                pieces.append(text)
        finally:
            connection.close()
        return Answer(first, "".join(pieces))

    def footprint(self) -> tuple[float, int, int]:
        """Resident memory in MB (10^6 bytes), open descriptors, and threads."""
        folder = Path("/proc") / str(self.process_id)
        lines = (folder / "status").read_text().splitlines()
        facts = dict(line.split(":", 1) for line in lines)
        resident_mb = int(facts["VmRSS"].split()[0]) * 1024 / 1e6
        return resident_mb, len(os.listdir(folder / "fd")), int(facts["Threads"])  # noqa: PTH208


@contextmanager
def running(name: str, command: Sequence[str]) -> Iterator[Server]:
    """The server that `command` with ``--port`` starts, once it answers; it ends with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{name} did not start: {' '.join(command)}")
                time.sleep(0.2)
            yield Server(name, port, process.pid)
        finally:
            process.terminate()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v1/models")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def prompts(count: int, seed: int) -> list[str]:
    """Pieces of stories, different ones for every seed."""
    text = STORIES.read_text(encoding="utf-8")
    step = (len(text) - PROMPT_CHARACTERS) // (count + 1)
    starts = [(number * step + seed * 37) % (len(text) - PROMPT_CHARACTERS) for number in range(count)]
    return [text[start : start + PROMPT_CHARACTERS] for start in starts]


def under_load(
    server: Server, tokenizer: Tokenizer, texts: Sequence[str], clients: int, options: dict[str, object]
) -> tuple[float, float]:
    """Tokens per second of all answers together, and the 95th percentile of seconds to the first text."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda text: server.stream({"prompt": text} | options), texts))
    seconds = time.perf_counter() - started
    tokens = sum(len(tokenizer.encode(answer.text)) for answer in answers)
    firsts = sorted(answer.first_text_seconds for answer in answers)
    return tokens / seconds, firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))]


def compare(servers: Sequence[Server], tokenizer: Tokenizer, bundle: Bundle, given: argparse.Namespace) -> None:
    """Print speed and waiting of each server over interleaved rounds; the last server is the baseline."""
    settings = json.loads(bundle.checked_content("generation_config.json"))
    ends = settings.get("eos_token_id", [])
    # Both servers write whole answers: no text ends early.
    never = {str(token): -100 for token in (ends if isinstance(ends, list) else [ends])}
    options = {"max_tokens": given.new_tokens, "temperature": 0.8, "seed": 7, "logit_bias": never}
    rates: dict[str, list[float]] = {server.name: [] for server in servers}
    waits: dict[str, list[float]] = {server.name: [] for server in servers}
    for number in range(given.rounds + 1):
        texts = prompts(given.clients * given.each, number)
        for server in servers:
            rate, wait = under_load(server, tokenizer, texts, given.clients, options)
            print(f"round {number}: {server.name} {rate:.1f} tokens/s, p95 {wait:.2f} s", file=sys.stderr)
            if number:  # the first round is a warm-up
                rates[server.name].append(rate)
                waits[server.name].append(wait)
    base = servers[-1].name
    print(f"| {given.clients} clients | tokens/s (min-max) | x {base} | p95 of first text, s | x {base} |")
    print("|---|--:|--:|--:|--:|")
    for server in servers:
        own, wait_own = rates[server.name], waits[server.name]
        faster = median(mine / other for mine, other in zip(own, rates[base], strict=True))
        sooner = median(mine / other for mine, other in zip(wait_own, waits[base], strict=True))
        spread = f"{median(own):.1f} ({min(own):.1f}-{max(own):.1f})"
        print(f"| {server.name} | {spread} | {faster:.2f} | {median(wait_own):.2f} | {sooner:.2f} |")


def many(server: Server, count: int, clients: int) -> None:
    """Print the footprint while `clients` send `count` short requests."""
    print("| requests | memory, MB | descriptors | threads |")
    print("|--:|--:|--:|--:|")

    def ask(number: int) -> None:
        # Tokenizers keep up to 10,000 words that they have seen, so new words in each request would look like a leak.
        server.stream({"prompt": f"Once upon a time, {number % 100}", "max_tokens": 1 + number % 4, "seed": number})

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for first in range(0, count, SAMPLE_REQUESTS):
            list(pool.map(ask, range(first, min(count, first + SAMPLE_REQUESTS))))
            time.sleep(1)  # closed connections leave
            resident_mb, descriptors, threads = server.footprint()
            done = min(count, first + SAMPLE_REQUESTS)
            print(f"| {done:,} | {resident_mb:.1f} | {descriptors} | {threads} |", flush=True)
    print(f"\n{count / (time.perf_counter() - started):.0f} requests/s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure edgelm serve under load.")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--gguf", metavar="FILE", help="the same weights for llama-cpp-python's server")
    parser.add_argument("--python", metavar="PYTHON", help="interpreter with llama-cpp-python[server]")
    parser.add_argument("--threads", type=int, default=default_threads(), metavar="N", help="default %(default)s")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="default %(default)s")
    parser.add_argument("--each", type=int, default=2, metavar="N", help="requests of a client in a round")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default %(default)s")
    parser.add_argument("--requests", type=int, metavar="N", help="send this number of short requests instead")
    given = parser.parse_args()
    if given.requests is None and (given.gguf is None or given.python is None):
        parser.error("give --gguf FILE and --python PYTHON, or --requests N")
    bundle = Bundle.read(given.bundle)
    tokenizer = Tokenizer.from_json(bundle.checked_content("tokenizer.json").decode())
    threads = str(given.threads)
    ours = partial(
        running,
        "edgelm",
        [sys.executable, "-m", "edgelm", "serve", "-m", str(given.bundle), "--threads", threads, "--max-rows", "8"],
    )
    if given.requests is not None:
        with ours() as server:
            many(server, given.requests, given.clients)
        return
    theirs = [given.python, "-m", "llama_cpp.server", "--model", given.gguf, "--n_ctx", "2048"]
    theirs += ["--n_threads", threads, "--n_threads_batch", threads]
    theirs += ["--interrupt_requests", "false"]  # by default a new request cuts short the one that is being answered
    with ours() as server, running("llama-cpp-python", theirs) as baseline:
        compare([server, baseline], tokenizer, bundle, given)


if __name__ == "__main__":
    main()
