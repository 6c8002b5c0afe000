"""The one error body, and the one table from a refusal or a fault to a status.

Every error that a client sees is an `ApiError`, rendered by `api.answers.error`.
"""

from typing import Any

import msgspec
import structlog

from engine.ledger import Unavailable
from engine.model import FaultCode, RefusalCode

log = structlog.get_logger()


class Detail(msgspec.Struct, frozen=True):
    """One thing that is wrong with a request: where, and what."""

    path: str
    message: str


class ApiError(Exception):
    """A request that ends in an error body. `retry_after_s` becomes `Retry-After` (429 and 503 always carry one)."""

    def __init__(
        self,
        status_code: int,
        code: str,
        message: str,
        *,
        details: list[Detail] | None = None,
        retry_after_s: int | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = code
        self.message = message
        self.details = details
        self.retry_after_s = retry_after_s if retry_after_s or status_code not in (429, 503) else 1
        self.headers = headers


REFUSALS: dict[RefusalCode, tuple[int, str]] = {
    RefusalCode.DROP_NOT_FOUND: (404, "There is no such drop."),
    RefusalCode.DROP_NOT_ACTIVE: (409, "The drop is not live."),
    RefusalCode.OUT_OF_STOCK: (409, "No unit is free."),
    RefusalCode.ALREADY_RESERVED: (409, "You hold a reservation on this drop already."),
    RefusalCode.RESERVATION_REQUIRED: (409, "Reserve first: you have no reservation on this drop."),
    RefusalCode.RESERVATION_EXPIRED: (409, "The reservation has expired."),
    RefusalCode.RESERVATION_NOT_ACTIVE: (409, "The reservation is not active any more."),
    RefusalCode.RESERVATION_NOT_FOUND: (404, "You have no such reservation."),
    RefusalCode.ALREADY_PURCHASED: (409, "You have bought this reservation already."),
}

NOTHING_HAPPENED = "Nothing was changed; try again."

FAULTS: dict[FaultCode, str] = {
    FaultCode.OVERLOADED: f"Too many requests wait. {NOTHING_HAPPENED}",
    FaultCode.UNAVAILABLE: f"The database is out of reach. {NOTHING_HAPPENED}",
    FaultCode.STORAGE_FULL: f"The database has no room for new rows. {NOTHING_HAPPENED}",
    FaultCode.UNKNOWN: "It is not known whether this happened: retry with the same Idempotency-Key, or look.",
    FaultCode.STOPPING: f"The server is going down. {NOTHING_HAPPENED}",
    FaultCode.RESTARTING: f"This drop is being reloaded. {NOTHING_HAPPENED}",
    FaultCode.FENCED: f"Another server owns this drop now. {NOTHING_HAPPENED}",
    FaultCode.BROKEN: "The stored state of this drop contradicts itself; an operator must look. Nothing was changed.",
}


def refused(code: RefusalCode) -> ApiError:
    status_code, message = REFUSALS[code]
    return ApiError(status_code, code, message)


def fault(code: FaultCode) -> ApiError:
    return ApiError(503, code, FAULTS[code], retry_after_s=1)


def explained(failure: Exception) -> ApiError:
    """What a client is told of a failed handler; what only we should know goes into the log."""
    if isinstance(failure, ApiError):
        return failure
    if isinstance(failure, Unavailable):
        log.warning("database_unavailable", reason=str(failure))
        return fault(FaultCode.UNAVAILABLE)
    log.error("internal_error", reason=repr(failure), exc_info=failure)
    return ApiError(500, "INTERNAL_ERROR", "Something went wrong here.")


def not_found() -> ApiError:
    return ApiError(404, "NOT_FOUND", "There is nothing at this address.")


def invalid(details: list[Detail]) -> ApiError:
    return ApiError(422, "VALIDATION_ERROR", "The request is well-formed, but not valid.", details=details)


def invalid_json(why: str) -> ApiError:
    return ApiError(400, "INVALID_JSON", why)


def to_dict(error: ApiError) -> dict[str, Any]:
    body: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.details is not None:
        body["details"] = error.details
    return body
