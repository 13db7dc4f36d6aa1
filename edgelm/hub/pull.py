"""``edgelm pull``: a ready bundle comes from the hub into the cache, whole and checked, or not at all."""

import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgelm.bundle.cache import DEFAULT_REVISION, CachedModel, HubName, Ref
from edgelm.bundle.folder import Bundle, file_fact
from edgelm.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileFact, Manifest, read_manifest
from edgelm.bundle.small_files import is_folder, read_small_file, status_of
from edgelm.errors import BundleError, HubError, pass_interrupts_on
from edgelm.hub.client import Tell, ask, import_huggingface_hub
from edgelm.hub.download import Download

_LOCK_SECONDS = 0.2
"""How often to look whether another process has finished."""


def pull(
    name: HubName, tell: Tell = lambda line: None, show: Callable[[float], None] = lambda share: None
) -> tuple[Bundle, Ref]:
    """Fetch the bundle `name` into the cache, unless it is there; returns it, and which commit it is.

    Files that came before a cut, a kill or an error are kept, and the next call goes on behind their last byte. The
    bundle appears in the cache when all of its files are there with the hashes that its manifest states. `tell` gets a
    line about what is waited for, and `show` the share that has come.

    Raises:
        HubError: huggingface_hub is missing; the hub cannot be reached, refuses, or has no such bundle.
        BundleError: what came is no bundle, or its files are not what its manifest says.
    """
    hub = import_huggingface_hub()
    model = CachedModel.of(name.repo)
    try:
        with _turn(model, name, tell):
            return _pull(hub, model, name, tell, show)
    except OSError as error:
        pass_interrupts_on(error)
        reason = f"{error.strerror or error}; free some space, or set EDGELM_CACHE to another folder"
        raise HubError(f"cannot write into the cache {str(model.folder)!r}: {reason}") from None


def _pull(hub: Any, model: CachedModel, name: HubName, tell: Tell, show: Callable[[float], None]) -> tuple[Bundle, Ref]:
    what = f"fetch {str(name)!r} from the hub"

    def describe() -> Any:
        return hub.HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)

    info = ask(describe, name, what, tell)
    ref = Ref(name.repo, name.revision or DEFAULT_REVISION, str(info.sha))
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    target = model.bundle_folder(ref.commit)
    bundle = _whole(target)
    if bundle is None:
        partial = model.partial_folder(ref.commit)
        partial.mkdir(parents=True, exist_ok=True)

        def fetch(file: str, size_bytes: int, show: Callable[[int], None]) -> Path:
            download = Download(name.repo, ref.commit, file, partial, size_bytes)
            ask(lambda: download.run(show), name, what, tell, download.size_now)
            return download.target

        manifest = _manifest(name, sizes, lambda size_bytes: fetch(MANIFEST_NAME, size_bytes, lambda done: None))
        _require_room(model, manifest, partial)
        total = sum(fact.size_bytes for fact in manifest.files.values())
        before = 0
        for file, fact in manifest.files.items():
            start = before
            path = fetch(file, fact.size_bytes, lambda done: show((start + done) / total))  # noqa: B023 (used at once)
            _require_content(path, fact, name)
            before += fact.size_bytes
        bundle = Bundle.read(partial)
        bundle.verify()
        partial.rename(target)
        shutil.rmtree(partial.parent)  # with what was begun of earlier commits
        bundle = Bundle.read(target)
    model.remember(ref)
    try:
        model.remove_unused()
    except PermissionError as error:  # on Windows, where the next pull removes it
        pass_interrupts_on(error)
        tell(f"an earlier commit of {name.repo!r} stays in the cache, because a program uses it")
    return bundle, ref


def _whole(folder: Path) -> Bundle | None:
    """The bundle in `folder` of the cache; None, with the folder removed, if it is not there or was damaged."""
    if not is_folder(folder):
        return None
    try:
        bundle = Bundle.read(folder)
        bundle.verify()
    except BundleError as error:
        pass_interrupts_on(error)
        shutil.rmtree(folder)
        return None
    return bundle


def _manifest(name: HubName, sizes: dict[str, int | None], fetch: Callable[[int], Path]) -> Manifest:
    """The manifest of a repository whose files have `sizes`, in bytes, as the hub states them."""
    if MANIFEST_NAME not in sizes:
        raise HubError(
            f"{str(name)!r} is no bundle, because it holds no {MANIFEST_NAME}: run `edgelm export` on a checkpoint"
        )
    size_bytes = sizes[MANIFEST_NAME]
    if size_bytes is None or size_bytes > MAX_MANIFEST_BYTES:
        raise HubError(f"{MANIFEST_NAME} of {str(name)!r} has more than {MAX_MANIFEST_BYTES:,} bytes")
    path = fetch(size_bytes)
    try:
        manifest = read_manifest(read_small_file(path, MAX_MANIFEST_BYTES))
    except BundleError as error:
        path.unlink()
        raise BundleError(f"cannot use the bundle {str(name)!r}: {error}") from None
    for file, fact in manifest.files.items():
        if file not in sizes:
            raise HubError(f"{str(name)!r} lacks the file {file!r} that its {MANIFEST_NAME} lists")
        if sizes[file] is not None and sizes[file] != fact.size_bytes:
            raise HubError(
                f"{file!r} of {str(name)!r} has {sizes[file]:,} bytes on the hub, but its {MANIFEST_NAME} says "
                f"{fact.size_bytes:,}"
            )
    return manifest


def _require_content(path: Path, fact: FileFact, name: HubName) -> None:
    if file_fact(path) != fact:
        path.unlink()  # or the next pull would keep it
        raise BundleError(
            f"{path.name!r} of {str(name)!r} is not what its {MANIFEST_NAME} says (SHA-256 differs): pull it again, "
            "and tell its owner if that does not help"
        )


def _require_room(model: CachedModel, manifest: Manifest, partial: Path) -> None:
    """Raise HubError if the disk has no room for what is still missing."""
    statuses = (status_of(path) for path in partial.rglob("*"))
    here = sum(status.st_size for status in statuses if status is not None and stat.S_ISREG(status.st_mode))
    missing = sum(fact.size_bytes for fact in manifest.files.values()) - here
    free = shutil.disk_usage(model.folder).free
    if missing > free:
        raise HubError(
            f"{missing / 1e6:,.0f} MB are to come, but the disk of the cache {os.fspath(model.folder)!r} has "
            f"{free / 1e6:,.0f} MB left: free some, or set EDGELM_CACHE to another folder"
        )


@contextmanager
def _turn(model: CachedModel, name: HubName, tell: Tell) -> Iterator[None]:
    """Hold the lock of a model, once no other process holds it."""
    waited = False
    while True:
        with model.locked() as held:
            if held:
                yield
                return
        if not waited:
            tell(f"another process changes {name.repo!r} in the cache: waiting for it")
            waited = True
        time.sleep(_LOCK_SECONDS)
