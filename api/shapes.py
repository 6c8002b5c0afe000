"""The JSON shapes of everything that goes in and out, as JSON Schema: the components of the OpenAPI document.

What comes in is taken from the types that decode it (`api.schemas`), so its limits cannot drift; words, examples and
what a type cannot say are added here. What goes out mirrors `api.answers` and `api.feed`; a test holds real answers
to it. Shapes are closed: a field that is not here is not sent, and not taken.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from api import errors, live, schemas
from api.errors import FAULTS, REFUSALS
from engine.model import DropStatus
from persistence.usernames import NAME_LENGTH_MAX, NAME_LENGTH_MIN

Schema = dict[str, Any]

# Ids and instants of the examples; the reservation's hold lasts the usual 60 s.
DROP_ID: Final = "019b9800-d100-7c53-8f3a-5d0a3c1e7b10"
USER_ID: Final = "0190a5a0-0000-7000-8000-000000000001"
RESERVATION_ID: Final = "019b9801-1b10-7a77-9a3e-1f5f0d9c2a44"
PURCHASE_ID: Final = "019b9801-7a60-7ee1-b0c4-6d2b9f3e8c55"
REQUEST_ID: Final = "019b9801-1b0f-74d2-a7c9-02b8e4f6d103"
BEGAN: Final = "2026-01-07T10:00:00.000Z"
HELD: Final = "2026-01-07T10:00:19.000Z"
ENDS: Final = "2026-01-07T10:01:19.000Z"
BOUGHT: Final = "2026-01-07T10:00:43.250Z"

_NO_CONTROL: Final = r"[^\u0000-\u001f\u007f]"
# What is white space to Python, written out: \s is something else to each reader of JSON Schema.
_SPACE: Final = r"\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_VISIBLE: Final = rf"[^{_SPACE}\u0000-\u001f\u007f]"
TEXT_PATTERN: Final = f"^{_NO_CONTROL}*{_VISIBLE}{_NO_CONTROL}*$"
NAME_PATTERN: Final = f"^{_VISIBLE}{_NO_CONTROL}*{_VISIBLE}$"  # of a header, which loses the blanks around it
_UUID: Final = "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
# Blanks around the words, and empty words, are passed over.
DROPS_PATTERN: Final = rf"^\*$|^[ ,]*{_UUID}( *,[ ,]*{_UUID})*[ ,]*$"

# Faults and refusals that no table of `api.errors` has: status, and what they say.
OTHER_CODES: Final[Mapping[str, tuple[int, str]]] = {
    "BAD_REQUEST": (400, "The request cannot be understood as HTTP."),
    "HEAD_TIMEOUT": (400, "The head of the request did not arrive in time."),
    "BODY_TIMEOUT": (400, "The body of the request did not arrive in time."),
    "INVALID_JSON": (400, "The body is no JSON object, or one that two parsers could read differently."),
    "AUTH_REQUIRED": (401, "Say who you are."),
    "INVALID_X_USER_ID": (401, "X-User-Id must be a UUID."),
    "INVALID_TOKEN": (401, "The bearer token is not valid."),
    "NOT_ALLOWED": (403, "The proxy of this server says who you are (live feed only)."),
    "ORIGIN_NOT_ALLOWED": (403, "Pages of this origin may not open a live feed, nor act for their visitors."),
    "NOT_FOUND": (404, "There is nothing at this address."),
    "UNKNOWN_EVENT": (404, "There is no such event (Socket.IO only)."),
    "METHOD_NOT_ALLOWED": (405, "The method is not for this address; `Allow` names those that are."),
    "USERNAME_TAKEN": (409, "Somebody has that name already."),
    "PAYLOAD_TOO_LARGE": (413, "The body is larger than allowed."),
    "URI_TOO_LONG": (414, "The address is too long."),
    "UNSUPPORTED_MEDIA_TYPE": (415, "Send the body as application/json."),
    "VALIDATION_ERROR": (422, "The request is well-formed, but not valid; `details` names all that is wrong."),
    "IDEMPOTENCY_KEY_REUSED": (422, "This Idempotency-Key was used with another request."),
    "TOO_MANY_DROPS": (422, f"No more than {live.DROPS_MAX} drops by name (live feeds only)."),
    "UPGRADE_REQUIRED": (426, "This address speaks WebSocket."),
    "HEADERS_TOO_LARGE": (431, "The head of the request is too large."),
    "INTERNAL_ERROR": (500, "Something went wrong here."),
}


def codes() -> dict[str, tuple[int, str]]:
    """Every error code there is, with its status and its meaning."""
    refusals = {str(code): (status_code, message) for code, (status_code, message) in REFUSALS.items()}
    faults = {str(code): (errors.fault(code).status_code, message) for code, message in FAULTS.items()}
    return {**OTHER_CODES, **refusals, **faults}


def components() -> dict[str, Schema]:
    """Every schema of the document by its name."""
    return {**_values(), **_incoming(), **_outgoing(), **_live()}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def record(properties: Mapping[str, Schema], description: str = "", *, optional: tuple[str, ...] = ()) -> Schema:
    """A closed object of these properties; all but the `optional` ones are always there."""
    shape: Schema = {"type": "object"}
    if description:
        shape["description"] = description
    shape["properties"] = dict(properties)
    shape["required"] = [name for name in properties if name not in optional]
    shape["additionalProperties"] = False
    return shape


def listed(item: Schema) -> Schema:
    return {"type": "array", "items": item}


# Values -----------------------------------------------------------------------------------------------


def _values() -> dict[str, Schema]:
    return {
        "Id": {
            "type": "string",
            "format": "uuid",
            "pattern": f"^{schemas.UUID.pattern}$",
            "description": "A UUID in lower case. Those made here are of version 7, so that they sort by their age.",
            "examples": [DROP_ID],
        },
        "Instant": {
            "type": "string",
            "format": "date-time",
            "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$",
            "description": "ISO 8601, UTC, milliseconds.",
            "examples": [BEGAN],
        },
        "Count": {"type": "integer", "minimum": 0},
        "DropStatus": {
            "enum": [status.value for status in DropStatus],
            "description": "`scheduled` becomes `live` at `starts_at`, and `live` becomes `ended` at `ends_at`.",
        },
    }


# In ---------------------------------------------------------------------------------------------------


def _incoming() -> dict[str, Schema]:
    kinds = [schemas.NewDrop, schemas.NewUser, schemas.Echo, schemas.Nothing]
    _, found = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for shape in found.values():
        shape.pop("title", None)
        if not shape["required"]:
            del shape["required"]

    def say(kind: str, field: str, description: str, **more: Any) -> None:
        found[kind]["properties"][field] |= {"description": description, **more}

    say("NewDrop", "name", "What is sold. No control characters, not blank.", pattern=TEXT_PATTERN)
    say("NewDrop", "price", "In minor units of `currency`: cents of a dollar.")
    say("NewDrop", "total_stock", "Units for sale; all of them are free in the beginning.")
    say("NewDrop", "currency", "ISO 4217.")
    say("NewDrop", "starts_at", "Nobody can reserve before. Rounded down to milliseconds; years 1970 to 2999.")
    say("NewDrop", "ends_at", "Nobody can reserve from then on; after `starts_at`.")
    say(
        "NewDrop",
        "status",
        "`scheduled` needs a `starts_at`, `live` must have none in the future. Left out, it follows from `starts_at`: "
        "none makes a `draft`, one to come a `scheduled` drop, else it is `live`.",
    )
    for field in ("starts_at", "ends_at"):
        moment, _ = found["NewDrop"]["properties"][field]["anyOf"]
        moment["pattern"] = r"^(19[7-9]|2\d\d)\d-"
    found["NewDrop"]["description"] = "A drop to be made."
    found["NewDrop"]["examples"] = [{"name": "Air One", "price": 19_900, "total_stock": 100, "status": "live"}]
    say("NewUser", "username", "Unique. No control characters, not blank.", pattern=TEXT_PATTERN)
    found["NewUser"]["description"] = "A user to be made, for tests."
    found["NewUser"]["examples"] = [{"username": "ann"}]
    email = "Looks like an address, without control characters; whether mail arrives there, only mail can tell."
    say("Echo", "email", email, pattern=EMAIL_PATTERN)
    say("Echo", "name", "No control characters, not blank.", pattern=TEXT_PATTERN)
    found["Echo"]["description"] = "Something to be validated, and said again."
    found["Echo"]["examples"] = [{"email": "ann@shop.example", "name": "Ann"}]
    found["Nothing"]["examples"] = [{}]
    return found


_ATOM: Final = rf"[^@{_SPACE}\u0000-\u001f\u007f]"
_LABEL: Final = rf"[^@.{_SPACE}\u0000-\u001f\u007f]"
EMAIL_PATTERN: Final = rf"^{_ATOM}+@{_LABEL}+(\.{_LABEL}+)+$"


# Out --------------------------------------------------------------------------------------------------


def _outgoing() -> dict[str, Schema]:
    drop = {
        "id": ref("Id"),
        "name": {"type": "string"},
        "price": {**ref("Count"), "description": "In minor units of `currency`."},
        "currency": {"type": "string", "pattern": "^[A-Z]{3}$"},
        "total_stock": ref("Count"),
        "available_stock": {**ref("Count"), "description": "Neither held nor sold."},
        "starts_at": _or_null(ref("Instant")),
        "ends_at": _or_null(ref("Instant")),
        "status": ref("DropStatus"),
        "created_by": ref("Id"),
        "created_at": ref("Instant"),
    }
    feed = record({"latest_purchasers": {**listed(ref("Purchaser")), "maxItems": 3}}, "The three latest, newest first.")
    purchase = {
        "id": ref("Id"),
        "drop_id": ref("Id"),
        "reservation_id": ref("Id"),
        "qty": _UNITS,
        "status": {"const": "paid"},
        "created_at": ref("Instant"),
    }
    return {
        "Meta": record(
            {
                "requestId": {
                    "type": "string",
                    "description": "The same as in `X-Request-Id`; of a replay, the first.",
                },
                "seq": {
                    **ref("Count"),
                    "description": "How many changes the drop of this answer has seen, this one included.",
                },
                "epoch": {**ref("Count"), "description": "How often an engine has taken that drop over."},
            },
            "About the answer. `seq` and `epoch` stand where it concerns one drop.",
            optional=("seq", "epoch"),
        ),
        "ErrorCode": {
            "oneOf": [{"const": code, "description": f"{status}: {text}"} for code, (status, text) in codes().items()],
            "description": "What went wrong, for programs.",
        },
        "ErrorDetail": record({"path": {"type": "string"}, "message": {"type": "string", "minLength": 1}}),
        "Error": record(
            {
                "success": {"const": False},
                "error": record(
                    {
                        "code": ref("ErrorCode"),
                        "message": {"type": "string", "minLength": 1, "description": "The same, for people."},
                        "details": {**listed(ref("ErrorDetail")), "minItems": 1},
                    },
                    optional=("details",),
                ),
                "meta": ref("Meta"),
            },
            "The one form of every error.",
        ),
        "Drop": record(drop, "A drop as it was made."),
        "ShownDrop": record({**drop, "activity_feed": feed}, "A drop as it is committed."),
        "Purchaser": record(
            {"user_id": ref("Id"), "username": {"type": "string"}, "qty": _UNITS, "created_at": ref("Instant")}
        ),
        "Reservation": record(
            {
                "id": ref("Id"),
                "drop_id": ref("Id"),
                "user_id": ref("Id"),
                "status": {"const": "active"},
                "expires_at": {**ref("Instant"), "description": "From this instant on it is over."},
                "created_at": ref("Instant"),
            },
            "A hold: units that nobody else can take until it expires.",
        ),
        "HeldReservation": record(
            {
                "id": ref("Id"),
                "drop_id": ref("Id"),
                "status": {"const": "active"},
                "expires_at": ref("Instant"),
                "created_at": ref("Instant"),
                "drop": record({"id": ref("Id"), "name": {"type": "string"}, "available_stock": ref("Count")}),
            }
        ),
        "CancelledReservation": record(
            {
                "reservationId": ref("Id"),
                "dropId": ref("Id"),
                "availableStock": ref("Count"),
                "status": {"const": "cancelled"},
            },
            "In the earlier systems' words, which this answer alone keeps.",
        ),
        "Purchase": record({**purchase, "user_id": ref("Id")}, "Units that are sold."),
        "PurchaseLine": record({**purchase, "drop": record({"id": ref("Id"), "name": {"type": "string"}})}),
        "User": record(
            {
                "id": ref("Id"),
                "username": {"type": "string", "minLength": NAME_LENGTH_MIN, "maxLength": NAME_LENGTH_MAX},
            }
        ),
        "Pagination": record(
            {
                "limit": {"type": "integer", "minimum": 1, "maximum": schemas.PAGE_MAX},
                "offset": {"type": "integer", "minimum": 0, "maximum": schemas.OFFSET_MAX},
                "total": {**ref("Count"), "description": "How many there are in all."},
            }
        ),
    }


_UNITS: Final[Schema] = {"type": "integer", "minimum": 1}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


# Live -------------------------------------------------------------------------------------------------


def _live() -> dict[str, Schema]:
    bought = record({"dropId": ref("Id"), "username": {"type": "string"}, "purchasedAt": ref("Instant")})
    latest = record(
        {"userId": ref("Id"), "username": {"type": "string"}, "qty": _UNITS, "createdAt": ref("Instant")},
    )
    payloads = {
        "STOCK_UPDATED": record({"dropId": ref("Id"), "availableStock": ref("Count")}),
        "ACTIVITY_UPDATED": record({"dropId": ref("Id"), "latestPurchasers": {**listed(latest), "maxItems": 3}}),
        "DROP_CREATED": record({"drop": ref("Drop")}),
        "DROP_UPDATED": record({"drop": ref("ShownDrop")}),
        "RESERVATION_EXPIRED": record({"dropId": ref("Id"), "reservationId": ref("Id")}),
        "PURCHASE_COMPLETED": bought,
    }
    seq = {**ref("Count"), "description": "Of the drop: resume after it."}
    events = [
        record(
            {"type": {"const": "event"}, "event": {"const": name}, "seq": seq, "at": ref("Instant"), "data": payload}
        )
        for name, payload in payloads.items()
    ]
    drops = {
        "oneOf": [{"const": "*"}, {**listed(ref("AnyId")), "maxItems": live.DROPS_MAX}],
        "description": "All drops, or these.",
    }
    resume = {"type": "object", "additionalProperties": ref("Count"), "description": "The last `seq` known, by drop."}
    wanted = [
        record({"type": {"const": "subscribe"}, "drops": drops, "resume": resume}, optional=("resume",)),
        record({"type": {"const": "unsubscribe"}, "drops": drops}),
        record({"type": {"const": "identify"}, "userId": ref("AnyId")}),
        record({"type": {"const": "identify"}, "token": {"type": "string"}}),
    ]
    return {
        "AnyId": {
            "type": "string",
            "format": "uuid",
            "pattern": f"^{_UUID}$",
            "description": "A UUID, in upper or lower case.",
            "examples": [DROP_ID],
        },
        "LiveRequest": {"oneOf": wanted, "description": "What a viewer may send over its WebSocket."},
        "LiveSnapshot": record(
            {"type": {"const": "snapshot"}, "seq": seq, "drop": ref("ShownDrop")}, "A drop as of `seq`."
        ),
        "LiveEvent": {"oneOf": events, "description": "One thing that happened to a drop, told after its commit."},
        "StreamedEvent": record(
            {
                "event": {"enum": ["snapshot", "reset", *payloads]},
                "data": {
                    "type": "string",
                    "contentMediaType": "application/json",
                    "contentSchema": {"oneOf": [ref("LiveSnapshot"), ref("LiveEvent"), ref("LiveReset")]},
                },
                "id": {"type": "string", "description": "For `Last-Event-ID`; nothing in it is for others."},
                "retry": {"type": ["string", "integer"], "description": "Milliseconds until a page comes back."},
            },
            "A server-sent event.",
            optional=("event", "data", "id", "retry"),
        ),
        "LiveReset": record({"type": {"const": "reset"}}, "Forget what you know: everything comes anew."),
        "LiveError": record(
            {
                "type": {"const": "error"},
                "code": ref("ErrorCode"),
                "message": {"type": "string"},
                "dropId": {"type": "string"},
            },
            "What a viewer asked for and does not get; the socket stays open.",
            optional=("dropId",),
        ),
    }
