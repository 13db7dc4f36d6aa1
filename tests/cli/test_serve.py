"""``edgelm serve`` asks for the packages that its extra installs."""

import re
import tomllib

from edgelm.cli import serve
from tests.conftest import ROOT


def test_it_needs_what_the_extra_installs() -> None:
    """A name that the extra lacks would tell a user to install again what is installed already."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    names = [re.split(r"[<>=]", line)[0].replace("-", "_") for line in extras["serve"]]
    assert sorted(names) == sorted(serve._NEEDED)
    assert extras["chat"][0] in extras["serve"]
