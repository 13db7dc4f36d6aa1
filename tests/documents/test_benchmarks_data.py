"""The script that makes the public data sets, from a local folder or a local server, and its refusals."""

import csv
import functools
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks are not part of a distribution")

from benchmarks.data import DATA_SETS, HELD_OUT_STORIES, DataError, make

COLUMNS = ["WorkerId", "Answer.sentence1", "Answer.sentence10", "Answer.sentence2", "Reject"]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Do nothing, because the log would go to stderr."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a server of the files in `tmp_path / "served"`."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def archive(members: dict[str, str]) -> bytes:
    """A zip archive of texts by name."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for name, text in members.items():
            made.writestr(name, text)
    return stream.getvalue()


def table(*rows: list[str]) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([COLUMNS, *rows])
    return stream.getvalue()


@pytest.mark.network
def test_files_are_downloaded_under_their_new_names(server: str, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / "served" / f"{name}.tsv").write_text(f"{name} \t1\n", encoding="utf-8")
    served = replace(DATA_SETS["sst2"], urls=tuple(f"{server}/{name}.tsv" for name in ("train", "dev")))
    made = dict(make(served, tmp_path / "out", None))
    assert [path.read_text(encoding="utf-8") for path in made] == ["train \t1\n", "dev \t1\n"]
    assert [path.relative_to(tmp_path / "out").as_posix() for path in made] == ["sst2/train.tsv", "sst2/dev.tsv"]
    assert not any(made.values()), "they are not the files that the figures were measured with"


@pytest.mark.network
def test_a_failed_download_names_the_url(server: str, tmp_path: Path) -> None:
    missing = replace(DATA_SETS["tinyshakespeare"], urls=(f"{server}/input.txt",))
    with pytest.raises(DataError, match=r"cannot download http://127.0.0.1:\d+/input.txt: .*404"):
        list(make(missing, tmp_path / "out", None))
    assert not (tmp_path / "out").exists()


def test_held_out_stories_come_first_and_once(tmp_path: Path) -> None:
    held_out = HELD_OUT_STORIES.read_text(encoding="utf-8").split("<|endoftext|>")
    assert len(held_out) == 206
    source = f"A new story.\n<|endoftext|>\n{held_out[3]}<|endoftext|>\n\n<|endoftext|>Another one.\n"
    (tmp_path / "TinyStoriesV2-GPT4-valid.txt").write_text(source, encoding="utf-8")
    ((path, _),) = make(DATA_SETS["stories"], tmp_path / "out", tmp_path)
    stories = [story.strip() for story in path.read_text(encoding="utf-8").split("<|endoftext|>")]
    assert stories == [*(story.strip() for story in held_out), "A new story.", "Another one."]


def test_chats_keep_the_order_of_their_turns_and_lose_blocked_workers(tmp_path: Path) -> None:
    rows = table(["w1", "one", "ten", "two", ""], ["w2", "x", "y", "z", ""], ["w3", "x", "y", "z", "reason"])
    corpus = {"repo/corpus/films/a.csv": rows}
    (tmp_path / "master.zip").write_bytes(archive({**corpus, "repo/blocked_workers.txt": "w2\n"}))
    ((path, _),) = make(DATA_SETS["self_dialogue"], tmp_path / "out", tmp_path)
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"topic": "films", "turns": ["one", "two", "ten"]}
    (tmp_path / "master.zip").write_bytes(archive(corpus))
    with pytest.raises(DataError, match=r"no blocked_workers\.txt"):
        list(make(DATA_SETS["self_dialogue"], tmp_path / "out", tmp_path))


def test_a_broken_archive_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no file wikitext-2-raw-v1\.zip; download it from https://"):
        list(make(DATA_SETS["wikitext2"], tmp_path / "out", tmp_path))
    (tmp_path / "wikitext-2-raw-v1.zip").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"wikitext-2-raw-v1\.zip is not a zip archive"):
        list(make(DATA_SETS["wikitext2"], tmp_path / "out", tmp_path))
