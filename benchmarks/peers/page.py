"""Sections of `docs/performance.md` that a run writes, between markers so that the next run replaces them."""

import re

BEGIN, END = "<!-- begin: {} -->", "<!-- end: {} -->"
REGION = "peers"
"""The name of the section that new runs are added to."""


def with_section(page: str, name: str, text: str) -> str:
    """Put a section into a page.

    Args:
        page: text of the page.
        name: name of the section. A section of this name is replaced; a new one goes to the end of the region.
        text: text of the section.

    Raises:
        ValueError: the page has no region for results.
    """
    section = f"{BEGIN.format(name)}\n{text.strip()}\n{END.format(name)}"
    own = _pattern(name)
    if own.search(page):
        return own.sub(lambda _: section, page)
    end = END.format(REGION)
    if end not in page:
        raise ValueError(f"the page has no line {end!r}, which says where {name!r} goes")
    return page.replace(end, f"{section}\n\n{end}")


def sections(page: str) -> dict[str, str]:
    """Texts of the sections of a page, by name."""
    names = re.findall(re.escape(BEGIN).replace(r"\{\}", "(.+)"), page)
    return {name: match[1] for name in names if name != REGION and (match := _pattern(name).search(page))}


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(f"{re.escape(BEGIN.format(name))}\n(.*?)\n{re.escape(END.format(name))}", re.DOTALL)
