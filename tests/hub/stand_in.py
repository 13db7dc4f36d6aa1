"""A stand-in for the Hugging Face hub on this machine, with the API that downloads and uploads use."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = dict[str, bytes]


@dataclass
class Hub:
    """What the stand-in serves, how it fails, and what was asked of it."""

    files: dict[str, Files] = field(default_factory=dict)
    """The files of each repository."""
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main", "v1")
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and path."""
    ranges: list[tuple[str, int]] = field(default_factory=list)
    """The name of each file whose download began in the middle, and where."""
    broken: int | None = None
    """The HTTP status of every answer; None for a hub that works."""
    limited: int = 0
    """So many requests are answered with 429."""
    retry_after: str | None = "0"
    """What these answers say in Retry-After."""
    gated: bool = False
    """Whether the files need the token "accepted"."""
    cuts: int = 0
    """So many downloads of `cut_file` end in the middle."""
    cut_file: str = "model.onnx.data"
    slow_seconds: float = 0.0
    """How long a download of `cut_file` waits in its middle."""
    uploaded: Files = field(default_factory=dict)
    """Large files by their SHA-256."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def fetched(self) -> set[str]:
        """Names of the files that were downloaded."""
        return {path.split("/resolve/")[1].split("/", 1)[1] for method, path in self.asked if "/resolve/" in path}

    def variables(self, folder: Path) -> dict[str, str]:
        """Environment variables of a process that asks this hub, and keeps its caches in `folder`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "hf-home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "EDGELM_CACHE": str(folder / "cache"),
        }


@contextmanager
def serving(hub: Hub) -> Iterator[None]:
    """Serve `hub` on this machine, at `hub.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with hub.lock:
            hub.asked.append((self.command, path))
            limited, hub.limited = hub.limited > 0, max(0, hub.limited - 1)
        if hub.broken is not None:
            self._send(hub.broken, b"{}", {})
        elif limited:
            self._send(429, b"{}", {} if hub.retry_after is None else {"Retry-After": hub.retry_after})
        elif self.command in ("POST", "PUT"):
            self._take(path, content)
        elif path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self._describe(repo, revision or "main")
        elif "/resolve/" in path:
            repo, rest = path[1:].split("/resolve/", 1)
            self._file(repo, *rest.split("/", 1))
        else:
            self._send(404, b"", {})

    def _describe(self, repo: str, revision: str) -> None:
        hub = self.hub
        if repo not in hub.files:
            # The hub does not tell strangers whether a repository is missing or private.
            message = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return self._send(401, b'{"error": "Repository not found"}', message)
        if revision not in (*hub.revisions, hub.commit):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        siblings = [{"rfilename": name, "size": len(content)} for name, content in hub.files[repo].items()]
        info = {"_id": "1", "id": repo, "modelId": repo, "sha": hub.commit, "private": False, "siblings": siblings}
        return self._send_json(info)

    def _file(self, repo: str, revision: str, name: str) -> None:
        hub = self.hub
        content = hub.files.get(repo, {}).get(name)
        if hub.gated and self.headers.get("Authorization") != "Bearer accepted":
            return self._send(403 if self.headers.get("Authorization") else 401, b"", {"X-Error-Code": "GatedRepo"})
        if content is None or revision not in (hub.commit, *hub.revisions):
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
        begin, status = 0, 200
        if (asked := self.headers.get("Range", "")).startswith("bytes=") and self.command == "GET":
            begin, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
            if begin >= len(content):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            hub.ranges.append((name, begin))
        with hub.lock:
            cut = self.command == "GET" and name == hub.cut_file and hub.cuts > 0
            hub.cuts -= cut
        slow = self.command == "GET" and name == hub.cut_file and hub.slow_seconds > 0
        return self._send(status, content[begin:], headers, cut=cut, slow=slow)

    def _take(self, path: str, content: bytes) -> None:
        """Uploads."""
        hub = self.hub
        if self.command == "PUT":
            hub.uploaded[path.rpartition("/")[2]] = content
            return self._send(200, b"", {})
        if self.headers.get("Authorization") != "Bearer writer":
            return self._send(403 if self.headers.get("Authorization") else 401, b'{"error": "no right to write"}', {})
        body = [json.loads(line) for line in content.splitlines() if line]
        if path == "/api/repos/create":
            repo = f"{body[0]['organization']}/{body[0]['name']}"
            if repo in hub.files:
                return self._send_json({"url": f"{hub.url}/{repo}"}, 409)
            hub.files[repo] = {}
            return self._send_json({"url": f"{hub.url}/{repo}"})
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/upload/{one['oid']}"}}} for one in body[0]["objects"]
            ]
            return self._send_json({"transfer": "basic", "objects": objects})
        repo, _, rest = path.removeprefix("/api/models/").partition("/preupload/")
        if rest:
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["size"] > 50_000 else "regular",
                 "shouldIgnore": False, "oid": None}
                for file in body[0]["files"]
            ]  # fmt: skip
            return self._send_json({"files": files})
        repo, _, rest = path.removeprefix("/api/models/").partition("/branch/")
        if rest:
            hub.revisions = (*hub.revisions, rest)
            return self._send_json({})
        repo, _, rest = path.removeprefix("/api/models/").partition("/commit/")
        for line in body:
            value = line["value"]
            if line["key"] == "file":
                hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[repo][value["path"]] = hub.uploaded[value["oid"]]
        return self._send_json({"success": True, "commitOid": hub.commit,
                                "commitUrl": f"{hub.url}/{repo}/commit/{hub.commit}"})  # fmt: skip

    def _send_json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], *, cut: bool = False, slow: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(content) // 2
        self.wfile.write(content[:half])
        if cut:
            self.close_connection = True
            self.connection.close()
            return
        if slow:
            self.wfile.flush()
            threading.Event().wait(self.hub.slow_seconds)
        self.wfile.write(content[half:])

    def log_message(self, format: str, *args: object) -> None:
        pass
