"""A bundle on disk: read, checked, hashed. ``docs/bundle-format.md`` describes the format."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from edgelm.bundle.graph_rules import check_graph
from edgelm.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileFact, Manifest, read_manifest
from edgelm.bundle.onnx_file import MAX_GRAPH_BYTES
from edgelm.bundle.small_files import is_folder, status_of
from edgelm.bundle.strict_json import StrictJsonError, parse_json
from edgelm.errors import BundleError, ConfigError, pass_interrupts_on, shown

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What changes when a file is replaced (its inode) or written into.

    Its time of modification alone would not do, because some programs that copy set it back.
    """

    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle folder. Its manifest, its file list, all sizes and the hashes of its small files have been checked."""

    path: Path
    """The folder, absolute."""
    manifest: Manifest

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Bundle":
        """Open the bundle in the folder `path`.

        This checks the manifest and its digest, that the folder holds exactly the listed files, their sizes, the hashes
        of all files except the weights, and what the graph may do. `verify` hashes the weights too. Raises BundleError
        if the folder is missing, is no bundle, differs from its manifest, or has a graph that no exporter writes.
        """
        try:
            folder = Path(path).absolute()
            if not is_folder(folder):
                raise BundleError(_no_folder(folder))
            bundle = cls(folder, read_manifest(_read_manifest_file(folder)))
            bundle._check_listing()
            graph = b""
            for name, fact in bundle.manifest.files.items():
                if name == bundle.manifest.graph.file and fact.size_bytes <= MAX_GRAPH_BYTES:
                    graph = bundle._hashed_content(name, fact)
                elif name != bundle.manifest.graph.weights_file:
                    bundle._check_hash(name, fact)
            bundle._check_graph(graph)
        except BundleError as error:
            raise BundleError(f"cannot use the bundle {os.fspath(path)!r}: {error}") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
            pass_interrupts_on(error)
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise BundleError(f"cannot read the bundle {os.fspath(path)!r}: {reason}") from None
        return bundle

    def verify(self, progress: Callable[[str, int], None] | None = None) -> int:
        """Hash every file, weights included; returns the total number of bytes.

        `progress` is called with the name and the size in bytes of each file before it is read. Raises BundleError if a
        file differs from the manifest.
        """
        total = 0
        self._check_listing()
        for name, fact in self.manifest.files.items():
            if progress is not None:
                progress(name, fact.size_bytes)
            self._check_hash(name, fact)
            total += fact.size_bytes
        return total

    def stamps(self) -> dict[str, FileStamp]:
        """The stamps of the graph's file and of its weights, by name; a missing file is left out."""
        stamps = {}
        for name in (self.manifest.graph.file, self.manifest.graph.weights_file):
            try:
                facts = self.file(name).stat()
            except OSError as error:
                pass_interrupts_on(error)
                continue
            stamps[name] = FileStamp(facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        return stamps

    def require_unchanged(self, stamps: dict[str, FileStamp]) -> None:
        """Raise BundleError if the folder no longer holds this bundle.

        Files with other stamps than `stamps` are hashed.
        """
        try:
            content = parse_json(_read_manifest_file(self.path))
        except (BundleError, StrictJsonError, OSError) as error:
            pass_interrupts_on(error)
            content = None
        if not isinstance(content, dict) or content.get("digest") != self.manifest.digest:
            raise BundleError(f"the bundle {os.fspath(self.path)!r} was replaced after it was loaded: load it again")
        now = self.stamps()
        for name, stamp in stamps.items():
            if now.get(name) != stamp:
                self.require_content(name)

    def require_content(self, name: str) -> None:
        """Raise BundleError if the content of the file `name` is not what the manifest says."""
        try:
            self._check_hash(name, self.manifest.files[name])
        except (BundleError, OSError) as error:
            pass_interrupts_on(error)
            raise BundleError(
                f"{name!r} of {os.fspath(self.path)!r} was written into after it was loaded: export or download the "
                "bundle again, and replace files by renaming new ones"
            ) from None

    def with_context(self, tokens: int) -> "Bundle":
        """The bundle with a context of `tokens` tokens, which may be shorter than its own; raises ConfigError."""
        facts = self.manifest.architecture
        if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= facts.context_length:
            whole = f"the bundle's own context of {facts.context_length}"
            raise ConfigError(f"context must be a whole number from 1 to {whole}, got {shown(tokens)}")
        return replace(self, manifest=replace(self.manifest, architecture=replace(facts, context_length=tokens)))

    def file(self, name: str) -> Path:
        """The path of the bundle's file `name`."""
        return self.path / name

    @property
    def size_bytes(self) -> int:
        """Total size of all files, the manifest included."""
        return sum(f.size_bytes for f in self.manifest.files.values()) + self.file(MANIFEST_NAME).stat().st_size

    @property
    def file_count(self) -> int:
        """The number of files, the manifest included."""
        return len(self.manifest.files) + 1

    def graph_content(self) -> bytes:
        """The content of the graph's file; raises BundleError if it is not what the manifest says."""
        name = self.manifest.graph.file
        try:
            return self._hashed_content(name, self.manifest.files[name])
        except OSError as error:
            pass_interrupts_on(error)
            raise BundleError(f"cannot read {name!r} of {os.fspath(self.path)!r}: {error.strerror or error}") from None

    def _check_listing(self) -> None:
        listed = self.manifest.files
        # Other tools write dot files (.gitattributes, .DS_Store). They are never read.
        present = {entry.name for entry in os.scandir(self.path) if not entry.name.startswith(".")}
        for name in sorted(present - set(listed) - {MANIFEST_NAME}):
            raise BundleError(f"the file {name!r} is not listed in {MANIFEST_NAME}; remove it")
        for name, fact in listed.items():
            if name not in present:
                raise BundleError(f"the file {name!r} is missing; export or download the bundle again")
            size = _regular_file_size(self.path / name)
            if size != fact.size_bytes:
                raise BundleError(
                    f"{name!r} has {size:,} bytes instead of {fact.size_bytes:,}: it is truncated or altered; "
                    "export or download the bundle again"
                )

    def _check_graph(self, content: bytes) -> None:
        """Judge the graph by `content`, which has been hashed, so that no other content can be judged."""
        names, files = self.manifest.graph, self.manifest.files
        size = files[names.file].size_bytes
        if size > MAX_GRAPH_BYTES:
            raise BundleError(f"the graph {names.file!r} has {size:,} bytes, more than {MAX_GRAPH_BYTES:,}")
        weights_bytes = files[names.weights_file].size_bytes
        check_graph(content, self.manifest.architecture, names, weights_bytes)

    def _check_hash(self, name: str, fact: FileFact) -> None:
        for _ in self._hashed_blocks(name, fact):
            pass

    def _hashed_content(self, name: str, fact: FileFact) -> bytes:
        """The content of the file `name`, read once; raises BundleError if it is not what the manifest says."""
        return b"".join(self._hashed_blocks(name, fact))

    def _hashed_blocks(self, name: str, fact: FileFact) -> Iterator[bytes]:
        """The blocks of a file; raises BundleError behind the last one if the manifest says another content."""
        digest = hashlib.sha256()
        with self.file(name).open("rb", buffering=0) as stream:
            # A file that grows meanwhile is read no further, and its content differs.
            while stream.tell() <= fact.size_bytes and (block := stream.read(_READ_BYTES)):
                digest.update(block)
                yield block
        if digest.hexdigest() != fact.sha256:
            raise BundleError(f"the content of {name!r} is not what {MANIFEST_NAME} says (SHA-256 differs)")


def default_bundle_path() -> Path:
    """The folder of the embedded default model; raises BundleError if this installation has none."""
    try:
        import edgelm_models  # a plain import, because programs that freeze other programs look for those
    except ModuleNotFoundError:
        raise BundleError("this installation has no embedded model; name a bundle folder (-m/--model)") from None
    return edgelm_models.default_bundle_path()


def file_fact(path: Path) -> FileFact:
    """Size and SHA-256 of a file, as a manifest lists it."""
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileFact(path.stat().st_size, sha256)


def _read_manifest_file(folder: Path) -> bytes:
    path = folder / MANIFEST_NAME
    if not os.path.lexists(path):
        is_checkpoint = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
        hint = "; it looks like a checkpoint: run `edgelm export` on it first" if is_checkpoint else ""
        raise BundleError(f"it holds no {MANIFEST_NAME}{hint}")
    size = _regular_file_size(path)
    if size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST_NAME} has {size:,} bytes, more than {MAX_MANIFEST_BYTES:,}")
    return path.read_bytes()


def _regular_file_size(path: Path) -> int:
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode):
        if not _is_embedded(path.parent):
            raise BundleError(
                f"{path.name!r} is a symbolic link, and a bundle holds real files only: copy it with `cp -RL`, or "
                "download it with --local-dir"
            )
        info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise BundleError(f"{path.name!r} is not a regular file; a bundle holds real files only")
    return info.st_size


def _is_embedded(folder: Path) -> bool:
    """Whether `folder` is the embedded model: an installer may make links of its files (``uv --link-mode=symlink``)."""
    try:
        return folder == default_bundle_path()
    except BundleError:
        return False


def _no_folder(folder: Path) -> str:
    if status_of(folder) is not None:
        return "it is a file, not a bundle folder"
    return "there is no such folder; make one with `edgelm export`, or leave the model out to use the embedded one"
