"""Finds a checkpoint or an adapter: in a folder, or on the hub, from which only the needed files are fetched."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgelm.bundle.small_files import SmallFileError, read_small_file
from edgelm.errors import ExportError
from edgelm.hub.failures import failure_words, is_unreachable

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

MAX_JSON_BYTES = 64 * 2**20
"""Of a JSON file of a checkpoint; tokenizers are the largest."""

POINTER = b"version https://git-lfs"
"""First bytes of a file that git-lfs left in the place of the real one."""

_CACHED = re.compile(r"models--(.+)")

GGUF_SUFFIX = ".gguf"

Choose = Callable[[set[str]], set[str]]
"""Takes the names of a repository's files and returns those to fetch."""


def locate(source: str, revision: str | None, choose: Choose, what: str) -> tuple[Path, str, str | None]:
    """The folder of `source`, its name, and its commit where it came from the hub.

    Args:
        revision: a branch, tag or commit of a hub id.
        choose: chooses the files of a hub id that are fetched.
        what: what the source should be, for messages: "checkpoint".

    Raises:
        ExportError: `source` is neither a folder nor a hub id, or cannot be fetched.
    """
    folder = folder_of(source, revision, what)
    return _download(source, revision, choose, what) if folder is None else (folder, *_name(folder))


def is_gguf(source: str, revision: str | None) -> bool:
    """Whether `source` is a GGUF file; raises ExportError if it is one and has a `revision`."""
    if not (source.endswith(GGUF_SUFFIX) and Path(source).is_file()):
        return False
    if revision is not None:
        raise ExportError(f"--revision {revision!r} belongs to a hub id, but {source!r} is a file")
    return True


def folder_of(source: str, revision: str | None, what: str) -> Path | None:
    """The folder `source`; None where it is a hub id. The arguments and the errors are those of `locate`."""
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ExportError(f"--revision {revision!r} belongs to a hub id, but {source!r} is a folder")
        return folder
    if folder.exists():
        raise ExportError(f"{source!r} is a file; give the folder of a {what}, or a hub id")
    if not _HUB_ID.fullmatch(source):
        raise ExportError(f"there is no folder {source!r}, and it is no hub id like 'gpt2' or 'owner/name'")
    return None


def read_json(
    path: Path, what: str = "no checkpoint in Hugging Face layout", max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        what: words for a folder without this file, for the message.
        max_bytes: a larger file is not read.

    Raises:
        ExportError: the file is missing, cannot be read, or contains no JSON object.
    """
    try:
        text = read_small_file(path, max_bytes)
        if text.startswith(POINTER):
            raise ExportError(
                f"{str(path)!r} is a git-lfs pointer instead of the file; run `git lfs pull` in its folder"
            )
        content = json.loads(text.decode("utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{str(path.parent)!r} holds no {path.name}: it is {what}") from None
    except SmallFileError as error:
        raise ExportError(f"{str(path)!r} {error}; give another file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"cannot read {str(path)!r}: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ExportError(f"{str(path)!r} must hold a JSON object")
    return content


def read_text(path: Path, what: str, max_bytes: int, encoding: str = "utf-8") -> str:
    """The text of a UTF-8 file, which messages call `what`.

    Raises:
        ExportError: the file cannot be read, is larger than `max_bytes`, or is no UTF-8 text.
    """
    try:
        return read_small_file(path, max_bytes).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except SmallFileError as error:
        raise ExportError(f"the {what} {str(path)!r} {error}; give another file") from None
    except OSError as error:
        raise ExportError(f"cannot read the {what} {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ExportError(f"the {what} {str(path)!r} is not UTF-8 text (at byte {error.start})") from None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _name(folder: Path) -> tuple[str, str | None]:
    """The name of a folder, and its commit. A snapshot in the hub's cache has the name of its model."""
    path = Path(os.path.abspath(folder))  # noqa: PTH100 (a snapshot that is a link has its name here, not at its target)
    for place in (path, path.resolve()):
        if place.parent.name == "snapshots" and (found := _CACHED.fullmatch(place.parent.parent.name)):
            return found[1].replace("--", "/", 1), place.name
    return path.resolve().name, None


def _cached(repo: str, revision: str | None, choose: Choose) -> tuple[Path, str] | None:
    """The snapshot of a model in the hub's cache and its commit; None where the cache has no whole one."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception:  # huggingface_hub raises its own errors, and OSError
        return None
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    chosen = choose(names) & names
    described = chosen & {"config.json", "adapter_config.json"}
    return (folder, folder.name) if described and any(n.endswith((".safetensors", ".bin")) for n in chosen) else None


def _download(repo: str, revision: str | None, choose: Choose, what: str) -> tuple[Path, str, str | None]:
    """Fetch the chosen files into the hub's own cache, or find them there while the hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(repo, revision=revision)
        names = {file.rfilename for file in info.siblings or []}
        # By its branch, not its commit: only then does the cache remember which commit the branch is at.
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=sorted(choose(names) & names)))
    except Exception as error:  # huggingface_hub raises its own errors, those of its HTTP library, and OSError
        if is_unreachable(error) and (cached := _cached(repo, revision, choose)):
            return cached[0], repo, cached[1]
        reason = f"{failure_words(error, repo, revision)}, or give the folder of a local {what}"
        raise ExportError(f"cannot fetch {repo!r} from the hub: {reason}") from None
    return folder, repo, folder.name
