"""The sections of `docs/performance.md` that a run writes: between markers, so that the next run replaces them."""

import re

BEGIN, END = "<!-- begin: {} -->", "<!-- end: {} -->"
REGION = "peers"
"""The name of the section that new runs are added to."""


def with_section(page: str, name: str, text: str) -> str:
    """`page` with the section `name` saying `text`: in its place, or at the end of the region where it is new.

    Raises:
        ValueError: the page has no region for results.
    """
    section = f"{BEGIN.format(name)}\n{text.strip()}\n{END.format(name)}"
    own = re.compile(f"{re.escape(BEGIN.format(name))}.*?{re.escape(END.format(name))}", re.DOTALL)
    if own.search(page):
        return own.sub(lambda _: section, page)
    end = END.format(REGION)
    if end not in page:
        raise ValueError(f"the page has no line {end!r}: nowhere to put {name!r}")
    return page.replace(end, f"{section}\n\n{end}")
