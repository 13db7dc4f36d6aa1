"""The playground: the page at ``/`` and its files, which the browser asks for by fixed names.

The page loads nothing from elsewhere, and its policy lets it talk to this server only. ``require-trusted-types-for``
has the browser refuse to read any text as HTML, so a model cannot write into the page.
"""

from importlib import resources
from pathlib import PurePath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_SHARED = ("palette.css", "explanation.css", "elements.js", "shares.js", "explanation.js")
"""Files that the page of ``edgelm explain`` has too."""
_FILES = {
    "/": ("edgelm.serve.playground", "index.html"),
    **{f"/playground/{name}": ("edgelm.pictures", name) for name in _SHARED},
    **{
        f"/playground/{name}": ("edgelm.serve.playground", name)
        for name in (
            "playground.css",
            "icon.svg",
            "theme.js",
            "main.js",
            "dom.js",
            "storage.js",
            "api.js",
            "run.js",
            "fields.js",
            "options.js",
            "result.js",
            "tokens.js",
            "snippets.js",
            "code.js",
            "complete.js",
            "chat.js",
            "explain.js",
        )
    },
}
PATHS = tuple(_FILES)
"""The paths of the page's files. They need no API key, because they are the same on every server."""

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes() -> list[Route]:
    """The routes of the page's files, which are read once."""
    return [_route(path, package, name) for path, (package, name) in _FILES.items()]


def _route(path: str, package: str, name: str) -> Route:
    content = (resources.files(package) / name).read_bytes()
    kind = _TYPES.get(PurePath(name).suffix)
    media_type = "image/svg+xml" if kind is None else f"{kind}; charset=utf-8"

    async def file(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return Route(path, file)
