"""Models that were installed as Python packages, by name.

Such a package names its model in the entry points of the group `GROUP`. Nothing of it is imported or run: its metadata
lists the files, and states the SHA-256 of ``bundle.json``, which states that of all other files.
"""

import base64
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path

from edgelm.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES
from edgelm.bundle.small_files import SmallFileError, read_small_file
from edgelm.errors import BundleError, pass_interrupts_on

GROUP = "edgelm.models"
_FOLDER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}", re.ASCII)


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model in an installed package."""

    name: str
    package: str
    version: str
    entry: EntryPoint
    distribution: Distribution

    def folder(self) -> Path:
        """The bundle's folder; raises BundleError if the package does not hold it as its metadata says."""
        try:
            return self._checked_folder()
        except (OSError, ValueError, TypeError, KeyError) as error:  # metadata that cannot be read
            pass_interrupts_on(error)
            reason = f"cannot be read: {error}"
        except _PackageError as error:
            reason = str(error)
        raise BundleError(
            f"the model {self.name!r} of the installed package {self.package} {self.version} {reason}; run: pip "
            f"install --force-reinstall --no-deps {self.package}"
        )

    def _checked_folder(self) -> Path:
        if not _FOLDER_NAME.fullmatch(self.entry.value):
            raise _PackageError(f"has the place {self.entry.value[:80]!r}, which is no plain name of a folder")
        manifest = f"{self.entry.value}/{MANIFEST_NAME}"
        listed = next((file for file in self.distribution.files or () if file.as_posix() == manifest), None)
        if listed is None:
            raise _PackageError(f"is not there: the package lists no {manifest}")
        path = Path(os.fspath(listed.locate()))  # a TypeError inside an archive
        try:
            content = read_small_file(path, MAX_MANIFEST_BYTES)
        except SmallFileError as error:
            raise _PackageError(f"has a {MANIFEST_NAME} that {error}") from None
        if listed.hash is not None and listed.hash.value != urlsafe_sha256(content):
            raise _PackageError(f"was altered: its {MANIFEST_NAME} is not what the package's RECORD says")
        return path.parent.absolute()


def installed_models() -> list[InstalledModel]:
    """All installed models, by name."""
    return sorted(_found(), key=lambda model: (model.name, model.package))


def find_installed(name: str) -> InstalledModel | None:
    """The installed model `name`; None where no package has it. Raises BundleError if two packages have it."""
    found = [model for model in installed_models() if canonical(model.name) == canonical(name)]
    if len(found) > 1:
        packages = " and ".join(f"{model.package} {model.version}" for model in found)
        raise BundleError(
            f"the name {name!r} means two installed models, of {packages}: uninstall one, or give the path of a folder"
        )
    return found[0] if found else None


def canonical(name: str) -> str:
    """A package's name as indexes compare it (PEP 503): "My_Model" is "my-model"."""
    return re.sub(r"[-_.]+", "-", name).lower()


def urlsafe_sha256(content: bytes) -> str:
    """SHA-256 as a RECORD file writes it: base64 of the URL-safe alphabet, without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


class _PackageError(Exception):
    """The message completes a sentence that begins with the model's name."""


def _found() -> Iterator[InstalledModel]:
    seen = set()
    for distribution in distributions():
        try:
            package = distribution.metadata["Name"] or ""
            if canonical(package) in seen:
                continue  # Python, too, takes the first one on the path
            seen.add(canonical(package))
            if GROUP not in (distribution.read_text("entry_points.txt") or ""):
                continue
            entries, version = list(distribution.entry_points.select(group=GROUP)), distribution.version
        except Exception as error:  # the broken metadata of some package, which may be any: no model can be in it
            pass_interrupts_on(error)
            continue
        for entry in entries:
            yield InstalledModel(entry.name, package, version, entry, distribution)
