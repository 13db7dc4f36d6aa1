"""A hook of MkDocs: the repository's documents as pages of a site, which read the same on GitHub.

Pages outside docs/ are added at their own addresses. A link to another file of the repository leads to a page with that
file's text, at the line where the linked name is defined. Pages with formulas load KaTeX, which lies beside this file.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

import edgelm

ROOT = Path(__file__).parents[2]

ELSEWHERE = {
    "README.md": "index.md",
    "README.zh-CN.md": "readme-zh-cn.md",
    "docs/README.md": "documents.md",
    "docs/learn.ipynb": "learn-notebook.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
    "models/README.md": "models.md",
}
"""Pages by their paths in the repository. The other pages are docs/NAME.md, and are named NAME.md here."""

_FENCED = re.compile(r"^(```.*?^```$)", re.M | re.S)
_MATH = "```math\n"
_FORMULA = re.compile(r"\$`([^`]+)`\$")
_LINK = re.compile(r"(?P<text>\[(?:[^\[\]]|!\[[^\[\]]*\]\([^()]*\))*\])\((?P<target>[^\s()]+)\)")
_SEARCH_HELPER = "https://unpkg.com/iframe-worker/shim"
_KATEX = """
<link rel="stylesheet" href="{site}/katex/katex.min.css">
<script defer src="{site}/katex/katex.min.js"></script>
<script defer src="{site}/formulas.js"></script>
"""
_LANGUAGES = {".py": "python", ".md": "markdown", ".json": "json", ".toml": "toml", ".service": "ini"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give headings the anchors that GitHub gives them."""
    config.mdx_configs["toc"]["slugify"] = github_anchor
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and a page for every other file that a page links to."""
    for elsewhere in ("README.md", "learn.ipynb"):
        files.remove(files.src_uris[elsewhere])
    for path, name in ELSEWHERE.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=notebook_page(text) if path.endswith(".ipynb") else text))
    linked = {path for file in files.documentation_pages() for path in linked_files(file)}
    for path in sorted(path for path in linked if site_path(path).startswith("source/")):
        page = File.generated(config, site_path(path), content=source_page(path), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the links of a page as this site has them, and formulas as what KaTeX is shown."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    parts = []
    for part in _FENCED.split(markdown):
        if part.startswith(_MATH):
            parts.append(f'<div class="formula">{entities(part[len(_MATH) : -3])}</div>')
        elif part.startswith("```"):
            parts.append(part)
        else:
            part = _FORMULA.sub(lambda formula: f'<span class="formula">{entities(formula[1])}</span>', part)
            parts.append(_LINK.sub(partial(site_link, files, page.file), part))
    text = "".join(parts)
    return with_docstrings(text) if page.file.src_uri == "api.md" else text


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Load KaTeX where a page has formulas, and from this site what the search in an opened folder needs."""
    site = get_relative_url("site", page.url)
    if 'class="formula"' in output:
        output = output.replace("</head>", _KATEX.format(site=site) + "</head>")
    return output.replace(_SEARCH_HELPER, f"{site}/iframe-worker.js")


def on_post_template(output: str, *, template_name: str, config: MkDocsConfig) -> str:
    """Leave that helper out of the page for missing pages, which only a server shows."""
    return output.replace(f'<script src="{_SEARCH_HELPER}"></script>', "")


def github_anchor(heading: str, separator: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def entities(formula: str) -> str:
    """A formula of TeX as HTML in which Markdown finds nothing to change."""
    return re.sub(r"[^\w\s]|_", lambda character: f"&#{ord(character[0])};", " ".join(formula.split()))


def with_docstrings(page: str) -> str:
    """docs/api.md with the signatures and docstrings of the names and members that stand in its headings and tables.

    So the page decides what is public: classes have methods without an underscore that only edgelm itself calls.
    """
    sections = re.split(r"^(?=##+ )", page, flags=re.M)
    titles = [public_names(section.partition("\n")[0]) for section in sections]
    missing = set(edgelm.__all__) - {name for names in titles for name in names}
    for index, names in enumerate(titles):
        rows = "\n".join(re.findall(r"^\|.*$", sections[index], re.M))
        members = re.findall(r"`(\w+)", "\n".join(re.findall(r"^\| (`.*?) \|", rows, re.M)))
        if not names:  # a table of classes
            names, members = [name for name in public_names(rows) if name in missing], []
        missing -= set(names)
        if names:
            directives = "".join(directive(name, members) for name in names)
            sections[index] = f'{sections[index].rstrip()}\n\n??? abstract "Signatures and types"\n\n{directives}\n'
    if missing:
        raise PluginError(f"docs/api.md lacks {', '.join(sorted(missing))}: give each a heading or a row of a table")
    return "".join(sections)


def public_names(text: str) -> list[str]:
    """The public names that stand between backticks, in their order."""
    return [name for name in dict.fromkeys(re.findall(r"`(\w+)", text)) if name in edgelm.__all__]


def directive(name: str, members: list[str]) -> str:
    """What mkdocstrings replaces by the docstrings of a public name and of these members; of all if none are listed."""
    options = f"        options:\n          members: {json.dumps(members)}\n" if members else ""
    return f"    ::: edgelm.{name}\n{options}\n"


def repository_path(file: File) -> str:
    """Where the repository has a page of the site."""
    return next((path for path, name in ELSEWHERE.items() if name == file.src_uri), f"docs/{file.src_uri}")


def site_path(path: str) -> str:
    """Where the site has a file of the repository: as a page of its own, or as the text of a source file."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}.md"


def target_path(file: File, target: str) -> str:
    """The path in the repository of a link's target, without an anchor; empty for other hosts and for this page."""
    name = target.partition("#")[0]
    if not name or re.match(r"\w+:", target):
        return ""
    return posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(file)), name))


def linked_files(file: File) -> Iterator[str]:
    """The paths in the repository of the files that a page links to."""
    for link in _LINK.finditer(_FENCED.sub("", file.content_string)):
        path = target_path(file, link["target"])
        if path and not (ROOT / path).is_file():
            raise PluginError(f"{repository_path(file)} links to {path}, which is no file of the repository")
        if path:
            yield path


def site_link(files: Files, file: File, link: re.Match[str]) -> str:
    """A link of a page, to the place where the site has its target."""
    path, text = target_path(file, link["target"]), link["text"]
    if "![" in text:  # a picture that is a link
        text = f"[{_LINK.sub(partial(site_link, files, file), text[1:-1])}]"
    if not path:
        return f"{text}({link['target']})"
    target = site_path(path)
    if anchor := definition_anchor(path, text.strip("[]`")):  # MkDocs does not see the anchors inside of programs
        return f'<a href="{files.src_uris[target].url_relative_to(file)}#{anchor}">{text[1:-1]}</a>'
    new = posixpath.relpath(target, posixpath.dirname(file.src_uri) or ".")
    return f"{text}({new}{link['target'][len(link['target'].partition('#')[0]) :]})"


def definition_anchor(path: str, name: str) -> str:
    """The anchor of the line of a Python file that defines `name`, such as "Graph.run"; empty if none does."""
    if not path.endswith(".py"):
        return ""
    last = re.escape(name.split(".")[-1])
    definition = re.compile(rf"\s*(?:class|(?:async )?def) {last}\b|{last}(?:: .+)? = ")
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return next((f"__line-0-{number}" for number, line in enumerate(lines, 1) if definition.match(line)), "")


def source_page(path: str) -> str:
    """A page with the text of a file of the repository."""
    language = _LANGUAGES.get(posixpath.splitext(path)[1], "text")
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"---\nsearch:\n  exclude: true\nhide: [toc]\n---\n# {path}\n\n`````{language}\n{text.rstrip()}\n`````\n"


def notebook_page(notebook: str) -> str:
    """The cells of a notebook as Markdown."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook)["cells"]]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in cells)
