"""GET /: a page to chat with the model; its files, in `page/`, ask nothing but this server."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from apertus_mlx.system.model_files import read_file

_FOLDER = Path(__file__).parent / "page"
_MOST_BYTES = 2**20
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# By path. Nothing else in the folder is ever read.
FILES = {
    "/": "index.html",
    "/page/page.css": "page.css",
    "/page/page.js": "page.js",
    "/page/stream.js": "stream.js",
    "/page/conversation.js": "conversation.js",
    "/page/messages.js": "messages.js",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # A new version of the package is seen at the next reload.
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """All paths of the page."""
    return [Route(path, _page_file, methods=["GET"]) for path in FILES]


def _page_file(request: Request) -> Response:
    """The file of a path in `FILES`."""
    path = _FOLDER / FILES[request.url.path]
    return Response(read_file(path, _MOST_BYTES), headers=HEADERS, media_type=_TYPES[path.suffix])
