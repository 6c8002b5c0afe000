"""The OpenAPI 3.1 document: every route, what it takes, and every answer that it gives.

Made from what the server itself works with wherever that can say it: limits of bodies from their types, codes with
their status from the tables of `api.errors`. The rest is written here, and tests hold it to the running server in both
directions. It depends on no setting, so it is the same for everybody, in development and in production.

Addresses are written out in full. What stands under `/api/v1` is served under `/api` too.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from api import events, http1, live, schemas
from api.answers import JSON
from api.errors import FAULTS
from api.events import ALL
from api.shapes import (
    BEGAN,
    BOUGHT,
    DROP_ID,
    DROPS_PATTERN,
    ENDS,
    HELD,
    NAME_PATTERN,
    PURCHASE_ID,
    REQUEST_ID,
    RESERVATION_ID,
    USER_ID,
    Schema,
    codes,
    components,
    listed,
    record,
    ref,
)
from engine.hub import MARKS_MAX
from engine.model import FaultCode, RefusalCode
from persistence.usernames import NAME_LENGTH_MAX, NAME_LENGTH_MIN

VERSION: Final = "1.0.0"  # of the API, which is what clients see; the package has its own
BASE: Final = "/api/v1"
EVENT_STREAM: Final = "text/event-stream"
HTML: Final = "text/html"

ABOUT: Final = """\
Holdfast is an inventory engine for high-traffic drops: every unit goes to exactly one buyer.

Make a drop, reserve a unit of it (it is yours for 60 seconds), and purchase what you hold. Nothing is told before it \
is committed: what a 2xx says is stored, and what a refusal says was true.

Addresses: everything under `/api/v1` is served under `/api` too. HEAD is answered like GET, without a body; OPTIONS \
with 204, for browsers that ask before they call. Any other method is 405 `METHOD_NOT_ALLOWED` with `Allow`, any other \
address 404 `NOT_FOUND`.

Answers: always JSON, but for pages and feeds. Success is `success`, `data`, `meta`; an error `success`, `error` \
with `code` and `message` (and `details`, where a request is not valid), and `meta`. Where it concerns one drop, \
`meta.seq` counts that drop's changes, and `meta.epoch` how often an engine has taken it over.

Retrying: every 503 says that this attempt did nothing, but for `OUTCOME_UNKNOWN`; an earlier one, of which you heard \
nothing, may have done it. Send an `Idempotency-Key` with what must happen once: a retry with the same key gets the \
first answer again, byte for byte, with `Idempotency-Replayed: true`, and across restarts too.

Identity: in development `X-User-Id` may be any UUID, and is a user from then on. In production a proxy sets it, or \
(with `AUTH_MODE=jwt`) a bearer token takes its place.

Socket.IO 4 is spoken at `/socket.io/`, for the pages of the earlier systems."""

# What any request may come to, whatever it asks for.
ANY: Final = ("BAD_REQUEST", "HEAD_TIMEOUT", "BODY_TIMEOUT", "URI_TOO_LONG", "HEADERS_TOO_LARGE", "PAYLOAD_TOO_LARGE")
ANY_FAULT: Final = ("INTERNAL_ERROR", FaultCode.OVERLOADED)  # the latter for a connection beyond `CONNECTIONS_MAX`
# Of what needs the engine.
UP: Final = (FaultCode.UNAVAILABLE, FaultCode.STOPPING)
IDENTIFIED: Final = ("AUTH_REQUIRED", "INVALID_X_USER_ID", "INVALID_TOKEN", "ORIGIN_NOT_ALLOWED", "VALIDATION_ERROR")
WITH_BODY: Final = ("INVALID_JSON", "UNSUPPORTED_MEDIA_TYPE", "VALIDATION_ERROR")
KEYED: Final = ("VALIDATION_ERROR", "IDEMPOTENCY_KEY_REUSED")
ANY_DROP: Final = ("VALIDATION_ERROR", RefusalCode.DROP_NOT_FOUND)

SECURITY: Final[list[Schema]] = [{"user": []}, {"token": []}]

Links = Mapping[str, Schema]


def document() -> dict[str, Any]:
    """The document, as plain data."""
    paths = {**_drops(), **_reservations(), **_live(), **_health(), **_trying(), **_pages()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Holdfast",
            "version": VERSION,
            "summary": "An inventory engine for high-traffic drops.",
            "description": ABOUT,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/", "description": "The server that this document came from."}],
        "tags": [
            {"name": "drops", "description": "What is sold, how much of it there is, and how it gets its buyers."},
            {"name": "reservations", "description": "What the caller holds, and has bought."},
            {"name": "live", "description": "The stock as it moves."},
            {"name": "health", "description": "For those who look after the server."},
            {"name": "trying", "description": "For trying and testing; the internal ones in development only."},
            {"name": "pages", "description": "For browsers, and for those who write clients."},
        ],
        "paths": paths,
        "components": {
            "schemas": components(),
            "responses": _shared(paths),
            "securitySchemes": {
                "user": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "X-User-Id",
                    "description": "The user's UUID, where the server trusts whoever sets it (`AUTH_MODE=header`).",
                },
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "HS256; `sub` is the user's UUID, `exp` is needed; `name`, where it has "
                    f"{NAME_LENGTH_MIN} to {NAME_LENGTH_MAX} characters, is what a new user is to be called "
                    "(`AUTH_MODE=jwt`).",
                },
            },
            "headers": {
                "RequestId": {
                    "description": "The request's id: the client's own, where it is one.",
                    "required": True,
                    "schema": {"type": "string", "minLength": 1, "maxLength": schemas.REQUEST_ID_MAX},
                },
                "IdempotencyReplayed": {
                    "description": "This is the first answer to this key, again.",
                    "schema": {"const": "true"},
                },
                "RetryAfter": {
                    "description": "Seconds to wait.",
                    "required": True,
                    "schema": {"type": "integer", "minimum": 1},
                },
                "ETag": {
                    "description": "Send it as `If-None-Match` to ask whether it has changed.",
                    "required": True,
                    "schema": {"type": "string"},
                },
            },
            "parameters": {
                "IdempotencyKey": {
                    "name": "Idempotency-Key",
                    "in": "header",
                    "description": "Of the caller's choice, one for each thing that must happen once; kept for at "
                    "least 24 h. Printable ASCII.",
                    "schema": {
                        "type": "string",
                        "minLength": 1,
                        "maxLength": schemas.KEY_MAX,
                        "pattern": "^[!-~]([ -~]*[!-~])?$",
                    },
                    "example": "order-7001",
                },
                "RequestId": {
                    "name": "X-Request-Id",
                    "in": "header",
                    "description": f"Comes back in the answer, where it is at most {schemas.REQUEST_ID_MAX} printable "
                    "ASCII characters; else a new one is made.",
                    "schema": {"type": "string"},
                    "example": REQUEST_ID,
                },
                "UserName": {
                    "name": "X-User-Name",
                    "in": "header",
                    "description": "What a user who comes for the first time is to be called (3 to 50 characters, "
                    "with `AUTH_MODE=header`). Where somebody has that name, a few random letters are added.",
                    "schema": {
                        "type": "string",
                        "minLength": NAME_LENGTH_MIN,
                        "maxLength": NAME_LENGTH_MAX,
                        "pattern": NAME_PATTERN,
                    },
                    "example": "ann",
                },
            },
        },
    }


def encoded() -> bytes:
    """The document as it is served."""
    return msgspec.json.encode(document())


def _shared(paths: Schema) -> Schema:
    """The errors of all paths, each combination once; in their places references are left."""
    names: dict[str, str] = {}
    shared: Schema = {}
    for operations in paths.values():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                if int(status) < 400:
                    continue
                key = status + answer["description"] + ",".join(answer["headers"])
                if key not in names:
                    number = sum(name.startswith(f"Error{status}") for name in shared) + 1
                    names[key] = f"Error{status}" if number == 1 else f"Error{status}_{number}"
                    shared[names[key]] = answer
                operation["responses"][status] = {"$ref": f"#/components/responses/{names[key]}"}
    return dict(sorted(shared.items()))


# Operations -------------------------------------------------------------------------------------------


def _drops() -> Schema:
    shown = ref("ShownDrop")
    by_id = _path_id("The drop's id.")
    same_drop = {"id": "$response.body#/data/id"}
    that_drop = {"id": "$response.body#/data/drop/id"}
    return {
        f"{BASE}/drops": {
            "get": _operation(
                "listDrops",
                "drops",
                "Drops that are scheduled or live",
                "Those that have not ended, newest first, each with its latest buyers.",
                {200: _success(_page_of(shown), _listed_example(_SHOWN_DROP))},
                [*UP, "VALIDATION_ERROR"],
                parameters=_page(),
            ),
            "post": _operation(
                "createDrop",
                "drops",
                "Make a drop",
                "All of its units are free in the beginning. The caller is its owner.",
                {201: _success(ref("Drop"), _DROP, is_keyed=True)},
                [*IDENTIFIED, *WITH_BODY, *KEYED, *FAULTS],
                body="NewDrop",
                is_for_user=True,
                is_keyed=True,
                links={
                    "show": _link("showDrop", same_drop),
                    "reserve": _link("reserve", same_drop),
                    "purchase": _link("purchase", same_drop),
                },
            ),
        },
        f"{BASE}/drops/{{id}}": {
            "get": _operation(
                "showDrop",
                "drops",
                "One drop",
                "In any status, with its latest buyers.",
                {200: _success(shown, _SHOWN_DROP)},
                [*ANY_DROP, *FAULTS],
                parameters=[by_id],
                links={"reserve": _link("reserve", same_drop)},
            )
        },
        f"{BASE}/drops/{{id}}/reserve": {
            "post": _operation(
                "reserve",
                "drops",
                "Take a unit",
                "Holds it for 60 s (`RESERVATION_TTL_SECONDS`). Checked in this order: whether there is such a drop, "
                "whether it is live, whether you hold it already, whether a unit is free. After a purchase, an expiry "
                "or a cancellation you may reserve again.",
                {
                    201: _success(
                        record(
                            {
                                "reservation": ref("Reservation"),
                                "drop": record({"id": ref("Id"), "available_stock": ref("Count")}),
                            }
                        ),
                        {"reservation": _RESERVATION, "drop": {"id": DROP_ID, "available_stock": 99}},
                        is_keyed=True,
                        is_of_drop=True,
                    )
                },
                [
                    *(*IDENTIFIED, *WITH_BODY, *KEYED, *ANY_DROP, *FAULTS),
                    *(RefusalCode.DROP_NOT_ACTIVE, RefusalCode.ALREADY_RESERVED, RefusalCode.OUT_OF_STOCK),
                ],
                parameters=[by_id],
                body="Nothing",
                is_for_user=True,
                is_keyed=True,
                links={
                    "purchase": _link("purchase", that_drop),
                    "cancel": _link("cancelReservation", {"id": "$response.body#/data/reservation/id"}),
                    "again": _link("reserve", that_drop),
                    "list": _link("listReservations", {}),
                },
            )
        },
        f"{BASE}/drops/{{id}}/purchase": {
            "post": _operation(
                "purchase",
                "drops",
                "Buy what you hold",
                "Consumes your active reservation; the stock does not change again. A refusal says what became of your "
                "newest reservation on this drop.",
                {
                    201: _success(
                        record(
                            {
                                "purchase": ref("Purchase"),
                                "reservation": record(
                                    {"id": ref("Id"), "status": {"const": "consumed"}, "expires_at": ref("Instant")}
                                ),
                            }
                        ),
                        {
                            "purchase": {**_PURCHASE, "user_id": USER_ID},
                            "reservation": {"id": RESERVATION_ID, "status": "consumed", "expires_at": ENDS},
                        },
                        is_keyed=True,
                        is_of_drop=True,
                    )
                },
                [
                    *(*IDENTIFIED, *WITH_BODY, *KEYED, *ANY_DROP, *FAULTS),
                    RefusalCode.RESERVATION_REQUIRED,
                    RefusalCode.RESERVATION_EXPIRED,
                    RefusalCode.RESERVATION_NOT_ACTIVE,
                    RefusalCode.ALREADY_PURCHASED,
                ],
                parameters=[by_id],
                body="Nothing",
                is_for_user=True,
                is_keyed=True,
                links={
                    "list": _link("listPurchases", {}),
                    "again": _link("purchase", {"id": "$response.body#/data/purchase/drop_id"}),
                    "reserve": _link("reserve", {"id": "$response.body#/data/purchase/drop_id"}),
                    "cancel": _link("cancelReservation", {"id": "$response.body#/data/reservation/id"}),
                },
            )
        },
    }


def _reservations() -> Schema:
    return {
        f"{BASE}/reservations/me": {
            "get": _operation(
                "listReservations",
                "reservations",
                "What you hold",
                "Your active reservations that have not expired.",
                {200: _success(record({"items": listed(ref("HeldReservation"))}), {"items": [_HELD]})},
                [*IDENTIFIED, *UP],
                is_for_user=True,
            )
        },
        f"{BASE}/reservations/{{id}}/cancel": {
            "delete": _operation(
                "cancelReservation",
                "reservations",
                "Give back what you hold",
                "The units are free for others at once. Another user's reservation is none to you.",
                {200: _success(ref("CancelledReservation"), _CANCELLED, is_of_drop=True)},
                [
                    *(*IDENTIFIED, *WITH_BODY, *FAULTS),
                    *(RefusalCode.RESERVATION_NOT_FOUND, RefusalCode.DROP_NOT_FOUND),
                    *(RefusalCode.RESERVATION_NOT_ACTIVE, RefusalCode.RESERVATION_EXPIRED),
                ],
                parameters=[_path_id("The reservation's id.")],
                body="Nothing",
                is_for_user=True,
                links={
                    "reserve": _link("reserve", {"id": "$response.body#/data/dropId"}),
                    "purchase": _link("purchase", {"id": "$response.body#/data/dropId"}),
                },
            )
        },
        f"{BASE}/purchases/me": {
            "get": _operation(
                "listPurchases",
                "reservations",
                "What you have bought",
                "Newest first.",
                {
                    200: _success(
                        _page_of(ref("PurchaseLine")),
                        _listed_example({**_PURCHASE, "drop": {"id": DROP_ID, "name": "Air One"}}),
                    )
                },
                [*IDENTIFIED, *UP],
                parameters=_page(),
                is_for_user=True,
            )
        },
    }


def _live() -> Schema:
    socket, stream = live.PATHS[0], events.PATHS[0]
    upgraded = {"description": "A WebSocket from here on: JSON text frames, `LiveRequest` from the client, "
    "`LiveSnapshot`, `LiveEvent` and `LiveError` from the server."}  # fmt: skip
    streamed = {
        "description": "`retry`, then `snapshot` for each drop and the events of the live feed by their names, the "
        "messages of the WebSocket as `data`. `id` says how far this stream has heard, for `Last-Event-ID`. A stream "
        "that cannot resume says `reset`: forget what you know. The schema is of each event.",
        "headers": _headers(),
        "content": {
            EVENT_STREAM: {
                "schema": ref("StreamedEvent"),
                "example": f'retry: 1731\n\nevent: STOCK_UPDATED\ndata: {{"type":"event","event":"STOCK_UPDATED",'
                f'"seq":2,"at":"{HELD}","data":{{"dropId":"{DROP_ID}","availableStock":99}}}}\nid: 5d41402abc4b.2\n\n',
            }
        },
    }
    return {
        socket: {
            "get": _operation(
                "live",
                "live",
                "The live feed over a WebSocket",
                "Send `subscribe` with the drops to watch, or `*`, and `resume` with how far you had got: the newest "
                "`seq`, or one less if you may have missed the last of its frames. "
                "Send `identify` before a `subscribe` that resumes: else you do not hear of holds that ended. "
                f"With `*` the newest {MARKS_MAX:,} of the listed drops are shown and all are told of; name an older "
                f"one to be shown it. A message has at most {live.MESSAGE_MAX:,} bytes, room for some 1,300 positions: "
                "name the others in further messages. "
                f"`{BASE}/live/events` is the same for those who have no WebSocket.",
                {101: upgraded},
                [*UP, "UPGRADE_REQUIRED", "ORIGIN_NOT_ALLOWED"],
            )
        },
        stream: {
            "get": _operation(
                "liveEvents",
                "live",
                "The live feed as server-sent events",
                f"The answer has no end. Of all drops the newest {MARKS_MAX:,} that are listed are shown. Who says who "
                "they are hears of the end of their own holds too. In place of "
                f"503, after which a browser would not come again, a request that accepts `{EVENT_STREAM}` gets 200, "
                "`retry`, and the end.",
                {200: streamed},
                [*IDENTIFIED, *ANY_DROP, *FAULTS],
                parameters=[
                    {
                        "name": "drops",
                        "in": "query",
                        "required": True,
                        "description": f"Ids of at most {live.DROPS_MAX} drops, with commas between them; or `{ALL}`. "
                        f"An address in HTTP/1 has at most {http1.TARGET_MAX:,} bytes, room for 54.",
                        "schema": {"type": "string", "pattern": DROPS_PATTERN},
                        "example": ALL,
                    },
                    {
                        "name": "Last-Event-ID",
                        "in": "header",
                        "description": "The last `id` that came, to hear what came after it. Browsers send it.",
                        "schema": {"type": "string"},
                    },
                ],
                is_for_user=True,
                is_for_anybody=True,
            )
        },
    }


def _health() -> Schema:
    up = record(
        {
            "service": {"const": "api"},
            "uptime": {"type": "number", "minimum": 0, "description": "Seconds since the engine is up."},
            "db": {"const": "up"},
        }
    )
    return {
        f"{BASE}/health": {
            "get": _operation(
                "health",
                "health",
                "Whether it works",
                "With a round trip to the database.",
                {200: _success(up, {"service": "api", "uptime": 12.5, "db": "up"})},
                UP,
            )
        },
        **{
            f"{base}/healthz": {
                "get": _operation(
                    f"healthz{suffix}",
                    "health",
                    f"Whether the process lives{suffix and ' (under the base path)'}",
                    "Without a look at anything else.",
                    {200: _success(record({"status": {"const": "up"}}), {"status": "up"})},
                )
            }
            for base, suffix in (("", ""), (BASE, "UnderBase"))
        },
        **{
            f"{base}/readyz": {
                "get": _operation(
                    f"readyz{suffix}",
                    "health",
                    f"Whether it is ready{suffix and ' (under the base path)'}",
                    "From when its state is recovered, for as long as the database answers.",
                    {200: _success(record({"status": {"const": "ready"}}), {"status": "ready"})},
                    UP,
                )
            }
            for base, suffix in (("", ""), (BASE, "UnderBase"))
        },
    }


def _trying() -> Schema:
    user = {"id": USER_ID, "username": "ann"}
    expired = record({"expiredCount": ref("Count"), "updatedDropIds": listed(ref("Id"))})
    return {
        f"{BASE}/me": {
            "get": _operation(
                "me",
                "trying",
                "Who you are",
                "",
                {200: _success(record({"user": ref("User")}), {"user": user})},
                [*IDENTIFIED, *UP],
                is_for_user=True,
            )
        },
        f"{BASE}/demo/echo": {
            "post": _operation(
                "echo",
                "trying",
                "Hear what you said",
                "After it has been validated.",
                {
                    200: _success(
                        record({"received": ref("Echo")}), {"received": {"email": "ann@shop.example", "name": "Ann"}}
                    )
                },
                [*WITH_BODY, *UP],
                body="Echo",
            )
        },
        f"{BASE}/internal/users": {
            "post": _operation(
                "createUser",
                "trying",
                "Make a user",
                "In development only; elsewhere there is nothing at this address.",
                {201: _success(ref("User"), user)},
                [*WITH_BODY, *UP, FaultCode.UNKNOWN, "USERNAME_TAKEN", "NOT_FOUND"],
                body="NewUser",
            )
        },
        f"{BASE}/internal/expire-now": {
            "post": _operation(
                "expireNow",
                "trying",
                "Expire what is due",
                "All that has reached its deadline this instant, which happens by itself too. In development only; "
                "elsewhere there is nothing at this address.",
                {200: _success(expired, {"expiredCount": 1, "updatedDropIds": [DROP_ID]})},
                [*UP, "NOT_FOUND"],
            )
        },
    }


def _pages() -> Schema:
    name = {
        "name": "name",
        "in": "path",
        "required": True,
        "description": "The file's name.",
        "schema": {"type": "string", "minLength": 1},
        "example": "main.js",
    }
    files = {kind: {"schema": {"type": "string"}} for kind in ("text/css", "text/javascript", "image/svg+xml")}
    page = {HTML: {"schema": {"type": "string"}}}
    ours = {JSON: {"schema": {"type": "object", "required": ["openapi", "info", "paths", "components"]}}}
    return {
        "/": {"get": _file("livePage", "The live page", page)},
        "/page/{name}": {"get": _file("livePageFile", "A file of the live page", files, name)},
        "/docs": {"get": _file("docs", "This documentation, to read and to try", page)},
        "/docs/{name}": {"get": _file("docsFile", "A file of the documentation", files, name)},
        "/openapi.json": {"get": _file("openapi", "This document", ours)},
    }


# Parts ------------------------------------------------------------------------------------------------


def _operation(
    operation_id: str,
    tag: str,
    summary: str,
    description: str,
    answers: Mapping[int, Schema],
    problems: "list[str] | tuple[str, ...]" = (),
    *,
    parameters: "list[Schema] | tuple[Schema, ...]" = (),
    body: str | None = None,
    is_for_user: bool = False,
    is_for_anybody: bool = False,
    is_keyed: bool = False,
    links: Links | None = None,
) -> Schema:
    """`problems` are the codes of its errors, beside those of any request. `is_for_anybody`: saying who is optional."""
    told: Schema = {"operationId": operation_id, "tags": [tag], "summary": summary}
    if description:
        told["description"] = description
    told["security"] = [*([{}] if is_for_anybody else []), *SECURITY] if is_for_user else []
    told["parameters"] = [
        *parameters,
        *([_parameter("UserName")] if is_for_user else []),
        *([_parameter("IdempotencyKey")] if is_keyed else []),
        _parameter("RequestId"),
    ]
    if body is not None:
        content = {JSON: {"schema": ref(body)}}
        told["requestBody"] = {"required": body != "Nothing", "content": content}
    responses = {
        str(status): {**answer, **({"links": dict(links)} if links else {})} for status, answer in answers.items()
    }
    told["responses"] = responses | _problems([*ANY, *problems, *ANY_FAULT], is_keyed=is_keyed)
    return told


def _file(operation_id: str, summary: str, content: Schema, name: Schema | None = None) -> Schema:
    found = {"description": "The file.", "headers": _headers("ETag"), "content": content}
    told = _operation(
        operation_id,
        "pages",
        summary,
        "",
        {200: found, 304: {"description": "It has not changed.", "headers": _headers("ETag")}},
        [] if name is None else ["NOT_FOUND"],
        parameters=[] if name is None else [name],
    )
    told["parameters"].append(
        {"name": "If-None-Match", "in": "header", "description": "The `ETag` known.", "schema": {"type": "string"}}
    )
    return told


def _problems(of: list[str], *, is_keyed: bool) -> dict[str, Schema]:
    """The answers with these codes, by their status."""
    known = codes()
    by_status: dict[int, list[str]] = {}
    for code in dict.fromkeys(map(str, of)):
        by_status.setdefault(known[code][0], []).append(code)
    return {str(status): _problem(status, by_status[status], is_keyed=is_keyed) for status in sorted(by_status)}


def _problem(status: int, of: list[str], *, is_keyed: bool) -> Schema:
    known = codes()
    names: tuple[str, ...] = ("RetryAfter",) if status == 503 else ()
    if is_keyed and status == 409:
        names = (*names, "IdempotencyReplayed")
    examples = {}
    for code in of:
        error: Schema = {"code": code, "message": known[code][1]}
        if code == "VALIDATION_ERROR":
            error["details"] = [{"path": "id", "message": "must be a UUID"}]
        examples[code] = {"value": {"success": False, "error": error, "meta": {"requestId": REQUEST_ID}}}
    narrowed = {**ref("Error"), "properties": {"error": {"properties": {"code": {"enum": of}}}}}
    return {
        "description": " ".join(f"`{code}`: {known[code][1]}" for code in of),
        "headers": _headers(*names),
        "content": {JSON: {"schema": narrowed, "examples": examples}},
    }


def _success(data: Schema, example: Any, *, is_keyed: bool = False, is_of_drop: bool = False) -> Schema:
    meta: Schema = {"requestId": REQUEST_ID}
    if is_of_drop:
        meta |= {"seq": 2, "epoch": 1}
    return {
        "description": "Done." if is_keyed else "As asked.",
        "headers": _headers(*(["IdempotencyReplayed"] if is_keyed else [])),
        "content": {
            JSON: {
                "schema": record({"success": {"const": True}, "data": data, "meta": ref("Meta")}),
                "example": {"success": True, "data": example, "meta": meta},
            }
        },
    }


_HEADER_NAMES: Final = {
    "RequestId": "X-Request-Id",
    "IdempotencyReplayed": "Idempotency-Replayed",
    "RetryAfter": "Retry-After",
    "ETag": "ETag",
}


def _headers(*names: str) -> Schema:
    return {_HEADER_NAMES[name]: {"$ref": f"#/components/headers/{name}"} for name in ("RequestId", *names)}


def _parameter(name: str) -> Schema:
    return {"$ref": f"#/components/parameters/{name}"}


def _link(operation_id: str, parameters: Mapping[str, str]) -> Schema:
    return {"operationId": operation_id, "parameters": dict(parameters)}


def _path_id(description: str) -> Schema:
    return {
        "name": "id",
        "in": "path",
        "required": True,
        "description": description,
        "schema": ref("AnyId"),
    }


def _page() -> list[Schema]:
    return [
        {
            "name": "limit",
            "in": "query",
            "description": "How many at most.",
            "schema": {"type": "integer", "minimum": 1, "maximum": schemas.PAGE_MAX, "default": schemas.PAGE_DEFAULT},
        },
        {
            "name": "offset",
            "in": "query",
            "description": "How many to pass over.",
            "schema": {"type": "integer", "minimum": 0, "maximum": schemas.OFFSET_MAX, "default": 0},
        },
    ]


def _page_of(item: Schema) -> Schema:
    return record({"items": {**listed(item), "maxItems": schemas.PAGE_MAX}, "pagination": ref("Pagination")})


def _listed_example(item: Schema) -> Schema:
    return {"items": [item], "pagination": {"limit": schemas.PAGE_DEFAULT, "offset": 0, "total": 1}}


# Examples ---------------------------------------------------------------------------------------------

_DROP: Final[Schema] = {
    "id": DROP_ID,
    "name": "Air One",
    "price": 19_900,
    "currency": "USD",
    "total_stock": 100,
    "available_stock": 100,
    "starts_at": None,
    "ends_at": None,
    "status": "live",
    "created_by": USER_ID,
    "created_at": BEGAN,
}
_SHOWN_DROP: Final[Schema] = {
    **_DROP,
    "available_stock": 99,
    "activity_feed": {
        "latest_purchasers": [{"user_id": USER_ID, "username": "ann", "qty": 1, "created_at": BOUGHT}],
    },
}
_RESERVATION: Final[Schema] = {
    "id": RESERVATION_ID,
    "drop_id": DROP_ID,
    "user_id": USER_ID,
    "status": "active",
    "expires_at": ENDS,
    "created_at": HELD,
}
_HELD: Final[Schema] = {
    **{name: value for name, value in _RESERVATION.items() if name != "user_id"},
    "drop": {"id": DROP_ID, "name": "Air One", "available_stock": 99},
}
_PURCHASE: Final[Schema] = {
    "id": PURCHASE_ID,
    "drop_id": DROP_ID,
    "reservation_id": RESERVATION_ID,
    "qty": 1,
    "status": "paid",
    "created_at": BOUGHT,
}
_CANCELLED: Final[Schema] = {
    "reservationId": RESERVATION_ID,
    "dropId": DROP_ID,
    "availableStock": 100,
    "status": "cancelled",
}
