"""The OpenAPI document and its page: complete, and true of the running server."""

import ast
import json
import re
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import httpx
import jsonschema_rs
import pytest
import schemathesis

from api import openapi, shapes
from api.app import create_app
from api.errors import FAULTS, REFUSALS
from api.handlers import Gate
from api.pages import DOCS
from api.pages import FOLDER as PAGE
from api.settings import load
from api.sockets import Sockets
from tests.contract.shop import Reply, Shop, Visitor, ahead, new_id, unique
from tests.contract.test_lanes import TABLE
from tests.contract.test_page import Elements, get

DOCUMENT: Final[dict[str, Any]] = json.loads(openapi.encoded())
FILES: Final = sorted(path.name for path in DOCS.iterdir() if path.suffix in (".js", ".css"))
SHARED_FILES: Final = ("identity.js", "icon.svg")  # the live page's
# A protocol of its own, which its clients have from a library; the document names it in words.
UNDESCRIBED: Final = {"/socket.io/"}


@pytest.fixture
def base() -> str:
    return "/api/v1"  # the addresses of the document


# Complete ---------------------------------------------------------------------------------------------


def routes() -> set[tuple[str, str]]:
    """Method and path of every route of the application, the alias `/api` taken for what it stands for."""
    settings, gate = load({}, None), Gate()
    app = create_app(settings, gate)
    Sockets(settings, gate).register(app)
    found = set()
    for rule in app.url_map.iter_rules():
        path = re.sub(r"^/api/(?!v1/)", "/api/v1/", rule.rule.replace("<", "{").replace(">", "}"))
        found |= {(method, path) for method in rule.methods or () if method not in ("HEAD", "OPTIONS")}
    return found


def documented() -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, operations in DOCUMENT["paths"].items()
        for method, operation in operations.items()
    }


def test_every_route_is_in_the_document_and_the_reverse() -> None:
    assert {route for route in routes() if route[1] not in UNDESCRIBED} == set(documented())
    assert all(path in DOCUMENT["info"]["description"] for path in UNDESCRIBED)


def test_alias_has_every_route_of_the_base_path() -> None:
    app = create_app(load({}, None), Gate())
    rules = {rule.rule for rule in app.url_map.iter_rules()}

    under_base = {rule for rule in rules if rule.startswith("/api/v1/")}
    assert {rule.replace("/api/v1/", "/api/") for rule in under_base} <= rules


def raised() -> set[tuple[int, str]]:
    """Status and code of every `ApiError(…)` in the source."""
    found = set()
    for path in Path(openapi.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ApiError") and len(node.args) >= 2:
                status, code = node.args[:2]
                if isinstance(status, ast.Constant) and isinstance(code, ast.Constant):
                    assert isinstance(status.value, int)
                    found.add((status.value, str(code.value)))
    return found


def test_every_error_code_is_in_the_document_with_its_status_and_the_reverse() -> None:
    known = {(status, code) for code, (status, _) in shapes.codes().items()}
    refusals = {(status, str(code)) for code, (status, _) in REFUSALS.items()}

    assert raised() | refusals | {(503, str(code)) for code in FAULTS} == known
    words = DOCUMENT["components"]["schemas"]["ErrorCode"]["oneOf"]
    assert {one["const"] for one in words} == {code for _, code in known}
    assert all(one["description"].strip() for one in words)


def test_each_operation_says_what_it_is_and_has_a_name_of_its_own() -> None:
    names = [operation["operationId"] for operation in documented().values()]

    assert len(names) == len(set(names))
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    for operation in documented().values():
        assert operation["summary"]
        assert set(operation["tags"]) <= tags
        for link in links_of(operation):
            assert link["operationId"] in names


def links_of(operation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for answer in operation["responses"].values():
        yield from answer.get("links", {}).values()


def test_unavailable_says_when_to_come_back_and_every_answer_its_request_id() -> None:
    for operation in documented().values():
        for status, answer in operation["responses"].items():
            if status == "101":
                continue
            headers = resolved(answer)["headers"]
            assert "X-Request-Id" in headers, operation["operationId"]
            assert ("Retry-After" in headers) == (status in ("429", "503"))


def test_anything_may_be_answered_that_there_are_too_many_connections() -> None:
    for operation in documented().values():
        told = resolved(operation["responses"]["503"])["content"]["application/json"]
        assert "OVERLOADED" in told["schema"]["properties"]["error"]["properties"]["code"]["enum"], operation
        assert "OVERLOADED" in told["examples"], operation


# Well-formed ------------------------------------------------------------------------------------------


def test_document_is_openapi_3_1() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(DOCUMENT).validate()


def resolved(found: dict[str, Any]) -> dict[str, Any]:
    """What a reference of the document means."""
    if "$ref" not in found:
        return found
    inner: Any = DOCUMENT
    for step in found["$ref"].removeprefix("#/").split("/"):
        inner = inner[step]
    return resolved(inner)


def wrong_with(schema: object, value: object) -> list[str]:
    """What a schema of the document says against a value; formats count."""
    assert isinstance(schema, dict)
    whole = {**schema, "components": DOCUMENT["components"]}
    validator = jsonschema_rs.Draft202012Validator(whole, validate_formats=True)
    return [error.message for error in validator.iter_errors(value)]


def test_every_reference_leads_somewhere() -> None:
    found = re.findall(r'"\$ref":"(#/[^"]+)"', openapi.encoded().decode())

    assert found
    for reference in found:
        assert resolved({"$ref": reference})


def test_every_example_is_an_example_of_its_schema() -> None:
    count = 0
    for operation in documented().values():
        for answer in map(resolved, operation["responses"].values()):
            for content in answer.get("content", {}).values():
                examples = [one["value"] for one in content.get("examples", {}).values()]
                if "example" in content and not isinstance(content["example"], str):
                    examples.append(content["example"])
                for example in examples:
                    assert wrong_with(content["schema"], example) == [], (operation["operationId"], example)
                    count += 1
        for parameter in map(resolved, operation["parameters"]):
            if "example" in parameter:
                assert wrong_with(parameter["schema"], parameter["example"]) == [], parameter
    for name, schema in DOCUMENT["components"]["schemas"].items():
        for example in schema.get("examples", []):
            assert wrong_with(schema, example) == [], name
            count += 1
    assert count > 100


def test_shapes_are_closed() -> None:
    assert wrong_with({"$ref": "#/components/schemas/User"}, {"id": new_id(), "username": "ann"}) == []
    assert wrong_with({"$ref": "#/components/schemas/User"}, {"id": new_id(), "username": "ann", "x": 1})
    assert wrong_with({"$ref": "#/components/schemas/User"}, {"id": "7", "username": "ann"})


# True -------------------------------------------------------------------------------------------------


def held_to_document(method: str, path: str, reply: Reply) -> Reply:
    """The answer, after it has been compared with what the document says of it."""
    found = [operation for (verb, known), operation in documented().items() if verb == method and matches(known, path)]
    (operation,) = found
    answer = resolved(operation["responses"][str(reply.status)])
    assert wrong_with(answer["content"]["application/json"]["schema"], reply.body) == [], reply.body
    for name, header in answer["headers"].items():
        described = resolved(header)
        if name not in reply.headers:
            assert not described.get("required"), name
            continue
        value = int(reply.headers[name]) if described["schema"].get("type") == "integer" else reply.headers[name]
        assert wrong_with(described["schema"], value) == [], name
    return reply


def matches(template: str, path: str) -> bool:
    pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template))
    return re.fullmatch(pattern, "/api/v1" + path.partition("?")[0]) is not None and not (
        "{id}" in template and path.endswith("/me")
    )


class Reader:
    """A visitor who holds every answer to the document."""

    def __init__(self, visitor: Visitor) -> None:
        self._visitor = visitor

    def ask(self, method: str, path: str, json: object = None, **more: Any) -> Reply:
        return held_to_document(method, path, self._visitor.ask(method, path, json, **more))


def test_story_of_a_drop_is_told_as_the_document_says(shop: Shop) -> None:
    ann, ben = Reader(shop.visitor()), Reader(shop.visitor())
    wanted = {"name": unique("Drop"), "price": 100, "total_stock": 1, "status": "live", "ends_at": ahead(3600)}
    drop_id = ann.ask("POST", "/drops", wanted, key="make").data["id"]
    assert ann.ask("POST", "/drops", wanted, key="make").is_replay
    ann.ask("GET", f"/drops/{drop_id}")
    ann.ask("POST", f"/drops/{drop_id}/purchase")
    held = ann.ask("POST", f"/drops/{drop_id}/reserve").data["reservation"]["id"]
    assert ann.ask("POST", f"/drops/{drop_id}/reserve").error == (409, "ALREADY_RESERVED")
    assert ben.ask("POST", f"/drops/{drop_id}/reserve", key="late").error == (409, "OUT_OF_STOCK")
    assert ben.ask("POST", f"/drops/{drop_id}/reserve", key="late").is_replay
    ann.ask("GET", "/reservations/me")
    ann.ask("DELETE", f"/reservations/{held}/cancel")
    assert ann.ask("DELETE", f"/reservations/{held}/cancel").error == (409, "RESERVATION_NOT_ACTIVE")
    ben.ask("POST", f"/drops/{drop_id}/reserve")
    assert ben.ask("POST", f"/drops/{drop_id}/purchase").status == 201
    assert ben.ask("POST", f"/drops/{drop_id}/purchase").error == (409, "ALREADY_PURCHASED")
    assert ben.ask("GET", "/purchases/me?limit=1").data["items"]
    assert ann.ask("GET", f"/drops/{drop_id}").data["activity_feed"]["latest_purchasers"]
    ann.ask("GET", "/drops?limit=100")


def test_everything_else_is_told_as_the_document_says(shop: Shop, strict: Shop, tokens: Shop, known_user: str) -> None:
    ann = Reader(shop.visitor())
    for path in ("/health", "/healthz", "/readyz", "/me"):
        assert ann.ask("GET", path).status == 200
    ann.ask("POST", "/demo/echo", {"email": "ann@shop.example", "name": "Ann"})
    ann.ask("POST", "/demo/echo", {"email": "ann", "more": 1})
    name = unique("reader")
    assert ann.ask("POST", "/internal/users", {"username": name}).status == 201
    assert ann.ask("POST", "/internal/users", {"username": name}).error == (409, "USERNAME_TAKEN")
    ann.ask("POST", "/internal/expire-now")
    assert ann.ask("POST", "/drops", content=b"{").status == 415
    assert ann.ask("GET", "/drops?limit=0").status == 422
    assert ann.ask("GET", "/live").status == 426
    assert ann.ask("GET", "/live/events?drops=7").status == 422
    assert Reader(shop.anybody).ask("GET", "/me").error == (401, "AUTH_REQUIRED")
    known = Reader(strict.visitor(known_user))
    assert known.ask("GET", "/me").status == 200
    assert known.ask("POST", "/internal/expire-now").error == (404, "NOT_FOUND")
    bearer = Reader(Visitor(tokens.http, tokens.root, {"Authorization": "Bearer x"}))
    assert bearer.ask("GET", "/me").error == (401, "INVALID_TOKEN")


def test_events_of_the_stream_are_what_the_document_says(shop: Shop) -> None:
    drop = shop.drop(1)
    ann = shop.visitor()
    told = []
    with shop.http.stream("GET", f"{shop.root}/live/events?drops={drop['id']}") as answer:
        assert answer.status_code == 200
        for event in events_in(answer):
            if event.get("event") == "snapshot":
                ann.holds(drop)
                assert ann.purchase(drop).status == 201
            if "event" in event:
                told.append(event["event"])
                check_event(event)
            if "PURCHASE_COMPLETED" in told:
                break
    assert {"snapshot", "STOCK_UPDATED", "ACTIVITY_UPDATED", "PURCHASE_COMPLETED"} <= set(told)


def events_in(answer: httpx.Response) -> Iterator[dict[str, str]]:
    event: dict[str, str] = {}
    for line in answer.iter_lines():
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            event[name] = value
        elif event:
            yield event
            event = {}


def check_event(event: dict[str, str]) -> None:
    schema = DOCUMENT["components"]["schemas"]["StreamedEvent"]
    assert wrong_with(schema, event) == []
    assert wrong_with(schema["properties"]["data"]["contentSchema"], json.loads(event["data"])) == [], event


def test_every_answer_that_both_lanes_are_held_to_is_in_the_document() -> None:
    compared = 0
    for case in TABLE:
        method, target, _ = case.request.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        status, code = case.expected
        path = re.sub(r"^/api(/v1)?", "", re.sub(r"^https?://[^/?]*", "", target).partition("?")[0])
        found = [told for (verb, known), told in documented().items() if verb == method and matches(known, path)]
        # Else it is no request of the API: another method, another address, or bytes that are none.
        if not found or status in (HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NO_CONTENT) or code == "NOT_FOUND":
            continue
        (operation,) = found
        assert str(status) in operation["responses"], case.name
        answer = resolved(operation["responses"][str(status)])
        if status >= HTTPStatus.BAD_REQUEST:
            assert code in answer["content"]["application/json"]["examples"], case.name
        compared += 1
    assert compared > len(TABLE) / 2


# Served -----------------------------------------------------------------------------------------------


def test_document_is_served_and_the_same_everywhere(shop: Shop, strict: Shop) -> None:
    answer = get(shop, "/openapi.json")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == DOCUMENT
    assert get(strict, "/openapi.json").content == answer.content
    again = get(shop, "/openapi.json", If_None_Match=answer.headers["etag"])
    assert (again.status_code, again.content) == (304, b"")
    head = shop.http.head(shop.server.url + "/openapi.json")
    assert (head.status_code, head.headers["etag"], head.content) == (200, answer.headers["etag"], b"")


def test_page_has_the_policy_of_the_live_page_in_production_too(shop: Shop, strict: Shop) -> None:
    live = get(shop, "/").headers
    for of in (shop, strict):
        answer = get(of, "/docs")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        for name in ("content-security-policy", "x-content-type-options", "referrer-policy", "cache-control"):
            assert answer.headers[name] == live[name]
        assert get(of, "/docs", If_None_Match=answer.headers["etag"]).status_code == 304
        assert of.http.head(of.server.url + "/docs").headers["etag"] == answer.headers["etag"]


def test_page_has_no_code_of_its_own_and_every_file_that_it_names_exists(shop: Shop) -> None:
    page = Elements(get(shop, "/docs").text)

    assert page.code == ""
    named = set()
    for tag, attributes in page.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        if tag in ("link", "script"):
            address = attributes.get("src") or attributes.get("href")
            assert address is not None
            named.add(address)
            assert get(shop, address).status_code == 200
    assert named == {f"/docs/{name}" for name in FILES} | {f"/page/{name}" for name in SHARED_FILES}


def test_modules_import_only_ours_and_make_no_markup_of_text() -> None:
    for name in FILES:
        text = (DOCS / name).read_text()
        for imported in re.findall(r'from "(.*?)"', text):
            folder = PAGE if imported.startswith("../page/") else DOCS
            assert (folder / imported.rpartition("/")[2]).exists(), (name, imported)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
        assert not re.search(r"https?://", text), name


@pytest.mark.parametrize("path", ["/docs/index.html", "/docs/nothing.js", "/docs/%2e%2e%2fopenapi.py"])
def test_nothing_else_is_there(shop: Shop, path: str) -> None:
    answer = get(shop, path)

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "NOT_FOUND"
