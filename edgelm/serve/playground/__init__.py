"""The playground: the page at ``/`` and its files, which the browser asks for by fixed names.

The page loads nothing from elsewhere, and its policy lets it talk to this server only. ``require-trusted-types-for``
has the browser refuse to read any text as HTML, so a model cannot write into the page.
"""

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_SCRIPT = "text/javascript; charset=utf-8"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/playground/playground.css": ("playground.css", "text/css; charset=utf-8"),
    "/playground/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/playground/{name}": (name, _SCRIPT)
        for name in (
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
    return [_route(path, name, media_type) for path, (name, media_type) in _FILES.items()]


def _route(path: str, name: str, media_type: str) -> Route:
    content = (resources.files("edgelm.serve.playground") / name).read_bytes()

    async def file(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return Route(path, file)
