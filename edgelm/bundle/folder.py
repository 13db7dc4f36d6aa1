"""A bundle on disk, in a folder or packed in a file: read, checked, hashed. The format: ``docs/bundle-format.md``."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from edgelm.bundle.graph_rules import check_graph
from edgelm.bundle.locate import locate
from edgelm.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileFact, Manifest, read_manifest
from edgelm.bundle.onnx_file import MAX_GRAPH_BYTES
from edgelm.bundle.packed import PACKED_SUFFIX, Packed, read_packed
from edgelm.bundle.small_files import SmallFileError, is_folder, open_regular_file, read_small_file, status_of
from edgelm.bundle.strict_json import StrictJsonError, parse_json
from edgelm.errors import BundleError, ConfigError, pass_interrupts_on, shown

_READ_BYTES = 1 << 20
_NOTHING_THERE = (
    "there is no such folder, file or installed model; make one with `edgelm export`, or leave the model out to use "
    "the embedded one"
)


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
class Extent:
    """Where a file of a bundle lies: all of a file, or a part of a packed one."""

    path: Path
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk. Its manifest, its file list, all sizes and the hashes of its small files have been checked."""

    path: Path
    """The folder or the packed file, absolute."""
    manifest: Manifest
    """The facts of `bundle.json` (docs/bundle-format.md)."""
    packed: Packed | None = None
    """Where the files lie in a packed file; None for a folder."""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Bundle":
        """Open the bundle that `path` means: a folder, a packed file, or a name (`edgelm.bundle.locate`).

        This checks the manifest and its digest, that there are exactly the listed files, their sizes, the hashes of all
        files except the weights, and what the graph may do. `verify` hashes the weights too. Raises BundleError if
        nothing is there, or no bundle, or if it differs from its manifest, or has a graph that no exporter writes.
        """
        try:
            place = locate(path)
            if is_folder(place):
                bundle = cls(place, read_manifest(_read_manifest_file(place)))
                bundle._check_listing()
            else:
                if status_of(place) is None:
                    raise BundleError(_NOTHING_THERE)
                packed, manifest = read_packed(place)
                bundle = cls(place, manifest, packed)
            of_graphs = {name for graph in bundle.manifest.graphs for name in (graph.file, graph.weights_file)}
            for name in bundle.manifest.files:
                if name not in of_graphs:
                    bundle._check_hash(name)
            for part in (bundle, bundle.draft):
                if part is not None:
                    part._check_graph()
        except BundleError as error:
            raise BundleError(f"cannot use the bundle {os.fspath(path)!r}: {error}") from None
        except SmallFileError as error:
            raise BundleError(f"cannot use the bundle {os.fspath(path)!r}: it {error}") from None
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
            self._check_hash(name)
            total += fact.size_bytes
        return total

    def stamps(self) -> dict[str, FileStamp]:
        """The stamps of the graph's file and of its weights, by name; a missing file is left out."""
        stamps = {}
        for name in (self.manifest.graph.file, self.manifest.graph.weights_file):
            try:
                facts = self.extent(name).path.stat()
            except OSError as error:
                pass_interrupts_on(error)
                continue
            stamps[name] = FileStamp(facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        return stamps

    def require_unchanged(self, stamps: dict[str, FileStamp]) -> None:
        """Raise BundleError if another bundle is there now.

        Files with other stamps than `stamps` are hashed.
        """
        try:
            content = parse_json(self.manifest_bytes())
        except (BundleError, StrictJsonError, SmallFileError, OSError) as error:
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
            self._check_hash(name)
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

    @property
    def draft(self) -> "Bundle | None":
        """The model in this bundle that guesses tokens, as a bundle of the same files; None without one."""
        facts = self.manifest.draft
        if facts is None:
            return None
        own = replace(
            self.manifest, architecture=facts.architecture, graph=facts.graph, recipe=facts.recipe, draft=None
        )
        return replace(self, manifest=own)

    @property
    def name(self) -> str:
        """The name of the folder, or of the packed file without its suffix."""
        name = self.path.resolve().name if self.packed is None else self.path.name
        return name if self.packed is None else name.removesuffix(PACKED_SUFFIX)

    def extent(self, name: str) -> Extent:
        """Where the bundle's file `name` lies."""
        if self.packed is None:
            return Extent(self.path / name, 0, self.manifest.files[name].size_bytes)
        member = self.packed.members[name]
        return Extent(self.path, member.offset, member.size_bytes)

    def read_file(self, name: str, max_bytes: int) -> bytes:
        """The content of the bundle's file `name`.

        Raises:
            SmallFileError: it is no regular file, or has more than `max_bytes`.
            OSError: it cannot be read.
        """
        extent = self.extent(name)
        if self.packed is None:
            return read_small_file(extent.path, max_bytes)
        if extent.size_bytes > max_bytes:
            raise SmallFileError(f"has {extent.size_bytes:,} bytes, more than {max_bytes:,}")
        with open_regular_file(extent.path) as stream:
            stream.seek(extent.offset)
            return stream.read(extent.size_bytes)

    def checked_content(self, name: str) -> bytes:
        """The content of the file `name`, read once; raises BundleError if it is not what the manifest says."""
        return b"".join(self.blocks(name))

    def blocks(self, name: str) -> Iterator[bytes]:
        """The blocks of a file; raises BundleError behind the last one if the manifest says another content."""
        extent, fact, digest = self.extent(name), self.manifest.files[name], hashlib.sha256()
        # A file of a folder that grows meanwhile is read no further, and its content differs.
        left = fact.size_bytes + (1 if self.packed is None else 0)
        with extent.path.open("rb", buffering=0) as stream:
            stream.seek(extent.offset)
            while left and (block := stream.read(min(_READ_BYTES, left))):
                left -= len(block)
                digest.update(block)
                yield block
        if digest.hexdigest() != fact.sha256:
            raise BundleError(f"the content of {name!r} is not what {MANIFEST_NAME} says (SHA-256 differs)")

    def manifest_bytes(self) -> bytes:
        """The content of ``bundle.json`` as it is on disk now. Raises BundleError, SmallFileError or OSError."""
        return _read_manifest_file(self.path) if self.packed is None else read_packed(self.path)[0].manifest_bytes

    @property
    def size_bytes(self) -> int:
        """Total size of all files, the manifest included; of a packed file its own size."""
        if self.packed is not None:
            return self.path.stat().st_size
        return sum(f.size_bytes for f in self.manifest.files.values()) + (self.path / MANIFEST_NAME).stat().st_size

    @property
    def file_count(self) -> int:
        """The number of files, the manifest included."""
        return len(self.manifest.files) + 1

    def graph_content(self) -> bytes:
        """The content of the graph's file; raises BundleError if it is not what the manifest says."""
        name = self.manifest.graph.file
        try:
            return self.checked_content(name)
        except OSError as error:
            pass_interrupts_on(error)
            raise BundleError(f"cannot read {name!r} of {os.fspath(self.path)!r}: {error.strerror or error}") from None

    def _check_listing(self) -> None:
        if self.packed is not None:
            if read_packed(self.path)[0] != self.packed:
                raise BundleError("it was replaced after it was read")
            return
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

    def _check_graph(self) -> None:
        """Hash the graph and judge it, both by one reading, so that no other content can be judged."""
        names, files = self.manifest.graph, self.manifest.files
        size = files[names.file].size_bytes
        if size > MAX_GRAPH_BYTES:
            self._check_hash(names.file)
            raise BundleError(f"the graph {names.file!r} has {size:,} bytes, more than {MAX_GRAPH_BYTES:,}")
        weights_bytes = files[names.weights_file].size_bytes
        check_graph(self.checked_content(names.file), self.manifest.architecture, names, weights_bytes)

    def _check_hash(self, name: str) -> None:
        for _ in self.blocks(name):
            pass


def default_bundle_path() -> Path:
    """The folder of the embedded default model; raises BundleError if this installation has none."""
    try:
        import edgelm_models  # a plain import, because programs that freeze other programs look for those
    except ModuleNotFoundError:
        raise BundleError("this installation has no embedded model; name a bundle folder (-m/--model)") from None
    path = edgelm_models.default_bundle_path()
    if not is_folder(path):  # a zip archive on Python's search path, such as zipapp makes
        raise BundleError(
            f"the embedded model would be at {os.fspath(path)!r}, but a model cannot be loaded out of an archive of "
            "Python code: install edgelm_models as files, or name a bundle (-m/--model)"
        )
    return path


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
        if not _is_installed(path.parent):
            raise BundleError(
                f"{path.name!r} is a symbolic link, and a bundle holds real files only: copy it with `cp -RL`, or "
                "download it with --local-dir"
            )
        info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise BundleError(f"{path.name!r} is not a regular file; a bundle holds real files only")
    return info.st_size


def _is_installed(folder: Path) -> bool:
    """Whether `folder` is of a package, whose files an installer may make links (``uv --link-mode=symlink``)."""
    from edgelm.bundle.installed import installed_models  # as in `edgelm.bundle.locate`

    for find in (default_bundle_path, *(model.folder for model in installed_models())):
        try:
            if folder == find():
                return True
        except BundleError:
            continue
    return False
