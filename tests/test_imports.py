"""`import edgelm` loads no heavy module, and inference never loads torch, transformers or onnx."""

import json
import subprocess
import sys

import pytest

from edgelm.errors import install_hint
from tests.conftest import TINY_BUNDLE

HEAVY = (
    "numpy",
    "onnxruntime",
    "tokenizers",
    "safetensors",
    "click",
    "torch",
    "transformers",
    "onnx",
    "optimum",
    "huggingface_hub",
)
BUILD_SIDE = ("torch", "transformers", "onnx", "optimum", "huggingface_hub", "edgelm_export")


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `code`."""
    tail = "\nimport sys, json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_edgelm_loads_nothing() -> None:
    assert not loaded_after("import edgelm").intersection(HEAVY)


def test_the_help_loads_click_only() -> None:
    code = "import edgelm.cli as c\ntry: c.cli.main(['--help'])\nexcept SystemExit: pass\n"
    assert loaded_after(code).intersection(HEAVY) == {"click"}


@pytest.mark.parametrize(
    "code",
    [
        f"import edgelm; edgelm.load({str(TINY_BUNDLE)!r}).generate('a', max_new_tokens=2)",
        f"import edgelm; edgelm.load({str(TINY_BUNDLE)!r}).generate('a', max_new_tokens=2, do_sample=True)",
        "import edgelm.cli as c; c.cli.main(['run', 'Hi', '-n', '2'], standalone_mode=False)",
        "import edgelm.cli as c; c.cli.main(['bench', '--runs', '1'], standalone_mode=False)",
        "import edgelm.cli as c; c.cli.main(['verify'], standalone_mode=False)",
    ],
)
def test_inference_loads_no_build_side(code: str) -> None:
    assert not loaded_after(code).intersection(BUILD_SIDE)


@pytest.mark.parametrize("command", [["info"], ["verify", "--hashes-only"]])
def test_info_and_hashes_load_neither_onnxruntime_nor_numpy(command: list[str]) -> None:
    code = f"import edgelm.cli as c; c.cli.main({command}, standalone_mode=False)"
    assert not loaded_after(code).intersection({"onnxruntime", "numpy", "tokenizers"})


def test_the_hint_works_from_an_index_and_in_a_clone() -> None:
    assert install_hint("cpu") == "run: pip install 'edgelm[cpu]' (in a clone: pip install '.[cpu]')"


@pytest.mark.parametrize("error", ["ModuleNotFoundError", "ImportError"])
def test_without_onnxruntime_one_line_says_what_to_install(error: str) -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'onnxruntime': raise {error}('No module named onnxruntime')\n"
        "sys.meta_path.insert(0, Block())\n"
        "sys.argv = ['edgelm', 'run', 'Hi']\n"
        "from edgelm.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    message = install_hint("cpu") if error == "ModuleNotFoundError" else "installed but does not load"
    assert message in done.stderr


def test_export_without_the_build_side_says_what_to_install(tmp_path: object) -> None:
    code = (
        "import sys, importlib.util\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'torch' else object()\n"
        f"sys.argv = ['edgelm', 'export', 'gpt2', '-o', {str(tmp_path)!r} + '/x']\n"
        "from edgelm.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"edgelm: export needs torch; {install_hint('cpu,export')}\n"


def test_pretrain_without_the_training_side_says_what_to_install(tmp_path: object) -> None:
    code = (
        "import sys, importlib.util\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'accelerate' else object()\n"
        f"sys.argv = ['edgelm', 'pretrain', '--data', 'x.txt', '-o', {str(tmp_path)!r} + '/x']\n"
        "from edgelm.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"edgelm: pretrain needs accelerate; {install_hint('cpu,train')}\n"


def test_serve_without_its_extra_says_what_to_install() -> None:
    code = (
        "import sys, importlib.util\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'uvicorn' else object()\n"
        "sys.argv = ['edgelm', 'serve']\n"
        "from edgelm.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"edgelm: serve needs uvicorn; {install_hint('cpu,serve')}\n"


def test_telemetry_of_onnxruntime_is_off() -> None:
    load = f"import edgelm, os; edgelm.load({str(TINY_BUNDLE)!r}); "
    loaded_after(load + "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'")


def test_every_public_name_resolves() -> None:
    import edgelm

    assert all(getattr(edgelm, name) is not None for name in edgelm.__all__)
    assert set(edgelm.__all__) <= set(dir(edgelm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = edgelm.nothing
