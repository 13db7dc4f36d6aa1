"""Virtual environments, for tests of programs that need packages which edgelm's own tests do without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTALLS = [
    pytest.mark.network,
    pytest.mark.skipif(not os.environ.get("EDGELM_TEST_NETWORK"), reason="installs packages: EDGELM_TEST_NETWORK=1"),
]
"""The marks of a test that installs packages, as its file's `pytestmark`."""


class Environment:
    """A virtual environment."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)

    def install(self, *packages: str) -> None:
        command = [str(self.bin / "python"), "-m", "pip", "install", "-q", *packages]
        subprocess.run(command, check=True, capture_output=True, timeout=1200)

    def run(self, code: str) -> str:
        """What a program prints."""
        return self.output("python", "-c", code)

    def output(self, program: str, *arguments: str, variables: dict[str, str] | None = None) -> str:
        """What a program of the environment prints, with `variables` beside this process's own; it must succeed."""
        command = [str(self.bin / program), *arguments]
        done = subprocess.run(
            command, env=os.environ | (variables or {}), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
