"""What schemathesis is told beyond the document: who calls, and which valid requests may still be refused.

Loaded by schemathesis itself (`schemathesis.toml`), in its own process.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any, Final

import schemathesis
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response

USERS: Final = tuple(f"0190a5a0-0000-7000-8000-00000000000{number}" for number in range(1, 5))
# Most calls are the first user's, so that what one holds can be bought; every eighth is somebody else's.
CALLERS: Final = (*[0] * 7, 1, *[0] * 7, 2, *[0] * 7, 3)
WINDOW: Final = {"starts_at", "ends_at"}  # whether they fit each other and the clock, no schema can say
TOO_LONG: Final = ("URI_TOO_LONG", "HEADERS_TOO_LARGE")  # all parameters together, which no schema bounds
KEY: Final = "Idempotency-Key"

Case = schemathesis.Case[Any]

_callers: Iterator[int] = itertools.cycle(CALLERS)
_numbers: Iterator[int] = itertools.count(1)


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: Case, kwargs: dict[str, Any]) -> None:
    """Give a request what makes something happen: a caller of a few, a key that is new, a drop that can be sold."""
    number = next(_numbers)
    headers = case.headers
    if headers is not None and headers.get("X-User-Id") == USERS[0]:
        headers["X-User-Id"] = USERS[next(_callers)]
    if not _is_valid(case):
        return
    if headers is not None and KEY in headers and number % 4:
        headers[KEY] = f"{headers[KEY][:200]} {number}"  # else most keys would be the example's
    body: object = case.body
    if case.operation.definition.raw.get("operationId") == "createDrop" and isinstance(body, dict) and number % 6:
        more = {"status": "live", "starts_at": None, "ends_at": None, "total_stock": number % 3 + 1}
        case.body = {**body, **more}


def _is_valid(case: Case) -> bool:
    return case.meta is not None and case.meta.generation.mode.is_positive


class RejectedForNoReason(Failure):
    """A request that the document calls valid was refused, and nothing outside it says why."""


@schemathesis.check
def valid_requests_are_taken(ctx: schemathesis.CheckContext, response: Response, case: Case) -> None:
    """A valid request is refused only for what the state of the server says, or the clock."""
    if not _is_valid(case) or not 400 <= response.status_code < 500 or response.status_code in (401, 404, 409):
        return
    error = json.loads(response.content)["error"]
    if error["code"] == "IDEMPOTENCY_KEY_REUSED" and KEY in (case.headers or {}):
        return
    if error["code"] in TOO_LONG:
        return
    if error["code"] == "UPGRADE_REQUIRED" and case.operation.path.endswith("/live"):
        return
    if error["code"] == "VALIDATION_ERROR":
        excused = WINDOW | _whole_floats(case.body)
        if {detail["path"] for detail in error["details"]} <= excused:
            return
    raise RejectedForNoReason(
        operation=case.operation.label,
        title="A valid request was refused",
        message=f"{response.status_code}: {error}",
    )


def _whole_floats(body: object) -> set[str]:
    """Fields like 1.0: integers to JSON Schema, and not to us."""
    return {name for name, value in body.items() if isinstance(value, float)} if isinstance(body, dict) else set()
