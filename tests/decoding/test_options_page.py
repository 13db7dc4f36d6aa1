"""The tables of docs/generation.md are made from the options' declarations; EDGELM_UPDATE_HELP=1 writes them anew."""

import os
import re

from edgelm.decoding.generation_config import OPTIONS, default_text
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "generation.md"
TABLE = re.compile(r"<!-- options: (.+) -->\n\n((?:\|.*\n)*)")


def table(group: str) -> str:
    """A Markdown table of the options of a group."""
    lines = ["| option | values | default | meaning |", "|---|---|---|---|"]
    for name, option in OPTIONS.items():
        if option.group == group:
            shown = f"`{name}` {option.rule.metavar}".strip()
            lines.append(f"| {shown} | {option.rule.limit} | {default_text(name)} | {option.meaning} |")
    return "".join(f"{line}\n" for line in lines)


def test_the_tables_are_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    expected = TABLE.sub(lambda match: f"<!-- options: {match[1]} -->\n\n{table(match[1])}", page)
    if os.environ.get("EDGELM_UPDATE_HELP") == "1":
        PAGE.write_text(expected, encoding="utf-8")
        page = expected
    assert page == expected
    assert set(TABLE.findall(page)) == {(group, table(group)) for group in {o.group for o in OPTIONS.values()}}
