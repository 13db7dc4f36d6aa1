"""The readers of a bundle's own files, as targets."""

import json
import random
from collections.abc import Sequence

from edgelm.bundle.folder import default_bundle_path
from edgelm.bundle.manifest import digest_of, read_manifest
from edgelm.errors import BundleError
from tests.conftest import TINY_BUNDLE
from tests.fuzz.harness import Target
from tests.fuzz.mutations import BYTE_MUTATORS, change_json


class ManifestTarget(Target):
    """``bundle.json``."""

    name = "manifest"
    mutators = (*BYTE_MUTATORS, *[change_json] * 12)
    refusals = (BundleError,)

    def seeds(self) -> list[bytes]:
        return [(folder / "bundle.json").read_bytes() for folder in (TINY_BUNDLE, default_bundle_path())]

    def input(self, seed: int, index: int, seeds: Sequence[bytes]) -> bytes:
        data = super().input(seed, index, seeds)
        return resealed(data) if random.Random(index).random() < 0.7 else data

    def read(self, data: bytes) -> object:
        return read_manifest(data)


def resealed(data: bytes) -> bytes:
    """A manifest with its digest corrected, as an attacker would."""
    try:
        content = json.loads(data)
        content["digest"] = digest_of(content)
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError, AttributeError):
        return data
