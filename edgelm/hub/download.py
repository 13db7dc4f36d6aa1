"""One file of the hub, fetched from where an earlier try stopped.

huggingface_hub tells the address, signs the request and knows the errors. Its own downloads are not used, because since
its version 1.33 they forget what came before a cut or a kill, and write as many bytes as a server sends.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from edgelm.bundle.small_files import status_of

CHUNK_BYTES = 2**15
TIMEOUT_SECONDS = 30.0
"""How long the hub may be silent."""


class Download:
    """A file of a commit on its way into a folder."""

    def __init__(self, repo: str, commit: str, file: str, folder: Path, size_bytes: int) -> None:
        """Nothing is asked yet. `size_bytes` is what the manifest or the hub states."""
        self._repo, self._commit, self._file, self._size_bytes = repo, commit, file, size_bytes
        self.target = folder / file
        """The file, once it is whole."""
        self._part = folder / f".{file}.part"

    def size_now(self) -> int:
        """How many bytes have come."""
        status = status_of(self._part)
        return 0 if status is None else status.st_size

    def run(self, show: Callable[[int], None]) -> None:
        """Fetch what is missing; `show` gets the number of bytes that are there.

        Raises exceptions of huggingface_hub or of its HTTP library if the hub fails, ConnectionError if fewer or more
        bytes come than stated, and OSError if the file cannot be written.
        """
        if (status := status_of(self.target)) is not None and status.st_size == self._size_bytes:
            return
        begin = self.size_now()
        if begin > self._size_bytes:
            self._part.unlink()
            begin = 0
        if begin < self._size_bytes or not begin:
            self._fetch(begin, show)
        self._part.replace(self.target)

    def _fetch(self, begin: int, show: Callable[[int], None]) -> None:
        utils: Any = import_module("huggingface_hub.utils")
        headers = {**utils.build_hf_headers(library_name="edgelm"), "Accept-Encoding": "identity"}
        if begin:
            headers["Range"] = f"bytes={begin}-"
        hub: Any = import_module("huggingface_hub")
        url = hub.hf_hub_url(self._repo, self._file, revision=self._commit)
        with _answer(url, headers) as (response, blocks), self._part.open("ab") as stream:
            utils.hf_raise_for_status(response)
            if begin and response.status_code != 206:  # the server sends the whole file
                stream.truncate(0)
                begin = 0
            for block in blocks:
                begin += len(block)
                if begin > self._size_bytes:
                    stream.truncate(0)
                    raise ConnectionError("more bytes came than the file has")
                stream.write(block)
                show(begin)
        if begin < self._size_bytes:
            raise ConnectionError("the answer was cut off")


@contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """The answer to a GET request, and its content in blocks, with the HTTP library that huggingface_hub uses."""
    utils: Any = import_module("huggingface_hub.utils")
    session = utils.get_session()
    if callable(getattr(session, "stream", None)):  # httpx, since version 1
        options = {"headers": headers, "timeout": TIMEOUT_SECONDS, "follow_redirects": True}
        with session.stream("GET", url, **options) as response:
            if response.status_code >= 400:
                response.read()  # its text is part of the error
            yield response, response.iter_bytes()
    else:  # requests, whose sessions have an attribute `stream` that is no method
        with session.get(url, headers=headers, timeout=TIMEOUT_SECONDS, stream=True) as response:
            yield response, response.iter_content(CHUNK_BYTES)
