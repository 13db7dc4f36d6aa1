"""Sealing a draft: the manifest lists every file, and each file is hashed once."""

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
from edgelm_export.publish.folder import seal
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
