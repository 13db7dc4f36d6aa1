"""Draws the charts of `docs/performance.md` from the tables of its sections.

    python -m benchmarks.peers.charts

Charts come from the page alone, so they always show the numbers of its tables.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.peers.catalogue import OWN, PEERS
from benchmarks.peers.page import sections
from benchmarks.peers.plot import Bar, bar_chart
from benchmarks.rounds import ROOT

PAGE = ROOT / "docs" / "performance.md"
FOLDER = "performance"
"""The folder of the charts, beside the page."""

MEMORY = {"peak MB": "peak of resident memory", "anonymous MB": "memory that no file backs"}
"""Panel titles by column of the memory table."""

Table = list[list[str]]
"""Cells by line; the first line is the header."""


def chart_names(slug: str) -> dict[str, str]:
    """Paths of the charts of a section, relative to the page, by kind."""
    return {kind: f"{FOLDER}/{slug}-{kind}.svg" for kind in ("decode", "prefill", "memory")}


def charts(section: str) -> dict[str, str]:
    """SVG texts of the charts of a section, by kind.

    Args:
        section: Markdown with a heading, the two tables of speeds and the table of memory.
    """
    title = next(line.removeprefix("### ") for line in section.splitlines() if line.startswith("### "))
    drawn = {}
    for table in _tables(section):
        kind = table[0][0].removesuffix(", tokens/s")
        if kind in ("decode", "prefill"):
            panels = {
                f"prompt of {tokens} tokens": _bars(table, column, _spread)
                for column, tokens in enumerate(table[0])
                if column
            }
            unit = "tokens per second, higher is better"
            drawn[kind] = bar_chart(f"{title}: {kind}", panels, own=OWN, unit=unit)
        elif MEMORY.keys() <= set(table[0]):
            panels = {panel: _bars(table, table[0].index(name), _single) for name, panel in MEMORY.items()}
            drawn["memory"] = bar_chart(f"{title}: memory", panels, own=OWN, unit="MB, lower is better")
    return drawn


def _tables(section: str) -> Iterator[Table]:
    for block in re.findall(r"(?:^\|.*\n?)+", section, re.MULTILINE):
        header, _, *lines = block.strip().splitlines()
        # Lines in italics are ratios.
        yield [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines) if line[2] != "*"]


def _bars(table: Table, column: int, numbers: Callable[[str], Sequence[float]]) -> list[Bar]:
    return [Bar(name, PEERS[name].bits, *numbers(cells[column - 1])) for name, *cells in table[1:]]


def _spread(cell: str) -> Sequence[float]:
    """Median, minimum and maximum of "median (minimum-maximum)"."""
    return [float(number) for number in re.findall(r"[\d.]+", cell)]


def _single(cell: str) -> Sequence[float]:
    return [float(cell)] * 3


def write_charts(page: Path) -> Iterator[Path]:
    """Write the charts of all sections of `page`, and yield their paths."""
    for slug, section in sections(page.read_text(encoding="utf-8")).items():
        drawn = charts(section)
        for kind, name in chart_names(slug).items():
            path = page.parent / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(drawn[kind], encoding="utf-8")
            yield path


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.peers.charts", description="Draw the charts of docs/performance.md from its tables."
    ).parse_args()
    for path in write_charts(PAGE):
        print(path)


if __name__ == "__main__":
    main()
