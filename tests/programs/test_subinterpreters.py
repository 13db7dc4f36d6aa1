"""In a sub-interpreter numpy does not load, or ONNX Runtime hangs: edgelm says so before either is imported."""

import subprocess
import sys

import pytest

from tests.conftest import TINY_BUNDLE

PROGRAM = """
try: import _interpreters as interpreters
except ImportError: import _xxsubinterpreters as interpreters
interpreters.run_string(interpreters.create(), '''
import sys
import edgelm
for use in USES:
    try: use()
    except edgelm.EdgelmError as error: print(error)
print("numpy" in sys.modules)
''')
"""


@pytest.mark.parametrize("use", [f"edgelm.load({str(TINY_BUNDLE)!r})", "edgelm.Model", "edgelm.Session"])
def test_a_sub_interpreter_is_refused_with_one_sentence(use: str) -> None:
    code = PROGRAM.replace("USES", f"[lambda: {use}]")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "edgelm does not run in a sub-interpreter, because numpy and ONNX Runtime do not: use the main interpreter "
        "(mod_wsgi: WSGIApplicationGroup %{GLOBAL}), or another process\nFalse\n"
    )


def test_errors_and_the_package_itself_load_there() -> None:
    code = PROGRAM.replace("USES", "[lambda: edgelm.EdgelmError, lambda: edgelm.__version__]")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "False\n")
