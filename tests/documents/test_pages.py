"""What a page names exists: the targets of its links, commands with their flags, modules, tests, rooms and members."""

import dataclasses
import inspect
import re
from importlib.util import find_spec

import click
import pytest

import edgelm
from edgelm.cli import cli
from tests.build_side import MISSING, TRAINING_MISSING
from tests.conftest import ROOT
from tests.documents.pages import PAGES, Page, page
from tests.test_architecture import EXPORT_ROOMS, RUNTIME_ROOMS, TRAIN_ROOMS


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


@pytest.mark.parametrize("each", PAGES, ids=str)
def test_commands_and_flags_exist(each: Page) -> None:
    for words in each.edgelm_commands:
        if words[0].startswith("-"):
            continue
        if words[0] in ("export", "pretrain", "finetune", "distill") and (MISSING or TRAINING_MISSING):
            continue
        command = cli.get_command(click.Context(cli), words[0])
        if isinstance(command, click.Group) and len(words) > 1:
            command = command.get_command(click.Context(command), words[1])
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
    for path in re.findall(
        r"(?<!\w/)\b((?:tests|benchmarks|examples|models)/[\w/.-]+\.(?:py|json|toml|md))\b", each.text
    ):
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
