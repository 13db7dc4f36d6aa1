"""From one machine to another that shares nothing with it but one file: two fresh environments."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.environments import INSTALLS, Environment

pytestmark = INSTALLS


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Environment]:
    """Two environments with edgelm, which find neither this repository nor each other."""
    made = []
    for name in ("here", "there"):
        environment = Environment(tmp_path_factory.mktemp(name) / "venv")
        environment.install(f"{ROOT}[cpu]")
        made.append(environment)
    return made[0], made[1]


def test_pack_copy_verify_run(machines: tuple[Environment, Environment], tmp_path: Path) -> None:
    here, there = machines
    own, away = tmp_path / "own", tmp_path / "away"
    variables = {"PYTHONPATH": "", "HOME": str(away), "EDGELM_CACHE": str(away / "cache")}
    for folder in (own, away):
        folder.mkdir()
    here.output("edgelm", "pack", "-o", str(own / "model.edgelm"), variables=variables)
    prompt = ("--greedy", "-n", "12", "Once upon a time")
    said = here.output("edgelm", "run", *prompt, variables=variables)
    shutil.copyfile(own / "model.edgelm", away / "model.edgelm")
    shutil.rmtree(own)
    packed = str(away / "model.edgelm")
    assert "FAILED" not in there.output("edgelm", "verify", packed, variables=variables)
    assert (
        there.output("edgelm", "run", "-m", packed, "--greedy", "-n", "12", "Once upon a time", variables=variables)
        == said
    )
    code = "import edgelm, sys; print(edgelm.load(sys.argv[1]).generate('Once', max_new_tokens=3).stats.new_tokens)"
    assert there.output("python", "-c", code, packed, variables=variables) == "3\n"


def test_a_wheel_of_the_model(machines: tuple[Environment, Environment], tmp_path: Path) -> None:
    here, there = machines
    here.output("edgelm", "pack", "--wheel", "--name", "our-stories", "-o", str(tmp_path), variables={"PYTHONPATH": ""})
    there.install("--no-index", str(tmp_path / "our_stories-1.0-py3-none-any.whl"))
    variables = {"PYTHONPATH": ""}
    prompt = ("--greedy", "-n", "8", "Once upon a time")
    said = there.output("edgelm", "run", *prompt, variables=variables)  # the embedded model is the same one
    assert there.output("edgelm", "run", "-m", "our-stories", *prompt, variables=variables) == said
    assert "our-stories" in there.output("edgelm", "list", variables=variables)
    assert "FAILED" not in there.output("edgelm", "verify", "our-stories", variables=variables)
