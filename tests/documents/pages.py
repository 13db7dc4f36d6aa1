"""The pages of the documents, and the blocks, commands and links on a page."""

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.conftest import ROOT

_BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)^```$", re.M | re.S)
_EXPECTED = re.compile(r"\n```text\n(.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    body: str
    expected: str | None
    """The `text` block that follows directly: what the program prints."""
    not_run: str | None
    """Why the commands of this block cannot run in a test, from the comment above it."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The shell commands of the block, with continued lines joined and without comments."""
        lines = self.body.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


@dataclass(frozen=True)
class Page:
    """A document."""

    path: Path

    def __str__(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[Block]:
        all_blocks = []
        for match in _BLOCK.finditer(self.text):
            follows = _EXPECTED.match(self.text, match.end())
            line = self.text.count("\n", 0, match.start("language")) + 1
            expected = None if follows is None else follows[1]
            all_blocks.append(Block(str(self), line, match["language"], match["body"], expected, match["reason"]))
        return all_blocks

    @property
    def headings(self) -> list[str]:
        """The lines of the page's headings, without lines inside blocks."""
        return re.findall(r"^#+ .*$", re.sub(r"^```.*?^```$", "", self.text, flags=re.M | re.S), re.M)

    @property
    def anchors(self) -> set[str]:
        """The anchors that GitHub makes of the page's headings."""
        words = (re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()) for heading in self.headings)
        return {word.replace(" ", "-") for word in words}

    @property
    def links(self) -> list[str]:
        """The targets of the page's links to files and headings of this repository."""
        return [link for link in re.findall(r"\]\(([^)\s]+)\)", self.text) if not re.match(r"\w+:", link)]

    @property
    def edgelm_commands(self) -> list[list[str]]:
        """The words of every `edgelm ...` command on the page, in blocks and in running text."""
        lines = [command for block in self.blocks if block.language == "sh" for command in block.commands]
        lines += [match.replace("\n", " ") for match in re.findall(r"(?<!`)`(edgelm [^`]+)`(?!`)", self.text)]
        commands = []
        for line in lines:
            words = shlex.split(line, comments=True)
            while words:
                end = next((i for i, word in enumerate(words) if word in ("&&", "|", "||", ";")), len(words))
                if words[0] == "edgelm":
                    commands.append(words[1:end])
                words = words[end + 1 :]
        return commands


PAGES = [
    Page(path)
    for path in (
        *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((ROOT / "docs").glob("*.md")),
        *(ROOT / folder / "README.md" for folder in ("examples", "models", "benchmarks")),
    )
    if path.is_file()
]

# The Chinese pages have the code of the English ones, as tests assert: it need not run twice.
BLOCKS = [block for each in PAGES if not each.path.name.endswith(".zh-CN.md") for block in each.blocks]


def page(name: str) -> Page:
    """The page of this path, from the root of the repository."""
    return next(each for each in PAGES if str(each) == name)
