"""The live page over the wire: its headers, its files, and that nothing in it needs more than they allow."""

import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from api.errors import FAULTS, REFUSALS
from api.pages import FOLDER
from tests.contract.shop import Shop

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}

FILES = sorted(path.name for path in FOLDER.iterdir() if path.name != "index.html")


@pytest.fixture
def base() -> str:
    return "/api/v1"  # the page has one address, whatever the base path of the API


def get(shop: Shop, path: str, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return shop.http.get(shop.server.url + path, headers=named)


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text in those that hold code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.code = ""
        self._is_code = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._is_code = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._is_code = False

    def handle_data(self, data: str) -> None:
        if self._is_code:
            self.code += data.strip()


def test_page_is_served_at_the_root_under_a_strict_policy(shop: Shop) -> None:
    answer = get(shop, "/")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    directives = (part.strip().partition(" ") for part in answer.headers["content-security-policy"].split(";"))
    assert {name: value for name, _, value in directives} == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert answer.headers["cache-control"] == "no-cache"
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("name", FILES)
def test_each_file_has_its_type_and_the_headers_of_the_page(shop: Shop, name: str) -> None:
    answer = get(shop, f"/page/{name}")

    assert answer.status_code == 200
    kind = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
    assert answer.headers["content-type"] == kind[Path(name).suffix]
    assert answer.content == (FOLDER / name).read_bytes()
    page = get(shop, "/").headers
    for header in ("content-security-policy", "x-content-type-options", "referrer-policy", "cache-control"):
        assert answer.headers[header] == page[header]


@pytest.mark.parametrize("path", ["/", "/page/main.js"])
def test_what_the_browser_has_is_not_sent_again(shop: Shop, path: str) -> None:
    first = get(shop, path)
    etag = first.headers["etag"]

    for held in (etag, f"W/{etag}", f'"another", {etag}'):
        again = get(shop, path, If_None_Match=held)
        assert again.status_code == 304
        assert again.content == b""
        assert again.headers["etag"] == etag
        assert again.headers["cache-control"] == "no-cache"
        assert "content-security-policy" in again.headers
    assert get(shop, path, If_None_Match='"another"').content == first.content


@pytest.mark.parametrize("path", ["/", "/page/style.css"])
def test_head_says_what_get_would(shop: Shop, path: str) -> None:
    full = get(shop, path)
    head = shop.http.head(shop.server.url + path)

    assert head.status_code == 200
    assert head.content == b""
    for name in ("content-type", "content-length", "etag", "content-security-policy"):
        assert head.headers[name] == full.headers[name]


@pytest.mark.parametrize(
    "path",
    ["/page", "/page/", "/page/index.html", "/page/nothing.js", "/page/../pages.py", "/page/%2e%2e%2fpages.py", "//"],
)
def test_nothing_else_is_there(shop: Shop, path: str) -> None:
    answer = get(shop, path)

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "NOT_FOUND"
    assert answer.headers["cache-control"] == "no-store"


def test_page_takes_no_other_method(shop: Shop) -> None:
    answer = shop.http.post(shop.server.url + "/")

    assert answer.status_code == 405
    assert "GET" in answer.headers["allow"]


def test_answers_of_the_api_are_still_not_kept(shop: Shop) -> None:
    assert shop.anybody.get("/drops").headers["cache-control"] == "no-store"


def test_page_has_no_code_of_its_own_and_every_file_that_it_names_exists(shop: Shop) -> None:
    page = Elements(get(shop, "/").text)

    assert page.code == ""
    for tag, attributes in page.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        if tag != "a":
            for address in (attributes.get("src"), attributes.get("href")):
                assert address is None or address.removeprefix("page/") in FILES, (tag, address)
    named = {str(attributes["href"]).removeprefix("page/") for tag, attributes in page.found if tag == "link"}
    named |= {str(attributes["src"]).removeprefix("page/") for tag, attributes in page.found if tag == "script"}
    assert named == set(FILES)


def test_modules_import_only_each_other_and_make_no_markup_of_text() -> None:
    for name in FILES:
        if not name.endswith(".js"):
            continue
        text = (FOLDER / name).read_text()
        for imported in re.findall(r'from "(.*?)"', text):
            assert imported.removeprefix("./") in FILES, (name, imported)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        assert not re.search(r"https?://", text), name


def test_page_has_words_for_every_refusal_and_fault() -> None:
    words = (FOLDER / "words.js").read_text()

    for code in (*REFUSALS, *FAULTS, "LIMIT_REACHED", "RESERVATION_CONFLICT", "AUTH_REQUIRED", "VALIDATION_ERROR"):
        assert f"  {code}: " in words, code


def test_page_is_told_which_mode_the_server_runs_in(shop: Shop, strict: Shop, tokens: Shop) -> None:
    modes = []
    for of in (shop, strict, tokens):
        metas = [attributes for tag, attributes in Elements(get(of, "/").text).found if tag == "meta"]
        content = {attributes.get("name"): attributes.get("content") for attributes in metas}
        modes.append((content["holdfast-env"], content["holdfast-auth"]))

    assert modes == [("development", "header"), ("production", "header"), ("production", "jwt")]
    assert len({get(of, "/").headers["etag"] for of in (shop, strict, tokens)}) == 3
