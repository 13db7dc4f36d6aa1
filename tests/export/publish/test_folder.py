"""Sealing a draft: the manifest lists every file, each hashed once; drafts of killed exports go."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from edgelm.bundle.folder import Bundle, file_fact
from edgelm.bundle.manifest import MANIFEST_NAME
from edgelm_export.publish.folder import seal, workshop
from tests.conftest import ROOT, TINY_BUNDLE

pytestmark = pytest.mark.export


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_killed_export_leaves_a_whole_bundle_or_none() -> None:
    """`python -m benchmarks.kills export` kills 200; a process of its own, because it forks."""
    pytest.importorskip("benchmarks", reason="the benchmarks are not part of a distribution")
    command = [sys.executable, "-m", "benchmarks.kills", "export", "--count", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0 and " 0 faults" in done.stdout, done.stdout + done.stderr


def test_each_file_is_hashed_once(tmp_path: Path) -> None:
    draft = Path(shutil.copytree(TINY_BUNDLE, tmp_path / "draft"))
    whole = Bundle.read(TINY_BUNDLE).manifest
    (draft / "README.md").unlink()
    with mock.patch("edgelm_export.publish.folder.file_fact", side_effect=file_fact) as hashed:
        first = seal(draft, replace(whole, files={}))
        shutil.copyfile(TINY_BUNDLE / "README.md", draft / "README.md")
        second = seal(draft, first)
    assert first.files == {name: fact for name, fact in whole.files.items() if name != "README.md"}
    assert second == whole == Bundle.read(draft).manifest
    names = [call.args[0].name for call in hashed.call_args_list]
    assert sorted(names) == sorted(path.name for path in TINY_BUNDLE.iterdir() if path.name != MANIFEST_NAME)


HOLD = """
import sys, time
import subprocess
import sys
from pathlib import Path
from edgelm_export.publish.folder import workshop
with workshop(Path(sys.argv[1])) as (draft, scratch):
    (draft / "model.onnx").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_drafts_of_killed_exports_are_removed_by_the_next_one(tmp_path: Path) -> None:
    def begin(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path / name)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        return child

    (tmp_path / ".bundle.notours").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").touch()
    killed, alive = begin("bundle"), begin("other")
    try:
        killed.kill()
        killed.wait()
        assert len(list(tmp_path.glob(".bundle.*/draft"))) == 1
        with workshop(tmp_path / "third"):
            assert not list(tmp_path.glob(".bundle.*/draft"))  # nobody works on it
            assert len(list(tmp_path.glob(".other.*/draft/model.onnx"))) == 1
            assert (tmp_path / ".bundle.notours").is_dir() and (tmp_path / ".git" / "HEAD").is_file()
        assert not list(tmp_path.glob(".third*"))
    finally:
        alive.kill()
        alive.wait()
        for child in (killed, alive):
            assert child.stdout is not None
            child.stdout.close()
