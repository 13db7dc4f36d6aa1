"""A bundle that changes on disk under a loaded model, or before a pickle of it is loaded, is noticed."""

import os
import pickle
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import edgelm
from edgelm import BundleError, Model
from edgelm.bundle.folder import Bundle
from edgelm.engine.device import open_inference_session
from tests.conftest import TINY_BUNDLE, edit_manifest

PROMPT = "Once upon a time"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def text(model: Model) -> str:
    return str(model.generate(PROMPT, max_new_tokens=4))


def replace_by_another(folder: Path) -> None:
    """As a deployment does: a new bundle takes the folder's name."""
    new = folder.with_name("new")
    shutil.copytree(folder, new)
    edit_manifest(new, lambda manifest: manifest["source"].update(name="another"))
    folder.rename(folder.with_name("old"))
    new.rename(folder)


def replace_by_the_same(folder: Path) -> None:
    new = folder.with_name("new")
    shutil.copytree(folder, new, copy_function=shutil.copy)
    shutil.rmtree(folder)
    new.rename(folder)


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def overwrite_weights(folder: Path) -> None:
    weights = folder / "model.onnx.data"
    content = weights.read_bytes()
    with weights.open("r+b") as stream:  # the same inode
        stream.seek(len(content) // 2)
        stream.write(bytes(byte ^ 1 for byte in content[len(content) // 2 : len(content) // 2 + 64]))
    os.utime(weights, (1, 1))  # a copy that keeps times does this too


def touch_weights(folder: Path) -> None:
    os.utime(folder / "model.onnx.data", (1, 1))


REPLACED = "was replaced after it was loaded: load it again"
WRITTEN = "'model.onnx.data' of .* was written into after it was loaded: .* replace files by renaming new ones"


def in_fork(work: Callable[[], object]) -> str:
    """What `work` raises in a forked child: "" for nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            work()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    assert os.waitpid(child, 0)[1] == 0
    return said


@needs_fork
@pytest.mark.parametrize(
    "change, message",
    [
        (replace_by_another, REPLACED),
        (remove, REPLACED),
        (replace_by_the_same, ""),
        (touch_weights, ""),
        (overwrite_weights, WRITTEN),
    ],
)
def test_a_forked_child_opens_the_bundle_that_was_loaded_or_none(
    tiny_copy: Path, change: Callable[[Path], None], message: str
) -> None:
    with edgelm.load(tiny_copy, threads=1) as model:
        expected = text(model)
        change(tiny_copy)

        def same_text() -> None:
            assert text(model) == expected

        said = in_fork(same_text)
        if message:
            assert said.startswith("BundleError: ") and re.search(message, said), said
        else:
            assert said == ""
        if change is not overwrite_weights:  # the parent keeps the old files
            assert text(model) == expected


def test_weights_that_were_written_into_are_noticed_by_the_next_text(tiny_copy: Path) -> None:
    with edgelm.load(tiny_copy, threads=1) as model:
        expected = text(model)
        touch_weights(tiny_copy)
        assert text(model) == expected
        overwrite_weights(tiny_copy)
        for use in (text, lambda model: model.score("a", "b"), lambda model: model.generate_batch(["a"])):
            with pytest.raises(BundleError, match=WRITTEN):
                use(model)


def test_truncated_weights_are_noticed_by_the_next_text(tiny_copy: Path) -> None:
    with edgelm.load(tiny_copy, threads=1) as model:
        os.truncate(tiny_copy / "model.onnx.data", 4096)
        with pytest.raises(BundleError, match=WRITTEN):
            text(model)


def test_a_bundle_that_is_replaced_while_it_is_loaded(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest and the tokenizer of one bundle never meet the graph of another."""
    import edgelm.engine.graph as graph

    load = open_inference_session

    def slowly(*arguments: object, **options: object) -> object:
        replace_by_another(tiny_copy)
        return load(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(graph, "open_inference_session", slowly)
    with pytest.raises(BundleError, match=REPLACED):
        edgelm.load(tiny_copy)


def test_a_pickle_finds_its_bundle_replaced(tiny_copy: Path) -> None:
    with edgelm.load(tiny_copy, threads=1) as model:
        data = pickle.dumps(model)
    replace_by_the_same(tiny_copy)
    pickle.loads(data).close()
    replace_by_another(tiny_copy)
    with pytest.raises(BundleError, match="is not the bundle of the pickled model: load it here, or pickle it again"):
        pickle.loads(data)


def test_a_pickle_has_what_was_asked_and_not_what_this_machine_made_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """threads, the device and the place of the embedded model are those of the machine that loads it."""
    import edgelm.engine.graph as graph

    with edgelm.load() as model:
        data = pickle.dumps(model)
        assert os.fspath(model.bundle.path).encode() not in data
        here = model.graph.threads
    chosen = 3 if here != 3 else 4
    name = next(name for name in ("default_threads", "choose_threads") if hasattr(graph, name))
    monkeypatch.setattr(graph, name, lambda *_: chosen)
    with pickle.loads(data) as copy:
        assert copy.graph.threads == chosen
        again = pickle.loads(pickle.dumps(copy))
        assert again.graph.threads == chosen
        again.close()


def test_a_pickle_keeps_explicit_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY_BUNDLE.parent)
    with edgelm.load(TINY_BUNDLE.name, device="cpu", threads=2, prefix_cache_bytes=10**6) as model:
        data = pickle.dumps(model)
    monkeypatch.chdir(tmp_path)  # a relative path travels as an absolute one
    with pickle.loads(data) as copy:
        assert copy.graph.threads == 2 and copy.bundle.path == TINY_BUNDLE


def test_a_model_made_of_parts_is_not_pickled() -> None:
    with edgelm.load(TINY_BUNDLE, threads=1) as model:
        parts = Model(model.graph, model.tokenizer)
        with pytest.raises(TypeError, match="a model made of parts cannot be pickled"):
            pickle.dumps(parts)


@pytest.fixture
def installed_by_links(tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package of the embedded model with a link for each file, as `uv --link-mode=symlink` installs it."""
    package = tmp_path / "site-packages" / "edgelm_models"
    bundle = package / "embedded"
    bundle.mkdir(parents=True)
    for file in tiny_copy.iterdir():
        (bundle / file.name).symlink_to(file)
    (tmp_path / "real.py").write_text(
        "from pathlib import Path\ndef default_bundle_path(): return Path(__file__).parent / 'embedded'\n"
    )
    (package / "__init__.py").symlink_to(tmp_path / "real.py")
    monkeypatch.delitem(sys.modules, "edgelm_models", raising=False)
    monkeypatch.syspath_prepend(package.parent)
    return bundle


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_the_embedded_model_may_be_links(installed_by_links: Path) -> None:
    with edgelm.load(threads=1) as model, edgelm.load(TINY_BUNDLE, threads=1) as plain:
        assert model.bundle.path == installed_by_links
        assert text(model) == text(plain)
        assert model.bundle.verify() == plain.bundle.verify()


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
@pytest.mark.parametrize("target", ["missing", "folder", "device"])
def test_links_of_the_embedded_model_lead_to_regular_files(installed_by_links: Path, target: str) -> None:
    link = installed_by_links / "config.json"
    link.unlink()
    link.symlink_to({"missing": "/no/such/file", "folder": "/tmp", "device": "/dev/zero"}[target])
    with pytest.raises(BundleError):
        edgelm.load()


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
@pytest.mark.parametrize("name", ["model.onnx.data", "config.json", "bundle.json"])
def test_links_in_any_other_bundle_are_refused(tiny_copy: Path, name: str) -> None:
    shutil.move(tiny_copy / name, tiny_copy.parent / name)
    (tiny_copy / name).symlink_to(tiny_copy.parent / name)
    with pytest.raises(BundleError, match=r"is a symbolic link, and a bundle holds real files only: copy it with `cp"):
        Bundle.read(tiny_copy)
