"""Where a checkpoint or an adapter comes from: a folder, or the hub, of which only the files named are fetched."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgelm.errors import ExportError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

Choose = Callable[[set[str]], set[str]]
"""Of the names of a repository's files, those to fetch."""


def locate(source: str, revision: str | None, choose: Choose, what: str) -> tuple[Path, str, str | None]:
    """The folder that holds `source`, its name, and its commit where it came from the hub.

    Args:
        source: a folder or a hub id.
        revision: a branch, tag or commit of a hub id.
        choose: which files to fetch of a hub id.
        what: what the source is to be, for messages: "checkpoint".

    Raises:
        ExportError: it is neither, or cannot be fetched.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ExportError(f"--revision {revision!r} belongs to a hub id, but {source!r} is a folder")
        return folder, folder.resolve().name, None
    if folder.exists():
        raise ExportError(f"{source!r} is a file; give the folder of a {what}, or a hub id")
    if not _HUB_ID.fullmatch(source):
        raise ExportError(f"there is no folder {source!r}, and it is no hub id like 'gpt2' or 'owner/name'")
    return _download(source, revision, choose)


def read_json(path: Path, what: str = "no checkpoint in Hugging Face layout") -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ExportError: there is no such file (then its folder is `what`), or it holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{str(path.parent)!r} holds no {path.name}: it is {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"cannot read {str(path)!r}: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ExportError(f"{str(path)!r} must hold a JSON object")
    return content


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _download(repo: str, revision: str | None, choose: Choose) -> tuple[Path, str, str | None]:
    """Fetch the files export needs, and no others, into the hub's own cache."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(repo, revision=revision)
        names = {file.rfilename for file in info.siblings or []}
        folder = snapshot_download(repo, revision=info.sha, allow_patterns=sorted(choose(names) & names))
    except Exception as error:  # huggingface_hub raises requests' and its own errors, and OSError
        raise ExportError(
            f"cannot fetch {repo!r} from the hub, and there is no such folder: {first_line(error)}"
        ) from None
    return Path(folder), repo, info.sha
