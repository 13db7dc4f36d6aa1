"""Every page runs as it stands: its Python programs, its shell commands, its links, and the flags it names.

A shell block that needs the network or hours of training has the comment ``<!-- not run: REASON -->`` above it. Its
commands are not run, but their subcommands and flags must exist. Commands that install something, and benchmarks, which
take minutes, are not run either.
"""

import dataclasses
import inspect
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

import edgelm
from edgelm.cli import cli
from tests.build_side import MISSING, TRAINING_MISSING
from tests.conftest import ROOT
from tests.documents.pages import PAGES, Block, Page, page
from tests.test_architecture import EXPORT_ROOMS, RUNTIME_ROOMS, TRAIN_ROOMS

# The Chinese README has the code of the English one, as a test below asserts: it need not run twice.
BLOCKS = [block for each in PAGES if each.path.name != "README.zh-CN.md" for block in each.blocks]
PROGRAMS = [block for block in BLOCKS if block.language == "python"]
COMMANDS = [
    (block, command)
    for block in BLOCKS
    if block.language == "sh" and block.not_run is None
    for command in block.commands
    if not command.startswith(("python -m benchmarks.", "pip "))
]
NUMBER = re.compile(r"-?\d+\.\d+")


def first_commands(readme: Page) -> list[str]:
    """The install command and the test command of a README: its first two shell blocks."""
    return [block.body.strip() for block in readme.blocks if block.language == "sh"][:2]


def test_the_first_command_installs_and_runs() -> None:
    assert first_commands(page("README.md"))[0] == 'pip install ".[cpu]" && edgelm run "Once upon a time"'


def test_ci_runs_the_very_test_command_of_the_readme() -> None:
    command = first_commands(page("README.md"))[1]
    assert command.startswith("pip install -e") and "&& pytest" in command
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert command in page("CONTRIBUTING.md").text.splitlines()


def test_both_readmes_say_the_same() -> None:
    """The Chinese README has the headings, commands, programs, numbers and links of the English one."""
    english, chinese = page("README.md"), page("README.zh-CN.md")

    def shape(readme: Page) -> list[object]:
        code = [re.sub(r" *#.*", "", block.body) for block in readme.blocks if block.language in ("sh", "python")]
        rows = [line.count("|") for line in readme.text.splitlines() if line.startswith("|")]
        return [[heading.count("#") for heading in readme.headings], code, rows]

    assert shape(english) == shape(chinese)
    assert set(english.links) - {"README.zh-CN.md"} == set(chinese.links) - {"README.md"}
    tables = [re.findall(r"\d[\d,.]*", "".join(re.findall(r"^\|.*$", each.text, re.M))) for each in (english, chinese)]
    assert tables[0] == tables[1]


def test_there_is_something_to_run() -> None:
    """As many programs and commands as ever: a page that loses its marks would lose its tests."""
    assert len(PROGRAMS) >= 19 and len(COMMANDS) >= 22
    assert len([block for block in PROGRAMS if block.expected is not None]) >= 6


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_programs_run(block: Block, tmp_path: Path) -> None:
    """EDGELM_UPDATE_PAGES=1 writes what the programs print into the pages."""
    if '"fork"' in block.body and sys.platform in ("win32", "darwin"):
        pytest.skip("no fork here, or none that is safe")
    if "edgelm_export" in block.body and MISSING:
        pytest.skip(f"the build side is not installed ({', '.join(MISSING)} missing)")
    script = tmp_path / "program.py"
    script.write_text(block.body, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout, "a program of a page prints something"
    if block.expected is None:
        return
    if os.environ.get("EDGELM_UPDATE_PAGES") == "1":
        path = ROOT / block.page
        old, new = (f"{block.body}```\n```text\n{printed}```" for printed in (block.expected, done.stdout))
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        return
    # Processors differ in the last bits, and eight bits of activation make more of that.
    assert NUMBER.sub("_", done.stdout) == NUMBER.sub("_", block.expected)
    printed, stated = ([float(n) for n in NUMBER.findall(text)] for text in (done.stdout, block.expected))
    assert printed == pytest.approx(stated, rel=0.02, abs=0.02)


@pytest.mark.skipif(os.name == "nt", reason="the pages' commands are for a POSIX shell")
@pytest.mark.parametrize("block, command", COMMANDS, ids=[f"{block}: {command}" for block, command in COMMANDS])
def test_commands_run(block: Block, command: str, tmp_path: Path) -> None:
    if "models/dialogue" in command and not (ROOT / "models" / "dialogue-6m-int8").is_dir():
        pytest.skip("the dialogue model lies in the repository only")
    for name in ("models", "examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = shlex.quote(sys.executable)
    command = re.sub(r"(^|\| |&& )edgelm ", rf"\1{python} -m edgelm ", command)
    command = re.sub(r"(^|\| |&& )python ", rf"\1{python} ", command)
    environment = {name: value for name, value in os.environ.items() if name != "EDGELM_MODEL"}
    done = subprocess.run(
        ["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path, env=environment,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("each", PAGES, ids=str)
def test_commands_and_flags_exist(each: Page) -> None:
    for words in each.edgelm_commands:
        if words[0].startswith("-"):
            continue
        if words[0] in ("export", "pretrain", "finetune", "distill") and (MISSING or TRAINING_MISSING):
            continue
        command = cli.get_command(click.Context(cli), words[0])
        assert command is not None, f"edgelm {' '.join(words)}"
        flags = {flag for option in command.params for flag in [*option.opts, *option.secondary_opts]} | {
            "-h",
            "--help",
        }
        for word in words[1:]:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in {*flags, "-h", "--help"}, f"edgelm {' '.join(words)}: {word}"


@pytest.mark.parametrize("each", PAGES, ids=str)
def test_named_modules_and_tests_exist(each: Page) -> None:
    for module in re.findall(r"python -m ((?:benchmarks|edgelm\w*)[\w.]*)", each.text):
        assert find_spec(module.rstrip(".")), module
    for path in re.findall(r"\b((?:tests|benchmarks|examples|models)/[\w/.-]+\.(?:py|json|toml|md))\b", each.text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("each", PAGES, ids=str)
def test_links_lead_somewhere(each: Page) -> None:
    for link in each.links:
        name, _, anchor = link.partition("#")
        target = (each.path.parent / name).resolve() if name else each.path
        assert target.exists(), link
        if anchor:
            assert anchor in Page(target).anchors, link


@pytest.mark.parametrize("each", PAGES, ids=str)
def test_a_stranger_has_everything_a_page_names(each: Page) -> None:
    assert "@@" not in each.text and "shared/" not in each.text


def test_the_index_has_every_page() -> None:
    index = page("docs/README.md").links
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or path.name in {link.partition("#")[0] for link in index}, path.name


def test_the_picture_of_the_house_is_true() -> None:
    """It names every room of every package, fits on a screen, and the files that newcomers are sent to exist."""
    text = page("CONTRIBUTING.md").text
    picture = text.split("```")[1]
    assert len(picture.splitlines()) <= 24 and max(map(len, picture.splitlines())) <= 120
    for level in (*RUNTIME_ROOMS, *EXPORT_ROOMS, *TRAIN_ROOMS):
        for room in (level,) if isinstance(level, str) else level:
            assert re.search(rf"\b{room}\b", picture), room
    for path in re.findall(r"`((?:edgelm|export|tests|benchmarks|docs|examples)/[\w/.-]*)`", text):
        assert (ROOT / path).exists(), path


def test_the_api_page_names_everything() -> None:
    """Every public name; every field of a result; every public member of Model; every argument of load."""
    text = page("docs/api.md").text
    sections = {part.partition("`\n")[0]: part for part in re.split(r"^##+ `?", text, flags=re.M)}

    def members(name: str) -> set[str]:
        cells = re.findall(r"^\| (`.*?) \|", sections[name], re.M)
        return {member for cell in cells for member in re.findall(r"`(\w+)", cell)}

    for name in edgelm.__all__:
        value = getattr(edgelm, name)
        assert f"`{name}" in text, name
        if name == "load":
            assert members(name) == set(inspect.signature(value).parameters)
        elif name == "Model":
            held = {"bundle", "tokenizer", "session", "generation_config", "prefix", "load_seconds"}
            assert members(name) - {"prefix_bytes"} >= {each for each in vars(value) if each[0] != "_"} | held
        elif dataclasses.is_dataclass(value) and name in sections and name not in ("GenerationConfig", "Bundle"):
            assert members(name) == {field.name for field in dataclasses.fields(value)}, name
        elif isinstance(value, type) and issubclass(value, Exception):
            assert re.search(rf"^\| `{name}` \|", text, re.M), name
    with edgelm.load() as model:
        for each in (model.session, model.tokenizer, model.tokenizer.stream(), model.bundle):
            missing = {member for member in members(type(each).__name__) if not hasattr(each, member)}
            assert not missing, type(each).__name__
        memory = {field.name for field in dataclasses.fields(model.memory)}
    assert memory <= set(re.findall(r"`(\w+)`", sections["Model"]))
