"""The cache of bundles that `edgelm pull` fetched: where it is, what it holds, and which bundle a name means.

    FOLDER/models/OWNER--NAME/COMMIT/           a bundle, whole and checked before it appears
    FOLDER/models/OWNER--NAME/refs/HASH.json    which commit a revision meant when it was pulled
    FOLDER/models/OWNER--NAME/partial/COMMIT/   a download that is not finished
    FOLDER/models/OWNER--NAME/pull.lock         locked by the process that changes this folder

Reading it never asks the network.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from edgelm.bundle.small_files import SmallFileError, is_folder, read_small_file
from edgelm.bundle.strict_json import StrictJsonError, from_json, parse_json
from edgelm.bundle.whole_file import lock, write_whole_file
from edgelm.errors import BundleError, pass_interrupts_on

DEFAULT_REVISION = "main"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9])?"
_MODEL = re.compile(rf"({_PART})/({_PART})(?:@([A-Za-z0-9][A-Za-z0-9_./-]{{0,199}}))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_REF_BYTES = 4096
_REMOVED = ".removed-"


@dataclass(frozen=True, slots=True)
class HubName:
    """The name of a model on the hub, such as "owner/name" or "owner/name@v1"."""

    repo: str
    revision: str | None = None
    """A branch, tag or commit; None stands for DEFAULT_REVISION."""

    @classmethod
    def parsed(cls, text: str) -> "HubName | None":
        """`text` as a name; None where it does not have the form of one."""
        match = _MODEL.fullmatch(text)
        if match is None or "--" in text or ".." in text:
            return None
        return cls(f"{match[1]}/{match[2]}", match[3])

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


@dataclass(frozen=True, slots=True)
class Ref:
    """A revision of a model that was pulled, and its commit."""

    repo: str
    revision: str
    commit: str


def cache_folder() -> Path:
    """The folder of the cache: ``EDGELM_CACHE``, or a folder of the platform for caches."""
    if chosen := os.environ.get("EDGELM_CACHE"):
        return Path(chosen).absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "edgelm" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edgelm"
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(chosen) if chosen.startswith("/") else Path.home() / ".cache") / "edgelm"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """The folder of one model in the cache, which need not exist."""

    folder: Path

    @classmethod
    def of(cls, repo: str) -> "CachedModel":
        """The folder of the model `repo`, "owner/name"."""
        return cls(cache_folder() / "models" / repo.replace("/", "--"))

    def refs(self) -> list[Ref]:
        """The revisions that were pulled; a damaged record is left out."""
        return sorted(self._refs(), key=lambda ref: ref.revision)

    def bundle_folder(self, commit: str) -> Path:
        """The folder of the bundle of a commit."""
        return self.folder / commit

    def partial_folder(self, commit: str) -> Path:
        """The folder in which the files of a commit arrive."""
        return self.folder / "partial" / commit

    def find(self, revision: str | None) -> Path | None:
        """The bundle of a revision, or of the default one; None if it was not pulled."""
        wanted = revision or DEFAULT_REVISION
        commits = [ref.commit for ref in self._refs() if ref.revision == wanted]
        commits += [wanted] if _COMMIT.fullmatch(wanted) else []
        return next((self.folder / commit for commit in commits if is_folder(self.folder / commit)), None)

    def remember(self, ref: Ref) -> None:
        """Record which commit a revision means, in one step; raises OSError."""
        path = self._ref_file(ref.revision)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole_file(path, json.dumps(asdict(ref)).encode())

    def forget(self, revision: str | None) -> None:
        """Remove a revision, or without one the whole model. Call it inside `locked`.

        Raises OSError; then the revision is still there, because on Windows a bundle that a program uses cannot go.
        """
        self.remove_unused(ref for ref in self._refs() if ref.revision == revision or revision is None)
        if revision is not None:
            self._ref_file(revision).unlink(missing_ok=True)
            return
        for path in (self.folder / "refs", self.folder / "partial"):
            if is_folder(path):
                shutil.rmtree(path)

    def remove_unused(self, ending: Iterable[Ref] = ()) -> None:
        """Remove the bundles that no revision means, not counting `ending`. Call it inside `locked`; raises OSError."""
        used = {ref.commit for ref in set(self._refs()) - set(ending)}
        for left in self.folder.glob(f"{_REMOVED}*"):  # by a process that was killed
            shutil.rmtree(left)
        for path in list(self.folder.iterdir()):
            if _COMMIT.fullmatch(path.name) and path.name not in used:
                gone = path.with_name(f"{_REMOVED}{path.name}")  # in one step, so that nobody reads half of it
                path.rename(gone)
                shutil.rmtree(gone)

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold the lock of this model. Yields False at once where another process holds it; raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "pull.lock").open("ab") as stream:
            try:
                lock(stream)
            except (BlockingIOError, PermissionError) as error:  # the latter on Windows
                pass_interrupts_on(error)
                yield False
                return
            yield True

    def _refs(self) -> Iterator[Ref]:
        for path in (self.folder / "refs").glob("*.json"):
            try:
                ref = from_json(Ref, parse_json(read_small_file(path, _MAX_REF_BYTES)))
            except (OSError, SmallFileError, StrictJsonError) as error:
                pass_interrupts_on(error)
                continue
            if _COMMIT.fullmatch(ref.commit) and path == self._ref_file(ref.revision):
                yield ref

    def _ref_file(self, revision: str) -> Path:
        # A revision may have slashes, or differ from another one in upper and lower case only.
        return self.folder / "refs" / f"{hashlib.sha256(revision.encode()).hexdigest()[:32]}.json"


def cached_refs() -> list[tuple[Ref, Path]]:
    """Every revision in the cache, with the folder of its bundle."""
    found = []
    for folder in sorted((cache_folder() / "models").glob("*--*")):
        model = CachedModel(folder)
        found += [(ref, model.bundle_folder(ref.commit)) for ref in model.refs()]
    return found


def find_pulled(name: HubName) -> Path:
    """The folder of a pulled bundle; raises BundleError if it was not pulled."""
    folder = CachedModel.of(name.repo).find(name.revision)
    if folder is None:
        raise BundleError(
            f"there is no such folder or file, and no model of this name was pulled; run: edgelm pull {name}"
        )
    return folder
