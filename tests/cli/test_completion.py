"""Completion by Tab: click's own mechanism, which asks ``edgelm`` at each press of the key."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import RunCommand

SHELLS = ("bash", "zsh", "fish")


def ask(command: RunCommand, shell: str, words: str, place: int) -> list[str]:
    """The words that ``edgelm`` proposes for word number `place` of `words`."""
    given = words.split(" ")[place]
    env = {"_EDGELM_COMPLETE": f"{shell}_complete", "COMP_WORDS": words}
    result = command(env={**env, "COMP_CWORD": given if shell == "fish" else str(place)})
    assert result.status == 0 and result.stderr == ""
    return result.stdout.replace("\t", "\n").replace(",", "\n").splitlines()


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_flags_and_folders(shell: str, edgelm_command: RunCommand) -> None:
    commands = ask(edgelm_command, shell, "edgelm ", 1)
    assert {"run", "chat", "export", "doctor"} <= set(commands)
    assert "chat" in ask(edgelm_command, shell, "edgelm ch", 1)
    flags = ask(edgelm_command, shell, "edgelm run --te", 2)
    assert "--temperature" in flags and "--top-k" not in flags
    # A bundle is a folder or a packed file; shells complete both by the word "file".
    assert "file" in ask(edgelm_command, shell, "edgelm run -m mod", 3)


@pytest.mark.parametrize("words", ["edgelm ", "edgelm run --te"])
def test_completion_loads_nothing_heavy(words: str) -> None:
    """It runs at each press of Tab, so it must not wait for numpy or ONNX Runtime."""
    code = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
        "sys.argv = ['edgelm']\n"
        "from edgelm.cli import main; main()\n"
    )
    env = {"_EDGELM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, timeout=60
    )
    assert done.returncode == 0 and done.stdout
    loaded = {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}
    assert not loaded & {"numpy", "onnxruntime", "tokenizers", "jinja2", "torch", "edgelm_export", "edgelm_train"}


@pytest.mark.skipif(sys.platform == "win32", reason="the script asks bash for its version")
@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_for_a_shell(shell: str, edgelm_command: RunCommand) -> None:
    result = edgelm_command(env={"_EDGELM_COMPLETE": f"{shell}_source"})
    assert result.status == 0 and f"_EDGELM_COMPLETE={shell}_complete" in result.stdout
