"""Files of keys and values as targets: the state of a prompt, a baked text, a learned prefix."""

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgelm.bundle.folder import Bundle
from edgelm.errors import PrefixError, StateError
from edgelm.reuse.kv_file import KvMetadata, write_kv_file
from edgelm.reuse.prefix import graph_identity, read_prefix
from edgelm.reuse.state import read_state
from tests.conftest import TINY_BUNDLE
from tests.fuzz.harness import Target
from tests.fuzz.mutations import BYTE_MUTATORS, change_json


def change_header(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change the JSON header, or the metadata in it, and correct its length."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.5:
        header = change_json(rng, header, others)
    else:
        try:
            content = json.loads(header)
            facts = content["__metadata__"]["edgelm_kv"].encode()
            content["__metadata__"]["edgelm_kv"] = change_json(rng, facts, others).decode("utf-8", "replace")
            header = json.dumps(content).encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            header = change_json(rng, header, others)
    return len(header).to_bytes(8, "little") + header + rest


def resealed(data: bytes) -> bytes:
    """A file with the hash of its tensors corrected, as an attacker would."""
    try:
        length = int.from_bytes(data[:8], "little")
        content, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
        digest = hashlib.sha256()
        for name in sorted(content.keys() - {"__metadata__"}):
            start, stop = content[name]["data_offsets"]
            digest.update(rest[start:stop])
        facts = json.loads(content["__metadata__"]["edgelm_kv"])
        content["__metadata__"]["edgelm_kv"] = json.dumps(facts | {"sha256": digest.hexdigest()})
        header = json.dumps(content).encode()
        return len(header).to_bytes(8, "little") + header + rest
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
        return data


class _KvTarget(Target):
    mutators = (*BYTE_MUTATORS, *[change_header] * 12)

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self._file = self._folder / "file"
        bundle = Bundle.read(TINY_BUNDLE)
        source = replace(bundle.manifest.source, body_sha256="0" * 64)
        self._bundle = Bundle(bundle.path, replace(bundle.manifest, source=source))

    def close(self) -> None:
        shutil.rmtree(self._folder)

    def input(self, seed: int, index: int, seeds: Sequence[bytes]) -> bytes:
        data = super().input(seed, index, seeds)
        return resealed(data) if random.Random(index).random() < 0.7 else data

    def _written(self, kind: str, made_for: str, ids: tuple[int, ...] = (), text: str | None = None) -> bytes:
        facts = self._bundle.manifest.architecture
        width = facts.source_head_dim if kind == "learned" else facts.head_dim
        shape = 2 * facts.num_layers, facts.num_key_value_heads, len(ids) or 3, width
        content = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        metadata = KvMetadata(kind, "tiny", made_for)  # type: ignore[arg-type]
        write_kv_file(self._file, metadata, content, "float16", ids, text)
        return self._file.read_bytes()


class StateTarget(_KvTarget):
    """The state of a prompt."""

    name = "state"
    refusals = (StateError,)

    def seeds(self) -> list[bytes]:
        return [self._written("state", self._bundle.manifest.digest, (1, 2, 3, 4))]

    def read(self, data: bytes) -> object:
        self._file.write_bytes(data)
        return read_state(self._file, self._bundle.manifest)


class PrefixTarget(_KvTarget):
    """A prefix file, baked or learned."""

    name = "prefix"
    refusals = (PrefixError,)

    def seeds(self) -> list[bytes]:
        manifest = self._bundle.manifest
        learned = self._written("learned", "0" * 64)
        return [self._written("text", graph_identity(manifest), (5, 6, 7), "abc"), learned]

    def read(self, data: bytes) -> object:
        self._file.write_bytes(data)
        return read_prefix(self._file, self._bundle)
