"""A bundle in one file: the same bytes each time, readable by every zip program, and nothing else is accepted."""

import os
import shutil
import stat
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import edgelm
from edgelm.bundle.folder import Bundle, default_bundle_path
from edgelm.bundle.manifest import MANIFEST_NAME
from edgelm.bundle.packing import pack, unpack
from edgelm.bundle.stored_zip import ALIGNMENT_BYTES, directory, layout, stated_crc32s
from edgelm.errors import BundleError
from edgelm.reuse.prefix import baked_prefix
from tests.conftest import TINY_BUNDLE, RunCommand, replace_file


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """The tiny bundle in one file."""
    path = tmp_path / "tiny.edgelm"
    pack(Bundle.read(TINY_BUNDLE), path)
    return path


def test_the_same_bundle_makes_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(TINY_BUNDLE, tmp_path / "copy", copy_function=shutil.copyfile)  # other times of modification
    pack(Bundle.read(tmp_path / "copy"), tmp_path / "again")
    pack(Bundle.read(packed), tmp_path / "from-packed")
    assert packed.read_bytes() == (tmp_path / "again").read_bytes() == (tmp_path / "from-packed").read_bytes()


def test_zip_programs_read_it(packed: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [MANIFEST_NAME, *Bundle.read(TINY_BUNDLE).manifest.files]
        for info in archive.infolist():
            assert archive.read(info) == (TINY_BUNDLE / info.filename).read_bytes()
            assert stat.S_ISREG(info.external_attr >> 16) and info.compress_type == zipfile.ZIP_STORED


def test_every_member_begins_at_a_page(packed: Path) -> None:
    bundle = Bundle.read(packed)
    assert bundle.packed is not None
    for name, member in bundle.packed.members.items():
        assert member.offset % ALIGNMENT_BYTES == 0
        assert packed.read_bytes()[member.offset : member.end] == (TINY_BUNDLE / name).read_bytes()


def test_archives_beyond_4_gib_have_the_fields_that_zip_programs_expect(tmp_path: Path) -> None:
    members = layout([("a", 5), ("large", 2**32 + 7), ("b", 3), ("just", 2**32 - 1), ("c", 1)])
    crc32s = [1, 2, 3, 4, 5]
    path = tmp_path / "sparse.zip"
    with path.open("wb") as stream:
        for member, crc32 in zip(members, crc32s, strict=True):
            stream.seek(member.header_offset)
            stream.write(member.header(crc32))
            assert stream.tell() == member.offset
        stream.seek(members[-1].end)
        stream.write(directory(members, crc32s))
    assert stated_crc32s(members, directory(members, crc32s)) == crc32s
    with zipfile.ZipFile(path) as archive:
        for info, member, crc32 in zip(archive.infolist(), members, crc32s, strict=True):
            assert (info.filename, info.file_size, info.compress_size) == (member.name, *[member.size_bytes] * 2)
            assert (info.header_offset, info.CRC) == (member.header_offset, crc32)
            archive.open(info).close()  # compares the name with the one before the member


def test_it_computes_the_same_as_the_folder(packed: Path, tmp_path: Path) -> None:
    linked = tmp_path / "ein Ärger 'mit' ☕"
    packed.rename(linked)
    with edgelm.load(linked, threads=1) as model, edgelm.load(TINY_BUNDLE, threads=1) as other:
        assert model.generate("abc", max_new_tokens=8).choices == other.generate("abc", max_new_tokens=8).choices
        assert model.session.step([1, 2, 3]).tobytes() == other.session.step([1, 2, 3]).tobytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_the_weights_are_mapped_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "embedded.edgelm"
    pack(Bundle.read(default_bundle_path()), path)
    with edgelm.load(path, threads=1):
        maps = [
            line.split()
            for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
            if line.endswith(str(path))
        ]
    weights = Bundle.read(path).extent("model.onnx.data")
    offsets = [int(line[2], 16) for line in maps]
    assert offsets and all(weights.offset <= at < weights.offset + weights.size_bytes for at in offsets)


def test_a_link_to_it_is_followed(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.edgelm"
    try:
        link.symlink_to(packed)
    except OSError:
        pytest.skip("this system makes no links")
    with edgelm.load(link) as model:
        assert model.bundle.name == "link"


def test_unpacking_gives_the_folder_back(packed: Path, tmp_path: Path) -> None:
    unpack(Bundle.read(packed), tmp_path / "new" / "deep")
    for path in TINY_BUNDLE.iterdir():
        assert (tmp_path / "new" / "deep" / path.name).read_bytes() == path.read_bytes()
    Bundle.read(tmp_path / "new" / "deep").verify()
    with pytest.raises(BundleError, match="already"):
        unpack(Bundle.read(packed), tmp_path / "new")
    with pytest.raises(BundleError, match="cannot write"):
        unpack(Bundle.read(packed), packed / "inside")


def test_a_damaged_bundle_is_neither_packed_nor_unpacked(packed: Path, tiny_copy: Path, tmp_path: Path) -> None:
    _alter(tiny_copy / "model.onnx.data", 7)
    with pytest.raises(BundleError, match=r"'model.onnx.data' is not what"):
        pack(Bundle.read(tiny_copy), tmp_path / "out.edgelm")
    _alter(packed, Bundle.read(packed).extent("model.onnx.data").offset)
    bundle = Bundle.read(packed)  # the weights are not hashed to load them
    for use in (bundle.verify, lambda: unpack(bundle, tmp_path / "out")):
        with pytest.raises(BundleError, match=r"'model.onnx.data' is not what"):
            use()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.edgelm"]


def test_a_prefix_inside_is_read_where_it_lies(tiny_copy: Path, tmp_path: Path) -> None:
    with edgelm.load(TINY_BUNDLE) as model:
        model.save_prefix(tiny_copy / "prefix.safetensors", "abcdefgh")
        replace_file(tiny_copy, "prefix.safetensors", (tiny_copy / "prefix.safetensors").read_bytes())
    _require_prefix(tiny_copy)
    pack(Bundle.read(tiny_copy), tmp_path / "with-prefix.edgelm")
    folder, packed = baked_prefix(Bundle.read(tiny_copy)), baked_prefix(Bundle.read(tmp_path / "with-prefix.edgelm"))
    assert folder is not None and packed is not None
    assert (packed.text, packed.ids) == (folder.text, folder.ids) and (packed.content == folder.content).all()


def _require_prefix(folder: Path) -> None:
    from tests.conftest import edit_manifest

    edit_manifest(folder, lambda m: m["required_features"].append("prefix"))


def test_every_byte_of_the_headers_counts(packed: Path) -> None:
    """Every byte outside the contents is one that the reader compares."""
    good = packed.read_bytes()
    members = Bundle.read(packed).packed.members.values()  # type: ignore[union-attr]
    places = [range(m.header_offset, m.offset) for m in members] + [range(max(m.end for m in members), len(good))]
    chosen = [at for place in places for at in [*place[:80], *place[80::97], place[-1]]]
    for at in chosen:
        packed.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(BundleError):
            Bundle.read(packed)


Rebuild = Callable[[zipfile.ZipFile, dict[str, bytes]], None]


def _compressed(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        archive.writestr(name, content, zipfile.ZIP_DEFLATED)


def _plain(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        archive.writestr(name, content)


def _slip(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    archive.writestr("../../evil", b"x")


def _link(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    info = zipfile.ZipInfo("model.onnx.data")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(info, "/etc/passwd")


def _bomb(archive: zipfile.ZipFile, files: dict[str, bytes]) -> None:
    archive.writestr(MANIFEST_NAME, bytes(2**26), zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("build", [_compressed, _plain, _slip, _link, _bomb])
def test_archives_of_other_programs_are_refused(tmp_path: Path, build: Rebuild) -> None:
    path = tmp_path / "other.edgelm"
    with zipfile.ZipFile(path, "w") as archive:
        build(archive, {item.name: item.read_bytes() for item in sorted(TINY_BUNDLE.iterdir())})
    with pytest.raises(BundleError, match=r"not one that `edgelm pack` wrote|more than|truncated"):
        Bundle.read(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "neither a bundle folder nor"),
        (b"PK", "neither a bundle folder nor"),
        (b"hello, this is a text and no archive", "neither a bundle folder nor"),
        (b"PK\3\4" + bytes(18) + struct.pack("<L", 2**32 - 1) + bytes(100), "more than 4,194,304"),
        (b"PK\3\4" + bytes(18) + struct.pack("<L", 100) + bytes(100), "truncated"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        Bundle.read(tmp_path / "file")


def test_truncated_and_longer_files_say_both_sizes(packed: Path) -> None:
    good = packed.read_bytes()
    for content in (good[:-1], good + b"x", good + good):
        packed.write_bytes(content)
        with pytest.raises(BundleError, match=f"has {len(content):,} bytes instead of {len(good):,}"):
            Bundle.read(packed)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="it is a pipe, not a regular file"):
        Bundle.read(tmp_path / "pipe")


def test_a_file_that_is_replaced_is_noticed(packed: Path, tiny_copy: Path) -> None:
    bundle = Bundle.read(packed)
    stamps = bundle.stamps()
    bundle.require_unchanged(stamps)
    replace_file(tiny_copy, "README.md", b"another one")
    pack(Bundle.read(tiny_copy), packed)
    with pytest.raises(BundleError, match="was replaced"):
        bundle.require_unchanged(stamps)
    with pytest.raises(BundleError, match="replaced"):
        bundle.verify()


def test_commands(packed: Path, edgelm_command: RunCommand, tmp_path: Path) -> None:
    done = edgelm_command("pack", str(TINY_BUNDLE))
    assert done.status == 0 and done.stdout == ""
    name = f"{TINY_BUNDLE.name}.edgelm"
    assert (tmp_path / name).read_bytes() == packed.read_bytes()
    for arguments in (["info", name], ["verify", name, "--hashes-only"], ["run", "-m", name, "ab", "-n", "3"]):
        assert edgelm_command(*arguments).status == 0
    folder = edgelm_command("run", "-m", str(TINY_BUNDLE), "ab", "-n", "3", "--greedy")
    assert edgelm_command("run", "-m", name, "ab", "-n", "3", "--greedy").stdout == folder.stdout
    assert edgelm_command("unpack", name, "-o", "folder").status == 0
    assert "already" in edgelm_command("unpack", name, "-o", "folder").one_line()
    assert "it is a folder" in edgelm_command("pack", name, "-o", ".").one_line()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "it is a device or a pipe" in edgelm_command("pack", name, "-o", "pipe").one_line()
    assert "there is no folder 'no'" in edgelm_command("pack", name, "-o", "no/x.edgelm").one_line()
    (tmp_path / "plain").write_bytes(packed.read_bytes())
    assert edgelm_command("unpack", "plain").status == 2


def _alter(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
