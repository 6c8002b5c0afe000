"""The pages: the live one at `/` and the documentation at `/docs`, the files that they are made of under `/page/` and
`/docs/`, and the OpenAPI document that the latter shows.

All are read once, when the application is made, and served from memory. A browser keeps them and asks each time
whether they have changed (`ETag`), so an update of the server is an update of its pages. A page is told here, in
`<meta>`, which mode the server runs in; nothing else in it depends on the server, and nothing on a user. In production
the documentation is served too: the API is public, and what keeps it safe is not that nobody knows it.
"""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
from quart import Response, request
from quart_trio import QuartTrio

from api import errors, openapi
from api.answers import JSON
from api.settings import Settings

FOLDER: Final = Path(__file__).with_name("page")
DOCS: Final = Path(__file__).with_name("docs")
INDEX: Final = "index.html"

CONTENT_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Only what we serve runs; nothing in the page may become script, not even by mistake (trusted types). 'self' in
# connect-src covers the live feed's WebSocket too, which is of the same origin.
POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

HEADERS: Final = (
    ("Cache-Control", "no-cache"),  # keep it, and ask
    ("Content-Security-Policy", POLICY),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
)


class PageFile(msgspec.Struct, frozen=True):
    body: bytes
    content_type: str
    etag: str


def load(folder: Path, settings: Settings) -> dict[str, PageFile]:
    """Every file of a page by its name; the index has its settings filled in."""
    files = {}
    for path in sorted(folder.iterdir()):
        content_type = CONTENT_TYPES.get(path.suffix)
        if content_type is None:
            continue
        body = path.read_bytes()
        if path.name == INDEX:
            body = body.replace(b"{{APP_ENV}}", settings.app_env.encode())
            body = body.replace(b"{{AUTH_MODE}}", settings.auth_mode.encode())
        files[path.name] = _page_file(body, content_type)
    return files


def register(app: QuartTrio, settings: Settings) -> None:
    """Add the pages' routes."""
    for address, under, folder in (("/", "/page", FOLDER), ("/docs", "/docs", DOCS)):
        files = load(folder, settings)
        app.add_url_rule(address, address, _only(files[INDEX]), methods=["GET"])
        app.add_url_rule(f"{under}/<name>", f"{under} file", _file(files), methods=["GET"])
    document = _page_file(openapi.encoded(), JSON)
    app.add_url_rule("/openapi.json", "/openapi.json", _only(document), methods=["GET"])


def _page_file(body: bytes, content_type: str) -> PageFile:
    return PageFile(body, content_type, hashlib.sha256(body).hexdigest()[:32])


def _only(file: PageFile) -> Callable[[], Awaitable[Response]]:
    async def only() -> Response:
        return _response(file)

    return only


def _file(files: dict[str, PageFile]) -> Callable[[str], Awaitable[Response]]:
    async def page_file(name: str) -> Response:
        file = files.get(name)
        if file is None or name == INDEX:  # which has one address
            raise errors.not_found()
        return _response(file)

    return page_file


def _response(file: PageFile) -> Response:
    is_known = request.if_none_match.contains_weak(file.etag)
    response = Response(b"", 304) if is_known else Response(file.body, content_type=file.content_type)
    if is_known:
        del response.headers["Content-Length"], response.headers["Content-Type"]
    response.set_etag(file.etag)
    for name, value in HEADERS:
        response.headers[name] = value
    return response
