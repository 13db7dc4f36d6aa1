"""The file format of states and prefixes: safetensors reads it, it is mapped, and a damaged file is refused."""

import mmap
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, load_file

import edgelm
from edgelm import Bundle, ConfigError, PrefixError, StateError
from edgelm.ids import KeysValues
from edgelm.reuse.kv_file import (
    KvDtype,
    KvFileError,
    KvKind,
    KvMetadata,
    file_type,
    is_safetensors,
    named_errors,
    read_kv_file,
    write_kv_file,
)
from edgelm.reuse.prefix import read_prefix
from edgelm.reuse.state import read_state
from tests.conftest import ROOT, TINY_BUNDLE
from tests.reuse.kv_files import Damage, facts_changed, header_changed, header_replaced, joined, saved_again, split

TENSORS: dict[KvKind, set[str]] = {
    "state": {"keys_values", "token_ids"},
    "text": {"keys_values", "token_ids", "text"},
    "learned": {"keys_values"},
}
IDS = (7, 2**31, 9)
TEXT = "naïve ☕"


def keys_values() -> KeysValues:
    return np.random.default_rng(0).normal(size=(4, 2, 3, 8)).astype(np.float32)


def write(path: Path, kind: KvKind = "text", dtype: KvDtype = "float32", content: KeysValues | None = None) -> Path:
    metadata = KvMetadata(kind, TEXT, "ab" * 32, "cd" * 32 if kind == "state" else None)
    ids, text = () if kind == "learned" else IDS, TEXT if kind == "text" else None
    write_kv_file(path, metadata, keys_values() if content is None else content, dtype, ids, text)
    return path


def refusal(path: Path, content: bytes, kind: KvKind = "text") -> str:
    """The message about a file that is refused."""
    path.write_bytes(content)
    with pytest.raises(KvFileError) as refused:
        read_kv_file(path, "file", kind)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", TENSORS)
def test_what_is_written_is_read(kind: KvKind, dtype: KvDtype, tmp_path: Path) -> None:
    path = write(tmp_path / "a", kind, dtype)
    file, said = read_kv_file(path, "file", kind), read_kv_file(path, "file", kind).metadata
    expected = keys_values().astype(dtype)
    assert file.keys_values.dtype == expected.dtype and np.array_equal(file.keys_values, expected)
    assert tuple(file.ids) == (() if kind == "learned" else IDS)
    assert file.text == (TEXT if kind == "text" else None)
    assert (said.kind, said.source, said.made_for) == (kind, TEXT, "ab" * 32)
    assert said.prefix == ("cd" * 32 if kind == "state" else None)
    tensors = load_file(path)  # by safetensors alone
    assert tensors.keys() == TENSORS[kind] and np.array_equal(tensors["keys_values"], expected)
    assert write(tmp_path / "b", kind, dtype).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("content", [np.asfortranarray(keys_values()), keys_values()[:, :, :, ::2]])
def test_keys_and_values_need_not_be_contiguous(content: KeysValues, tmp_path: Path) -> None:
    assert np.array_equal(read_kv_file(write(tmp_path / "a", content=content), "file", "text").keys_values, content)


@pytest.mark.parametrize("wrong", [np.nan, -np.inf, 1e6])
def test_what_float16_cannot_store_is_not_written(wrong: float, tmp_path: Path) -> None:
    content = keys_values()
    content[3, 1, 2, 7] = wrong
    for kind, error in (("state", StateError), ("text", PrefixError), ("learned", PrefixError)):
        with pytest.raises(error, match="does not fit into float16: use float32"):
            write(tmp_path / "a", kind, "float16", content)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float64", "F32", "int8", 16])
def test_keys_and_values_have_two_types(dtype: Any) -> None:
    with pytest.raises(ConfigError, match="dtype must be 'float32' or 'float16', got"):
        file_type(dtype, "float32")


def test_the_type_in_a_file() -> None:
    assert file_type("float16", "float32") == "float16"
    assert [file_type(None, cache) for cache in ("float32", "float16", "int8")] == ["float32", "float16", "int8"]
    with pytest.raises(ConfigError, match="this bundle's keys and values are int8, and stay so in a file"):
        file_type("float16", "int8")


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_nan_and_infinity_are_not_written(wrong: float, tmp_path: Path) -> None:
    content = keys_values()
    content[3, 1, 2, 7] = wrong
    with pytest.raises(PrefixError, match=r"a key or value is NaN or does not fit into float32$"):
        write(tmp_path / "a", "text", "float32", content)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="a mapped file could not be replaced here")
def test_keys_and_values_are_a_view_of_the_mapped_file(tmp_path: Path) -> None:
    content = np.ones((4, 2, 64, 1024), np.float32)  # 2 MiB
    path = write(tmp_path / "a", "learned", content=content)
    tracemalloc.start()
    try:
        file = read_kv_file(path, "file", "learned")
        assert tracemalloc.get_traced_memory()[1] < content.nbytes / 2
    finally:
        tracemalloc.stop()
    base: Any = file.keys_values
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base if isinstance(base, mmap.mmap) else base.obj, mmap.mmap)
    assert not file.keys_values.flags.writeable
    write(path, "learned", content=2 * content)
    assert np.array_equal(file.keys_values, content), "replacing the file changed what was loaded"
    path.unlink()
    assert np.array_equal(file.keys_values, content)


@pytest.mark.parametrize(
    ("tensor", "fields"),
    [
        ("token_ids", {"data_offsets": [0, 12]}),
        ("token_ids", {"data_offsets": [380, 392]}),
        ("token_ids", {"data_offsets": [388, 400]}),
        ("keys_values", {"data_offsets": [0, 2**40]}),
        ("keys_values", {"data_offsets": [768, 0]}),
        ("keys_values", {"data_offsets": [0]}),
        ("keys_values", {"shape": [4, 2, 3, 9]}),
        ("keys_values", {"shape": [2**30, 2**30, 3, 2**30]}),
        ("keys_values", {"dtype": "F16"}),
        ("text", {"shape": [2**31 - 1]}),
    ],
)
def test_safetensors_refuses_other_sizes_gaps_and_overlaps(tensor: str, fields: Any, tmp_path: Path) -> None:
    content = header_changed(write(tmp_path / "a").read_bytes(), tensor, **fields)
    with pytest.raises(SafetensorError):
        load(content)
    tracemalloc.start()
    try:
        assert "its tensors do not fit the file" in refusal(tmp_path / "a", content)
        assert tracemalloc.get_traced_memory()[1] < 1e6, "no memory is allocated for sizes that are not checked"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"token_ids":', '"token_ids":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"token_ids":', "twice"),
        ('"U32"', '"U32","more":1', "the unknown field 'token_ids.more'"),
        ('{"edgelm_kv"', '{"more":"x","edgelm_kv"', "it is no file"),
        ('{"edgelm_kv"', '{"edgelm_kv":"{}","edgelm_kv"', "the field 'edgelm_kv' twice"),
        (r"{\"kind\"", r"{\"kind\": \"text\", \"kind\"", "the field 'kind' twice"),
    ],
)
def test_what_safetensors_accepts_is_refused_too(old: str, new: str, words: str, tmp_path: Path) -> None:
    content = header_replaced(write(tmp_path / "a").read_bytes(), old, new)
    assert load(content).keys() == TENSORS["text"]
    assert words in refusal(tmp_path / "a", content)


def test_a_header_has_32_kib_at_most(tmp_path: Path) -> None:
    header, data = split(write(tmp_path / "a").read_bytes())
    path = tmp_path / "b"
    path.write_bytes(joined(header + " " * (32_768 - len(header.encode())), data))
    assert np.array_equal(read_kv_file(path, "file", "text").keys_values, keys_values())
    assert "its header is damaged" in refusal(path, joined(header + " " * (32_769 - len(header.encode())), data))


OTHER_TENSORS = "its header describes other tensors"


@pytest.mark.parametrize(
    ("tensor", "change", "words"),
    [
        ("keys_values", lambda a: a.astype(np.float64), "its header keys_values.dtype must be one of"),
        ("keys_values", lambda a: a.astype(np.uint32), OTHER_TENSORS),
        ("keys_values", lambda a: a[0], OTHER_TENSORS),
        ("keys_values", lambda a: a[:3], OTHER_TENSORS),
        ("keys_values", lambda a: a[:, :, :0], "its header keys_values.shape[2] must be between 1 and"),
        ("keys_values", lambda a: np.where(a == a[0, 0, 1, 2], np.float32("inf"), a), "its content is damaged"),
        ("keys_values", lambda a: np.where(a == a[3, 1, 2, 7], np.float32("nan"), a), "its content is damaged"),
        ("token_ids", lambda a: a.astype(np.float32), OTHER_TENSORS),
        ("token_ids", lambda a: a[:2], OTHER_TENSORS),
        ("token_ids", lambda a: a[:, None], OTHER_TENSORS),
        ("text", lambda a: a[None], OTHER_TENSORS),
        ("text", lambda a: a[:3], "its text is damaged"),
    ],
)
def test_other_tensors_are_refused(tensor: str, change: Any, words: str, tmp_path: Path) -> None:
    content = write(tmp_path / "a").read_bytes()
    assert words in refusal(tmp_path / "a", saved_again(content, lambda t: t | {tensor: change(t[tensor])}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: saved_again(c, lambda t: t | {"more": t["text"]}), "its header has the unknown field 'more'"),
        (lambda c: saved_again(c, lambda t: {"text": t["text"]}), "its header lacks the field 'keys_values'"),
        (lambda c: saved_again(c, lambda t: {"keys_values": t["keys_values"]}), OTHER_TENSORS),
        (lambda c: facts_changed(c, kind="state"), "it is no file"),
        (lambda c: facts_changed(c, kind="other"), "its header kind must be one of"),
        (lambda c: facts_changed(c, prefix="cd" * 32), OTHER_TENSORS),
        (lambda c: facts_changed(c, sha256="ab" * 32), "its content is damaged"),
        (lambda c: facts_changed(c, sha256=None), "its header sha256 must be a text"),
        (lambda c: facts_changed(c, source=1), "its header source must be a text"),
        (lambda c: facts_changed(c, made_for="x" * 5000), "longer than"),
        (lambda c: facts_changed(c, format_version=True), "its header format_version must be a whole number"),
        (lambda c: facts_changed(c, format_version=2), "it has format_version 2, this edgelm reads 1"),
        (lambda c: header_replaced(c, '"edgelm_kv":"{', '"edgelm_kv":"'), "its header is not valid JSON"),
        (lambda c: header_replaced(c, '"edgelm_kv":"{', '"edgelm_kv":"\\ud800{'), "its header is not UTF-8"),
        (lambda c: header_replaced(c, "edgelm_kv", "pt"), "it is no file"),
        (lambda c: joined("{}", b""), "it is no file"),
        (lambda c: joined('{"__metadata__":5}', b""), "it is no file"),
        (lambda c: joined(split(c)[0] + " " * 40_000, split(c)[1]), "its header is damaged"),
        (lambda c: joined('{"a":' * 2_000, b""), "its header is nested too deeply"),
        (lambda c: b"\xff" * 8 + c[8:], "it is no file"),
        (lambda c: b"\0" * 8 + c[8:], "its header is not valid JSON"),
    ],
)
def test_malformed_files_are_refused(damage: Damage, words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path / "a", damage(write(tmp_path / "a").read_bytes()))


@pytest.mark.parametrize("kind", TENSORS)
def test_every_truncation_is_refused(kind: KvKind, tmp_path: Path) -> None:
    content = write(tmp_path / "a", kind).read_bytes()
    for length in range(len(content)):
        refusal(tmp_path / "a", content[:length], kind)
    refusal(tmp_path / "a", content + b"\0", kind)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_killed_writer_leaves_a_whole_file_or_the_old_one() -> None:
    """`python -m benchmarks.kills states` kills 200; a process of its own, because it forks."""
    pytest.importorskip("benchmarks", reason="the benchmarks are not part of a distribution")
    command = [sys.executable, "-m", "benchmarks.kills", "states", "--count", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    # Behind the kills each writer runs once more, and removes what the killed ones left.
    assert " 0 faults; 0 temporary left beside" in done.stdout, done.stdout + done.stderr


def test_texts_are_never_mistaken_for_safetensors(tmp_path: Path) -> None:
    assert is_safetensors(write(tmp_path / "a").read_bytes()[:9])
    for text in ("", "{", '{"__metadata__":{"edgelm_kv":"{}"}}', "\0" * 4, "12345678{", "naïve ☕ {"):
        assert not is_safetensors(text.encode())


@pytest.mark.skipif(os.name != "posix", reason="Windows has no modes of this kind")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_file_follows_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        path = write(tmp_path / "file")
        write(tmp_path / "file")  # and again, where it replaces a file
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_any_corruption_is_refused_or_changes_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Both readers are tested with every bit of the header and any range of bytes."""
    folder = tmp_path_factory.mktemp("corrupt")
    model = edgelm.load(TINY_BUNDLE, device="cpu", threads=1)
    model.save_state(folder / "state", [5, 6, 7])
    model.save_prefix(folder / "prefix", "The cat sat")
    contents = {name: (folder / name).read_bytes() for name in ("state", "prefix")}

    def loaded(name: str) -> tuple[Any, ...]:
        if name == "state":
            state = read_state(folder / name, model.bundle.manifest)
            return state.ids, state.content.dtype, state.content.shape, state.content.tobytes()
        prefix = read_prefix(folder / name, model.bundle)
        return prefix.ids, prefix.text, prefix.content.dtype, prefix.content.shape, prefix.content.tobytes()

    original = {name: loaded(name) for name in contents}

    def check(name: str, corrupted: bytes) -> None:
        (folder / name).write_bytes(corrupted)
        try:
            assert loaded(name) == original[name]
        except (StateError, PrefixError) as error:
            assert "\n" not in str(error)

    for name, content in contents.items():
        for index in range(len(content) - len(split(content)[1])):
            for bit in range(8):
                check(name, content[:index] + bytes([content[index] ^ 1 << bit]) + content[index + 1 :])

    json_bytes = st.text('0123456789"\\,:{}[] FU', max_size=20).map(str.encode)

    @settings(max_examples=1000, deadline=None)
    @given(st.sampled_from(sorted(contents)), st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40) | json_bytes)
    def corrupt(name: str, place: float, removed: int, inserted: bytes) -> None:
        content = contents[name]
        start = int(place * len(content))
        check(name, content[:start] + inserted + content[start + removed :])

    corrupt()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signal")
def test_an_exception_of_a_signal_handler_passes_unchanged() -> None:
    def expire(number: int, frame: object) -> None:
        raise TimeoutError("the task took too long")  # an OSError, as the errors of files are

    before = signal.signal(signal.SIGUSR1, expire)
    try:
        with pytest.raises(TimeoutError, match="the task took too long"), named_errors(StateError, "state file", "x"):
            signal.raise_signal(signal.SIGUSR1)
        read = named_errors(StateError, "state file", "x")
        with pytest.raises(StateError, match="cannot read the state file 'x': too long"), read:
            raise TimeoutError("too long")
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_file_of_more_than_a_tebibyte_is_refused_by_its_size(tmp_path: Path) -> None:
    path, manifest = tmp_path / "x.state", Bundle.read(TINY_BUNDLE).manifest
    for size_bytes, words in ((2**40, "it is no state"), (2**40 + 1, "more than 1,099,511,627,776")):
        try:
            with path.open("wb") as stream:
                stream.truncate(size_bytes)  # takes no room
        except OSError:
            pytest.skip("this file system has no files of that size")
        with pytest.raises(StateError, match=words):
            read_state(path, manifest)
