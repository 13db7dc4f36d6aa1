"""The reader of packed bundles as a target."""

import json
import random
import shutil
import struct
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import MANIFEST_NAME
from edgelm.bundle.packed import read_packed
from edgelm.bundle.packing import pack, unpack, write_archive
from edgelm.bundle.stored_zip import layout
from edgelm.errors import BundleError
from tests.conftest import TINY_BUNDLE
from tests.fuzz.bundle_targets import resealed
from tests.fuzz.harness import Target
from tests.fuzz.mutations import BYTE_MUTATORS, NUMBERS, change_json


class PackedTarget(Target):
    """A packed bundle: opened, hashed and unpacked. Nothing may appear outside the new folder."""

    name = "packed"
    refusals = (BundleError,)

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="edgelm-fuzz-"))
        self._file = self._folder / "x.edgelm"
        pack(Bundle.read(TINY_BUNDLE), self._file)
        members = read_packed(self._file)[0].members
        self._contents = {name: (TINY_BUNDLE / name).read_bytes() for name in members}
        self._headers = [member.header_offset for member in members.values()]
        self._headers += range(max(member.end for member in members.values()), self._file.stat().st_size, 40)
        self.mutators = (*BYTE_MUTATORS, *[self._change_header] * 12, *[self._change_manifest] * 12)

    def seeds(self) -> list[bytes]:
        return [self._archive(list(self._contents.items()))]

    def corpus(self) -> list[bytes]:
        files = list(self._contents.items())
        return [
            self._archive(files[1:]),
            self._archive([*files, ("../../evil", b"x")]),
            self._archive([*files, files[-1]]),
            self._archive([files[0], ("/tmp/evil", b"x"), *files[2:]]),
            self._archive([files[0], *reversed(files[1:])]),
        ]

    def read(self, data: bytes) -> object:
        self._file.write_bytes(data)
        target = self._folder / "unpacked"
        try:
            bundle = Bundle.read(self._file)
            bundle.verify()
            unpack(bundle, target)
            Bundle.read(target).verify()
            names = sorted(path.name for path in target.iterdir())
            assert names == sorted([MANIFEST_NAME, *bundle.manifest.files]), "unpacked something else"
        finally:
            shutil.rmtree(target, ignore_errors=True)
            left = [path.name for path in self._folder.iterdir()]
            assert left == ["x.edgelm"], f"left behind: {left}"
        return None

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _archive(files: Sequence[tuple[str, bytes]]) -> bytes:
        stream = BytesIO()
        members = layout((name, len(content)) for name, content in files)
        write_archive(stream, members, [[content] for _, content in files])
        return stream.getvalue()

    def _change_header(self, rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
        """Write numbers at which readers break into a header or into the directory."""
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.choice(self._headers) + rng.randrange(60)
            number = rng.choice([*NUMBERS, rng.randrange(2**32)]) % 2**64
            value = struct.pack("<Q", number)[: rng.choice([1, 2, 4, 8])]
            changed[at : at + len(value)] = value
        return bytes(changed)

    def _change_manifest(self, rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
        """Change ``bundle.json`` as an attacker would, who corrects its digest and all headers."""
        manifest = change_json(rng, self._contents[MANIFEST_NAME], ())
        manifest = resealed(manifest) if rng.random() < 0.8 else manifest
        contents = self._contents | {MANIFEST_NAME: manifest}
        if rng.random() < 0.5:
            stated = json.loads(manifest)
            files = stated.get("files") if isinstance(stated, dict) else None
            if isinstance(files, dict):  # the members that it lists now
                contents = {MANIFEST_NAME: manifest}
                names = [name for name in files if isinstance(name, str) and name.isascii() and len(name) < 4000]
                contents |= {name: self._contents.get(name, b"x") for name in names}
        return self._archive(list(contents.items()))
