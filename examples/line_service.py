"""A service on a Unix socket: a client sends one line with a prompt and gets its continuation piece by piece.

    python examples/line_service.py /tmp/edgelm.socket &
    echo "Once upon a time" | nc -U /tmp/edgelm.socket

edgelm.service runs it under systemd.
"""

import os
import signal
import socketserver
import sys
import threading
from pathlib import Path

import edgelm

SLOTS = threading.Semaphore(2)


class Handler(socketserver.StreamRequestHandler):
    timeout = 30  # seconds for a client to send its line

    def handle(self) -> None:
        prompt = self.rfile.readline(10_000).decode("utf-8", "replace").strip()
        try:
            with SLOTS:
                for chunk in model.stream(prompt, max_new_tokens=60, max_time=20.0, context_overflow="truncate"):
                    self.wfile.write(chunk.text.encode())
        except edgelm.EdgelmError as error:
            self.wfile.write(f"error: {error}".encode())
        except OSError:
            return  # the client left; leaving the loop ended the computation
        self.wfile.write(b"\n")


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python line_service.py SOCKET\n")
        sys.exit(2)
    path = sys.argv[1]
    with edgelm.load(os.environ.get("EDGELM_MODEL")) as model, Server(path, Handler) as server:
        model.warmup()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        print(f"ready, {model.memory.present_bytes / 1e6:.0f} MB", flush=True)
        server.serve_forever()
    Path(path).unlink()
