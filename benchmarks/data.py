"""Makes the public data sets that the commands of the documents use.

    python -m benchmarks.data all
    python -m benchmarks.data stories sst2 --from DOWNLOADS

Files go into `data/`. Without `--from` they are downloaded; with it, they are read from a folder of files that were
downloaded before, each under the last part of its URL. HF_ENDPOINT names another Hugging Face hub. `--help` lists the
data sets with their licences. Evaluation texts that are small and free lie in `benchmarks/texts` already.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import textwrap
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEFAULT_OUT = ROOT / "data"
HELD_OUT_STORIES = ROOT / "benchmarks" / "texts" / "stories.txt"
END_OF_TEXT = "<|endoftext|>"
STORIES = 10_329
MAX_BYTES = 500_000_000
"""Of a download and of a file in an archive."""

_HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
_GITHUB_FILES = "https://raw.githubusercontent.com"

Make = Callable[[Mapping[str, Path]], Mapping[str, bytes]]
"""From downloaded files by name to the contents of the files to write, by name."""


class DataError(Exception):
    """A data set cannot be made. The message says why in one sentence."""


@dataclass(frozen=True)
class DataSet:
    """A public data set and the files made from it."""

    about: str
    licence: str
    urls: tuple[str, ...]
    make: Make
    sha256: Mapping[str, str]
    """Of the files that the documents' figures were measured with, by name: their hashes in hexadecimal."""


def _copied(targets: Mapping[str, str]) -> Make:
    """Copies of downloaded files: name of the download to name of the file to write."""
    return lambda downloads: {target: downloads[name].read_bytes() for name, target in targets.items()}


def make_stories(downloads: Mapping[str, Path]) -> Mapping[str, bytes]:
    """The 206 held-out stories of the repository, then stories of TinyStories up to 10,329 in all."""
    (path,) = downloads.values()
    held_out = _documents(HELD_OUT_STORIES.read_text(encoding="utf-8"))
    known = set(held_out)
    training = [story for story in _documents(path.read_text(encoding="utf-8")) if story not in known]
    stories = [*held_out, *training][:STORIES]
    return {"stories.txt": (f"\n{END_OF_TEXT}\n".join(stories) + "\n").encode()}


def _documents(text: str) -> list[str]:
    return [story for part in text.split(END_OF_TEXT) if (story := part.strip())]


def make_wikitext2(downloads: Mapping[str, Path]) -> Mapping[str, bytes]:
    """The raw validation text out of its archive."""
    (path,) = downloads.values()
    with _archive(path) as archive:
        return {"wikitext2.valid.txt": _member(archive, "wikitext-2-raw/wiki.valid.raw")}


def make_self_dialogue(downloads: Mapping[str, Path]) -> Mapping[str, bytes]:
    """One JSON object a chat, from the tables of all topics; workers that the corpus blocks are left out."""
    (path,) = downloads.values()
    with _archive(path) as archive:
        names = sorted(archive.namelist())
        blocked_name = next((name for name in names if name.endswith("/blocked_workers.txt")), None)
        if blocked_name is None:
            raise DataError(f"{path.name} has no blocked_workers.txt, so it is not The Self-dialogue Corpus")
        blocked = set(_member(archive, blocked_name).decode("utf-8").split())
        tables = [name for name in names if "/corpus/" in name and name.endswith(".csv")]
        lines = [line for name in tables for line in _chats(_member(archive, name).decode("utf-8"), name, blocked)]
    return {"self_dialogue.jsonl": "".join(lines).encode()}


def _chats(table: str, name: str, blocked: set[str]) -> Iterator[str]:
    topic = Path(name).parent.name
    for row in csv.DictReader(io.StringIO(table, newline="")):
        if row.get("Reject") or row["WorkerId"] in blocked:
            continue
        columns = [column for column in row if column and column.startswith("Answer.sentence")]
        columns.sort(key=lambda column: int(column.removeprefix("Answer.sentence")))
        turns = [row[column] for column in columns if row[column]]
        yield json.dumps({"topic": topic, "turns": turns}, ensure_ascii=False) + "\n"


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise DataError(f"{path.name} is not a zip archive; download it again") from None


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        size = archive.getinfo(name).file_size
    except KeyError:
        raise DataError(f"the archive has no file {name!r}") from None
    if size > MAX_BYTES:
        raise DataError(f"{name!r} has {size:,} bytes, more than the limit of {MAX_BYTES:,}")
    return archive.read(name)


DATA_SETS = {
    "stories": DataSet(
        "10,329 short stories for children: first the 206 held-out ones of benchmarks/texts, then stories to train on. "
        "The documents' models were trained on another slice of TinyStories, so your figures come out close, not equal",
        "CDLA-Sharing-1.0",
        (f"{_HUB}/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt",),
        make_stories,
        {"stories.txt": "0c8bff7ea80f072af897c12826becc2f5be0fb87a233dbea34ac795fb95a9525"},
    ),
    "tinyshakespeare": DataSet(
        "40,000 lines of Shakespeare's plays",
        "public domain",
        (f"{_GITHUB_FILES}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
        _copied({"input.txt": "tinyshakespeare.txt"}),
        {"tinyshakespeare.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    ),
    "wikitext2": DataSet(
        "the raw validation text of WikiText-2",
        "CC BY-SA 3.0",
        (f"{_HUB}/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",),
        make_wikitext2,
        {"wikitext2.valid.txt": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7"},
    ),
    "gpt2_tokenizer": DataSet(
        "the tokenizer of the real GPT-2",
        "MIT",
        (f"{_HUB}/openai-community/gpt2/resolve/main/tokenizer.json",),
        _copied({"tokenizer.json": "gpt2_tokenizer/tokenizer.json"}),
        {"gpt2_tokenizer/tokenizer.json": "8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2bfae8a5a9e970478a6"},
    ),
    "sst2": DataSet(
        "SST-2, film reviews with 0 (negative) or 1 (positive): 6,920 to train on, 872 to test on",
        "not stated by the source; do not redistribute",
        tuple(
            f"{_GITHUB_FILES}/clairett/pytorch-sentiment-classification/master/data/SST2/{name}.tsv"
            for name in ("train", "dev")
        ),
        _copied({"train.tsv": "sst2/train.tsv", "dev.tsv": "sst2/dev.tsv"}),
        {
            "sst2/train.tsv": "ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920",
            "sst2/dev.tsv": "eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359",
        },
    ),
    "self_dialogue": DataSet(
        "The Self-dialogue Corpus (Krause et al. 2017, arXiv 1709.09816): about 24,000 chats",
        "BSD-3-Clause",
        ("https://github.com/jfainberg/self_dialogue_corpus/archive/refs/heads/master.zip",),
        make_self_dialogue,
        {"self_dialogue.jsonl": "3b6cc3546af76a39a14b443c67fc85924d8da6df088f5d294579592823882ef2"},
    ),
}


def make(data_set: DataSet, out: Path, source: Path | None) -> Iterator[tuple[Path, bool]]:
    """Write the files of a data set.

    Args:
        out: folder to write into.
        source: folder of files downloaded before; None downloads them.

    Yields:
        The path of each file, and whether it equals the one that the documents' figures were measured with.

    Raises:
        DataError: a file cannot be downloaded, is missing in `source`, or has unexpected content.
    """
    with tempfile.TemporaryDirectory() as folder:
        downloads = {}
        for url in data_set.urls:
            name = url.rpartition("/")[2]
            path = downloads[name] = (source or Path(folder)) / name
            if source is None:
                download(url, path)
            elif not path.is_file():
                raise DataError(f"{source} has no file {name}; download it from {url}")
        contents = data_set.make(downloads)
    for name, content in contents.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        yield path, hashlib.sha256(content).hexdigest() == data_set.sha256[name]


def download(url: str, path: Path) -> None:
    """Write what `url` gives to `path`.

    Raises:
        DataError: the download fails or is larger than `MAX_BYTES`.
    """
    print(f"downloading {url}", file=sys.stderr)
    try:
        with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as file:
            if int(response.headers.get("Content-Length") or 0) > MAX_BYTES:
                raise DataError(f"{url} is larger than the limit of {MAX_BYTES:,} bytes")
            shutil.copyfileobj(response, file)
    except (OSError, ValueError) as error:
        is_http = isinstance(error, urllib.error.HTTPError)
        reason = error.reason if isinstance(error, urllib.error.URLError) and not is_http else error
        raise DataError(f"cannot download {url}: {reason}") from None


def _listing() -> str:
    lines = []
    for name, data_set in DATA_SETS.items():
        lines += [
            f"  {name}: {', '.join(data_set.sha256)}",
            *_indented(f"{data_set.about}. Licence: {data_set.licence}."),
        ]
        lines += [f"    {url}" for url in data_set.urls]
    return "data sets:\n" + "\n".join(lines)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="    ", subsequent_indent="    ")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description="Make the public data sets that the documents' commands use.",
        epilog=_listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", choices=[*DATA_SETS, "all"], help="a data set, or all")
    parser.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="use files downloaded before")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="FOLDER", help="default: data/ of the clone")
    options = parser.parse_args()
    failed = False
    for name in DATA_SETS if "all" in options.names else dict.fromkeys(options.names):
        data_set = DATA_SETS[name]
        if all((options.out / file).is_file() for file in data_set.sha256):
            print(f"{name}: there already in {options.out}")
            continue
        try:
            for path, same in make(data_set, options.out, options.source):
                relation = "equal to" if same else "not equal to"
                print(f"{path}: {relation} the file that the documents' figures were measured with")
        except DataError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
