"""What comes in: bodies, query strings, ids and headers, decoded strictly and checked in full.

A body that is no JSON object, or is one in a way that two parsers could read differently (a key twice, NaN), is
`400 INVALID_JSON`. What is well-formed but not allowed is `422`, and names every fault at once. A bool is no integer,
1.0 is no integer, a field that nobody asked for is refused.
"""

import json
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from api.errors import ApiError, Detail, invalid, invalid_json
from api.ids import IdSource
from engine.model import DropStatus, Instant
from persistence.usernames import NAME_LENGTH_MAX, NAME_LENGTH_MIN

T = TypeVar("T", bound=msgspec.Struct)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LAST_INSTANT = datetime(3000, 1, 1, tzinfo=UTC)  # beyond it a date is a mistake, and some clients can't show it
STOCK_MAX = 1_000_000_000
PRICE_MAX = 2**53 - 1  # the largest integer that every JSON client reads exactly
PAGE_MAX = 100
PAGE_DEFAULT = 20
OFFSET_MAX = 1_000_000
# Of a body; no request needs more than two. The parser's own limit is another one in each version of Python.
NESTING_MAX = 32
TOO_DEEP = "it is nested too deeply"
KEY_MAX = 255
REQUEST_ID_MAX = 128

PRINTABLE_ASCII = re.compile(r"[\x20-\x7e]+")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")

Instant8601 = Annotated[datetime, Meta(tz=True)]


class NewDrop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=2, max_length=200)]
    price: Annotated[int, Meta(ge=0, le=PRICE_MAX)]
    total_stock: Annotated[int, Meta(ge=0, le=STOCK_MAX)]
    currency: Annotated[str, Meta(pattern="^[A-Z]{3}$")] = "USD"
    starts_at: Instant8601 | None = None
    ends_at: Instant8601 | None = None
    status: Literal["draft", "scheduled", "live"] | None = None


class NewUser(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    username: Annotated[str, Meta(min_length=NAME_LENGTH_MIN, max_length=NAME_LENGTH_MAX)]


class Echo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    # One @, something on both sides, a dot in the domain: whether mail arrives there only mail can tell.
    email: Annotated[str, Meta(pattern=r"^[^@\s]+@[^@\s.]+(\.[^@\s.]+)+$", max_length=254)]
    name: Annotated[str, Meta(min_length=2, max_length=60)] | UnsetType = UNSET


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request that needs none: absent, or an empty object."""


class Page(msgspec.Struct, frozen=True):
    limit: int
    offset: int


def body(kind: type[T], content_type: str | None, raw: bytes) -> T:
    """Decode and validate a JSON body.

    Raises:
        ApiError: 415, 400 `INVALID_JSON` or 422, naming everything that is wrong.
    """
    if not raw and kind is Nothing:
        return kind()
    if not _is_json(content_type):
        raise ApiError(415, "UNSUPPORTED_MEDIA_TYPE", "Send the body as application/json.")
    return _validated(kind, _parsed(raw))


def path_id(name: str, text: str) -> str:
    """A UUID from a path, in canonical form.

    Raises:
        ApiError: 422.
    """
    canonical = uuid_or_none(text)
    if canonical is None:
        raise invalid([Detail(name, "must be a UUID")])
    return canonical


UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def uuid_or_none(text: str) -> str | None:
    """The canonical text of a UUID in its usual form of 36 characters, either case; None for anything else."""
    lower = text.lower()
    return lower if UUID.fullmatch(lower) else None


def page(query: Mapping[str, str]) -> Page:
    """`limit` (1 to 100, default 20) and `offset` (default 0) of a list.

    Raises:
        ApiError: 422.
    """
    details: list[Detail] = []
    limit = _count(query, "limit", PAGE_DEFAULT, 1, PAGE_MAX, details)
    offset = _count(query, "offset", 0, 0, OFFSET_MAX, details)
    if details:
        raise invalid(details)
    return Page(limit, offset)


def idempotency_key(text: str | None) -> str | None:
    """The caller's key, or None.

    Raises:
        ApiError: 422.
    """
    if text is None:
        return None
    if not PRINTABLE_ASCII.fullmatch(text) or len(text) > KEY_MAX:
        raise invalid([Detail("Idempotency-Key", f"must be 1 to {KEY_MAX} printable ASCII characters")])
    return text


def request_id(text: str | None) -> str:
    """The client's request id where it is one, else a new one."""
    if text is not None and len(text) <= REQUEST_ID_MAX and PRINTABLE_ASCII.fullmatch(text):
        return text
    return _request_ids.new()


_request_ids = IdSource(lambda: Instant(int(time.time() * 1000)))


def instant(moment: datetime) -> Instant:
    """Whole milliseconds, rounded down."""
    return Instant((moment - EPOCH) // ONE_MS)


ONE_MS = datetime.resolution * 1000


def status_of(drop: NewDrop, now: Instant) -> DropStatus:
    """The status that a new drop begins with: the one asked for, or what its start says.

    Raises:
        ApiError: 422 where window and status contradict each other.
    """
    details: list[Detail] = []
    starts_at = None if drop.starts_at is None else instant(drop.starts_at)
    ends_at = None if drop.ends_at is None else instant(drop.ends_at)
    if starts_at is not None and ends_at is not None and ends_at <= starts_at:
        details.append(Detail("ends_at", "must be after starts_at"))
    if drop.status == "scheduled" and starts_at is None:
        details.append(Detail("starts_at", "a scheduled drop needs a starts_at"))
    if drop.status == "live" and starts_at is not None and starts_at > now:
        details.append(Detail("starts_at", "a live drop has no starts_at in the future"))
    if details:
        raise invalid(details)
    if drop.status is not None:
        return DropStatus(drop.status)
    if starts_at is None:
        return DropStatus.DRAFT
    return DropStatus.SCHEDULED if starts_at > now else DropStatus.LIVE


# Leaves -----------------------------------------------------------------------------------------------


def _is_json(content_type: str | None) -> bool:
    media_type = (content_type or "").split(";", 1)[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        # The standard parser, since it alone lets us see a key twice; bodies are small.
        value = json.loads(raw.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as fault:
        raise invalid_json(f"The body is not JSON: {_reason(fault)}.") from None
    if not isinstance(value, dict):
        raise invalid_json("The body must be a JSON object.")
    if _is_deeper_than(NESTING_MAX, value):
        raise invalid_json(f"The body is not JSON: {TOO_DEEP}.")
    return value


def _is_deeper_than(levels: int, value: dict[str, Any]) -> bool:
    """Whether arrays and objects stand in each other more than `levels` deep; level by level, not by recursion."""
    containers: list[Any] = [value]
    for _ in range(levels):
        containers = [
            child
            for container in containers
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, dict | list)
        ]
        if not containers:
            return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _reason(fault: Exception) -> str:
    if isinstance(fault, json.JSONDecodeError):
        return f"{fault.msg.lower()} at position {fault.pos}"
    if isinstance(fault, UnicodeDecodeError):
        return "it is not UTF-8"
    return TOO_DEEP if isinstance(fault, RecursionError) else str(fault)


def _validated(kind: type[T], value: dict[str, Any]) -> T:
    """Each field by itself, so that every fault is named, not only the first."""
    details: list[Detail] = []
    found: dict[str, Any] = {}
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in value:
        if name not in fields:
            details.append(Detail(clean(name), "is not a field of this request"))
    for name, field in fields.items():
        if name not in value:
            if field.required:
                details.append(Detail(name, "is required"))
            continue
        try:
            found[name] = _checked(msgspec.convert(value[name], field.type))
        except (msgspec.ValidationError, ValueError) as fault:
            details.append(Detail(name, _first_lower(str(fault))))
    if details:
        raise invalid(details)
    return kind(**found)


def _checked(value: Any) -> Any:
    """Limits that a type cannot say: text that every client and PostgreSQL can hold, dates within reason."""
    if isinstance(value, str):
        if CONTROL.search(value):
            raise ValueError("must not contain control characters")
        if not value.isprintable() and any(0xD800 <= ord(char) <= 0xDFFF for char in value):
            raise ValueError("must be valid Unicode text")
        if value and not value.strip():
            raise ValueError("must not be blank")
    if isinstance(value, datetime) and not EPOCH <= value < LAST_INSTANT:
        raise ValueError("must be between the years 1970 and 2999")
    return value


def _count(query: Mapping[str, str], name: str, default: int, least: int, most: int, details: list[Detail]) -> int:
    text = query.get(name)
    if text is None:
        return default
    # isascii: int() would take other scripts' digits; the length keeps it from a number of a million digits.
    if text.isascii() and text.isdigit() and len(text) <= len(str(most)) and least <= int(text) <= most:
        return int(text)
    details.append(Detail(name, f"must be an integer from {least} to {most}"))
    return default


def clean(name: str) -> str:
    """What came from outside, fit to be told again: short, without half a surrogate pair, which JSON cannot hold."""
    return name.encode("ascii", "backslashreplace").decode()[:100]


def _first_lower(text: str) -> str:
    return text[:1].lower() + text[1:]
