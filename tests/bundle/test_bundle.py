"""Each damaged, hostile or too new bundle has a named error, which is raised before anything is loaded."""

import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgelm
import edgelm_models
from edgelm import Bundle, BundleError, EdgelmError
from edgelm.bundle.folder import default_bundle_path
from edgelm.bundle.manifest import digest_of, read_manifest
from tests.conftest import TINY_BUNDLE, edit_manifest, replace_file

Edit = Callable[[dict[str, Any]], object]


def test_reads_facts() -> None:
    bundle = Bundle.read(TINY_BUNDLE)
    assert bundle.path == TINY_BUNDLE
    assert bundle.manifest.architecture.vocab_size == 300
    assert bundle.manifest.recipe.name == "fp32"
    assert bundle.manifest.certificate is not None and bundle.manifest.certificate.passed
    assert bundle.size_bytes == sum(path.stat().st_size for path in TINY_BUNDLE.iterdir())


def test_each_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is judged is what was hashed, even where somebody replaces the graph meanwhile."""
    opened, of_path = list[str](), Path.open

    def recorded(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(path.name)
        return of_path(path, *args, **options)

    monkeypatch.setattr(Path, "open", recorded)
    monkeypatch.setattr(Path, "read_bytes", lambda path: recorded(path, "rb").read())
    manifest = Bundle.read(TINY_BUNDLE).manifest
    assert sorted(opened) == sorted({*manifest.files, "bundle.json"} - {manifest.graph.weights_file})


def test_digest_is_the_hash_of_canonical_json() -> None:
    content = json.loads((TINY_BUNDLE / "bundle.json").read_text(encoding="utf-8"))
    digest = content.pop("digest")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert digest == digest_of(content) == hashlib.sha256(text.encode()).hexdigest()


def test_written_again_it_is_the_same() -> None:
    text = (TINY_BUNDLE / "bundle.json").read_bytes()
    assert read_manifest(text).to_json().encode() == text


def test_every_matrix_of_the_embedded_model_is_accounted_for() -> None:
    manifest = Bundle.read(default_bundle_path()).manifest
    layers = manifest.architecture.num_layers
    assert len(manifest.recipe.matrices) == 2 + 4 * layers
    assert {m.format for m in manifest.recipe.matrices} == {"block", "float32"}
    assert all(m.relative_error < 0.02 for m in manifest.recipe.matrices)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format_version=3), "format_version 3, this edgelm reads up to 2: needs a newer edgelm"),
        (lambda m: m.update(required_features=["latents"]), "uses 'latents': needs edgelm newer"),
        (lambda m: m.update(required_features=["prefix"]), "the feature 'prefix' without 'prefix.safetensors'"),
        (lambda m: m["files"].update({"prefix.safetensors": m["files"]["config.json"]}), "or the file alone"),
        (lambda m: m.update(format_version=0), "format_version 0, which this edgelm no longer reads"),
        (
            lambda m: m.update(format_version=1),
            "format_version 1, which this edgelm no longer reads (it reads 2): export the checkpoint again",
        ),
        (lambda m: m.update(format_version="1"), "format_version must be a whole number"),
        (lambda m: m.update(extra=1), "unknown field 'extra'"),
        (lambda m: m["graph"].update(code="x"), "unknown field 'graph.code'"),
        (lambda m: m.pop("architecture"), "lacks the field 'architecture'"),
        (lambda m: m["architecture"].update(source_head_dim=9), "source_head_dim is 9, more than the cache's head_dim"),
        (lambda m: m["architecture"].update(num_heads=5), "num_heads is 5, which is not a multiple"),
        (lambda m: m["graph"].pop("position_ids"), "lacks the field 'graph.position_ids'"),
        (lambda m: m["architecture"].pop("num_heads"), "lacks the field 'architecture.num_heads'"),
        (lambda m: m["architecture"].update(num_layers=10**9), "num_layers must be between 1 and 1024"),
        (lambda m: m["architecture"].update(num_layers=2.5), "num_layers must be a whole number, got 2.5"),
        (lambda m: m["architecture"].update(num_layers=True), "num_layers must be a whole number, got True"),
        (lambda m: m["architecture"].update(vocab_size=10**12), "vocab_size must be between"),
        (lambda m: m["graph"].update(kv_dtype="float64"), "kv_dtype must be one of"),
        (lambda m: m["graph"].update(devices=[]), "graph.devices is empty"),
        (lambda m: m["graph"].update(past_names=["a"]), "must name a key and a value"),
        (lambda m: m["graph"].update(minimum_onnxruntime="x"), "minimum_onnxruntime must be like"),
        (lambda m: m["graph"].update(weights_file="other"), "lists no file 'other'"),
        (lambda m: m["graph"].update(weights_file="tokenizer.json"), "gives two parts of the bundle one file"),
        (lambda m: m["files"].pop("tokenizer.json"), "lists no file 'tokenizer.json'"),
        (lambda m: m["files"]["config.json"].update(size_bytes=-1), "size_bytes must be between 0"),
        (lambda m: m["files"]["config.json"].update(size_bytes=2**62), "size_bytes must be between 0"),
        (lambda m: m["files"]["config.json"].update(sha256="zz"), "is not 64 hexadecimal digits"),
        (lambda m: m["files"]["config.json"].update(sha256="0" * 64), "content of 'config.json' is not what"),
        (lambda m: m["certificate"]["texts"][0].update(top1_agreement=2), "top1_agreement must be between 0 and 1"),
        (lambda m: m["certificate"].update(texts=[]), "certificate.texts is empty"),
        (lambda m: m["certificate"]["reference"].update(file="other.bin"), "lists no file 'other.bin'"),
        (lambda m: m["certificate"]["reference"].update(value_noise=2), "value_noise must be between 0 and 1"),
        (lambda m: m["certificate"]["reference"].update(tokens=2**40), "reference.tokens must be between 2"),
        (lambda m: m["certificate"]["footprint"].pop("cpu"), "lacks the field 'certificate.footprint.cpu'"),
    ],
)
def test_bad_manifests_are_refused_by_name(tiny_copy: Path, edit: Edit, message: str) -> None:
    edit_manifest(tiny_copy, edit)
    with pytest.raises(BundleError) as error:
        edgelm.load(tiny_copy)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "a/../../b",
        "..\\b",
        "C:\\x",
        "sub/file",
        "nul\0",
        ".hidden",
        "",
        "x" * 200,
        "bundle.json",
        "a b",
        "ü",
        "trailing.",
        "NUL",
        "con.json",
        "LPT1.tar.gz",
    ],
)
def test_names_that_leave_the_folder_or_are_none_on_windows_are_refused(tiny_copy: Path, name: str) -> None:
    edit_manifest(tiny_copy, lambda m: m["files"].update({name: m["files"]["config.json"]}))
    with pytest.raises(BundleError, match="is not a plain file name"):
        Bundle.read(tiny_copy)


def test_names_that_differ_in_case_only_are_refused(tiny_copy: Path) -> None:
    edit_manifest(tiny_copy, lambda m: m["files"].update({"CONFIG.json": m["files"]["config.json"]}))
    with pytest.raises(BundleError, match="differ only in upper and lower case"):
        Bundle.read(tiny_copy)


def test_an_edited_manifest_is_noticed(tiny_copy: Path) -> None:
    edit_manifest(tiny_copy, lambda m: m["source"].update(name="better"), reseal=False)
    with pytest.raises(BundleError, match="does not match its own digest"):
        Bundle.read(tiny_copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "must be an object"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"format_version": 1, "format_version": 1}', "twice"),
        (b"[" * 50_000, "nested too deeply"),
        (b" " * (5 * 2**20), "more than 4,194,304"),
    ],
)
def test_broken_manifest_text(tiny_copy: Path, text: bytes, message: str) -> None:
    (tiny_copy / "bundle.json").write_bytes(text)
    with pytest.raises(BundleError, match=message):
        Bundle.read(tiny_copy)


def test_truncated_weights_are_refused_with_both_sizes(tiny_copy: Path) -> None:
    weights = tiny_copy / "model.onnx.data"
    size = weights.stat().st_size
    os.truncate(weights, size - 1)
    with pytest.raises(BundleError, match=rf"'model.onnx.data' has {size - 1:,} bytes instead of {size:,}"):
        Bundle.read(tiny_copy)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "generation_config.json", "README.md"])
def test_a_flipped_byte_in_a_small_file_is_noticed_at_loading(tiny_copy: Path, name: str) -> None:
    _flip_byte(tiny_copy / name, 40)
    with pytest.raises(BundleError, match=f"the content of '{name}' is not what bundle.json says"):
        Bundle.read(tiny_copy)


def test_a_flipped_byte_in_the_weights_is_noticed_by_verify(tiny_copy: Path) -> None:
    bundle = Bundle.read(tiny_copy)
    seen: list[str] = []
    assert bundle.verify(lambda name, size: seen.append(name)) == sum(
        fact.size_bytes for fact in bundle.manifest.files.values()
    )
    assert seen == list(bundle.manifest.files)
    _flip_byte(tiny_copy / "model.onnx.data", 50_000)
    with pytest.raises(BundleError, match=r"'model\.onnx\.data'"):
        Bundle.read(tiny_copy).verify()


def test_missing_extra_and_odd_files(tiny_copy: Path) -> None:
    (tiny_copy / ".gitattributes").write_text("fine")
    Bundle.read(tiny_copy)
    (tiny_copy / "extra.py").write_text("no")
    with pytest.raises(BundleError, match=r"'extra\.py' is not listed"):
        Bundle.read(tiny_copy)
    (tiny_copy / "extra.py").unlink()
    (tiny_copy / "config.json").unlink()
    with pytest.raises(BundleError, match=r"'config\.json' is missing"):
        Bundle.read(tiny_copy)
    (tiny_copy / "config.json").mkdir()
    with pytest.raises(BundleError, match="is not a regular file"):
        Bundle.read(tiny_copy)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="symbolic links and pipes need POSIX")
def test_links_and_pipes_are_refused_unopened(tiny_copy: Path, tmp_path: Path) -> None:
    target = tiny_copy / "config.json"
    copy = tmp_path / "config-elsewhere.json"
    shutil.copy(target, copy)
    target.unlink()
    target.symlink_to(copy)
    with pytest.raises(BundleError, match="is a symbolic link"):
        Bundle.read(tiny_copy)
    target.unlink()
    os.mkfifo(target)  # opening it would wait for ever
    with pytest.raises(BundleError, match="is not a regular file"):
        Bundle.read(tiny_copy)


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no such folder"):
        Bundle.read(tmp_path / "none")
    with pytest.raises(BundleError, match=r"holds no bundle\.json$"):
        Bundle.read(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(BundleError, match="looks like a checkpoint: run `edgelm export`"):
        Bundle.read(tmp_path)
    with pytest.raises(BundleError, match="it is a file"):
        Bundle.read(tmp_path / "model.safetensors")
    with pytest.raises(BundleError):
        Bundle.read("nul\0byte")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["architecture"].update(vocab_size=200), r"'logits' is float32 \(rows, 300\), but bundle.json"),
        (lambda m: m["architecture"].update(vocab_size=301), r"bundle.json states float32 \(rows, 301\)"),
        (lambda m: m["architecture"].update(num_key_value_heads=2), r"states float32 \(batch, 2, capacity, 8\)"),
        (lambda m: m["architecture"].update(head_dim=16), r"states float32 \(batch, 4, capacity, 16\)"),
        (lambda m: m["architecture"].update(num_layers=3), "has other inputs than bundle.json states"),
        (lambda m: m["architecture"].update(cache_values_per_token=2), "a token takes 128 numbers in its cache"),
        (lambda m: m["graph"].update(input_ids="tokens"), "has other inputs than bundle.json states"),
        (lambda m: m["graph"].update(logits="scores"), "has other outputs than bundle.json states"),
        (lambda m: m["graph"].update(past_names=["{layer.__class__}", "b"]), "gives two of its inputs one name"),
        (lambda m: m["graph"].update(minimum_onnxruntime="99.0"), "needs ONNX Runtime 99.0 or newer"),
    ],
)
def test_a_manifest_that_disagrees_with_the_graph(tiny_copy: Path, edit: Edit, message: str) -> None:
    edit_manifest(tiny_copy, edit)
    with pytest.raises(EdgelmError, match=message):
        edgelm.load(tiny_copy)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", b'{"top_p": 7}', r"top_p must be in \(0, 1\], got 7"),
        ("generation_config.json", b'{"topp": 0.5}', "unknown generation option 'topp'; did you mean 'top_p'"),
        ("generation_config.json", b'{"eos_token_id": 300}', "eos_token_id 300 is not in the vocabulary"),
        ("generation_config.json", b"[]", "must be an object"),
        ("tokenizer.json", b"{}", "tokenizer"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json of .*tiny"),
        ("model.onnx", b"garbage", "the graph 'model.onnx' is not one that edgelm writes: the file has field 12"),
    ],
)
def test_contents_that_cannot_be_used(tiny_copy: Path, name: str, content: bytes, message: str) -> None:
    """The hashes are corrected, so that only the content is wrong."""
    replace_file(tiny_copy, name, content)
    with pytest.raises(EdgelmError, match=message) as error:
        edgelm.load(tiny_copy)
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=6))
def test_any_damage_to_the_manifest_is_a_bundle_error(tiny_copy: Path, at: int, junk: bytes) -> None:
    original = (TINY_BUNDLE / "bundle.json").read_bytes()
    at %= len(original)
    damaged = original[:at] + junk + original[at + len(junk) :]
    (tiny_copy / "bundle.json").write_bytes(damaged)
    if json_equal(damaged, original):
        Bundle.read(tiny_copy)
    else:
        with pytest.raises(BundleError):
            Bundle.read(tiny_copy)


def json_equal(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


def _flip_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(data)


def test_an_embedded_model_inside_a_zip_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "program.pyz", "w") as archive:
        archive.write(edgelm_models.__file__, "edgelm_models/__init__.py")
    monkeypatch.syspath_prepend(str(tmp_path / "program.pyz"))
    monkeypatch.delitem(sys.modules, "edgelm_models")
    with pytest.raises(BundleError, match=r"program\.pyz.*cannot be loaded out of an archive .* name a bundle"):
        default_bundle_path()
