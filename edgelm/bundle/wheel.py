"""A bundle as a Python package, a wheel without any code: ``pip install`` puts it where `edgelm.load` finds its name.

The format is PEP 427's, with the metadata of PEP 566. The same bundle, name and version make the same bytes.
"""

import base64
import os
import re
from pathlib import Path

from edgelm.bundle.folder import Bundle
from edgelm.bundle.installed import GROUP, canonical, urlsafe_sha256
from edgelm.bundle.locate import MODEL_NAME
from edgelm.bundle.manifest import MANIFEST_NAME
from edgelm.bundle.packing import named_errors, write_archive
from edgelm.bundle.small_files import MAX_TEXT_BYTES
from edgelm.bundle.stored_zip import layout
from edgelm.bundle.whole_file import whole_file
from edgelm.errors import ConfigError, shown

_VERSION = re.compile(r"(0|[1-9]\d{0,8})(\.(0|[1-9]\d{0,8})){0,4}((a|b|rc)\d{1,4})?(\.post\d{1,4})?", re.ASCII)
_MOST_NAME = 64


def write_wheel(bundle: Bundle, folder: str | os.PathLike[str], name: str, version: str) -> Path:
    """Write a wheel of `bundle` into `folder`; returns its path, whose name follows from `name` and `version`.

    Every file is hashed while it is copied. An existing file is replaced in one step, or stays unchanged. Raises
    ConfigError if the name or the version cannot be a package's, and BundleError if the bundle differs from its
    manifest, or if the file cannot be written.
    """
    if not MODEL_NAME.fullmatch(name) or len(name) > _MOST_NAME:
        words = f"letters, digits and -_. up to {_MOST_NAME} characters, with a letter or digit at both ends"
        raise ConfigError(f"{shown(name)} cannot be the name of a Python package: use {words}")
    if canonical(name) in ("edgelm", "edgelm-models"):
        raise ConfigError(f"the package {name!r} would replace edgelm itself: choose another name")
    if not _VERSION.fullmatch(version):
        raise ConfigError(f"{shown(version)} is no version of a Python package like 1.0 or 2.1.3")
    stem = f"{canonical(name).replace('-', '_')}-{version}"
    inside, facts = f"edgelm_model_{canonical(name).replace('-', '_')}", f"{stem}.dist-info"
    target = Path(folder) / f"{stem}-py3-none-any.whl"
    with named_errors(target), whole_file(target) as stream:
        manifest = bundle.manifest_bytes()
        small = {
            f"{facts}/METADATA": _metadata(bundle, name, version),
            f"{facts}/WHEEL": b"Wheel-Version: 1.0\nGenerator: edgelm\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{facts}/entry_points.txt": f"[{GROUP}]\n{name} = {inside}\n".encode(),
        }
        rows = [(f"{inside}/{MANIFEST_NAME}", urlsafe_sha256(manifest), len(manifest))]
        for file, fact in bundle.manifest.files.items():
            digest = base64.urlsafe_b64encode(bytes.fromhex(fact.sha256)).rstrip(b"=").decode()
            rows.append((f"{inside}/{file}", digest, fact.size_bytes))
        copied = len(rows)
        rows += [(path, urlsafe_sha256(content), len(content)) for path, content in small.items()]
        record = "".join(f"{path},sha256={digest},{size}\n" for path, digest, size in rows) + f"{facts}/RECORD,,\n"
        small[f"{facts}/RECORD"] = record.encode()
        sizes = [(path, size) for path, _, size in rows[:copied]]
        members = layout([*sizes, *((path, len(content)) for path, content in small.items())])
        files = [bundle.blocks(file) for file in bundle.manifest.files]
        write_archive(stream, members, [[manifest], *files, *([content] for content in small.values())])
    return target


def _metadata(bundle: Bundle, name: str, version: str) -> bytes:
    """The file METADATA, with the model card as the description."""
    source, recipe = bundle.manifest.source, bundle.manifest.recipe
    lines = {
        "Metadata-Version": "2.1",
        "Name": name,
        "Version": version,
        "Summary": f"{source.name} {recipe.name}, a model for edgelm",
        "License": source.license or "",
        "Requires-Python": ">=3.11",
        "Description-Content-Type": "text/markdown",
    }
    # A line end in a fact of the bundle would begin a field of its own, such as one that names a package to install.
    head = "".join(f"{field}: {' '.join(text.split())}\n" for field, text in lines.items() if text.strip())
    card = bundle.read_file("README.md", MAX_TEXT_BYTES) if "README.md" in bundle.manifest.files else b""
    return head.encode("utf-8", "replace") + b"\n" + card
