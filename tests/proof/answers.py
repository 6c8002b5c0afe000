"""What an answer claims, held to the model at the `seq` at which it says it was true (I3, I12, I13).

Each code has one exact meaning, and the checks come in the contract's order: a reserve is told `OUT_OF_STOCK` only
where the drop is live and the caller holds nothing.
"""

from collections.abc import Callable, Mapping
from typing import Final

from tests.proof.history import Kind, Operation
from tests.proof.model import ACTIVE, CANCELLED, CONSUMED, EXPIRED, LIVE, DropModel
from tests.proof.violation import Findings

Claim = Callable[[Operation, int, DropModel], bool]


def _is_not_born(operation: Operation, seq: int, model: DropModel) -> bool:
    return seq == 0


def _is_not_live(operation: Operation, seq: int, model: DropModel) -> bool:
    return seq > 0 and model.statuses[seq] != LIVE


def _is_reserved(operation: Operation, seq: int, model: DropModel) -> bool:
    return model.statuses[seq] == LIVE and model.newest_of(operation.user_id, seq) == ACTIVE


def _is_sold_out(operation: Operation, seq: int, model: DropModel) -> bool:
    return (
        model.stock[seq] < operation.qty
        and model.statuses[seq] == LIVE
        and model.newest_of(operation.user_id, seq) != ACTIVE
    )


def _newest_is(status: str) -> Claim:
    def claim(operation: Operation, seq: int, model: DropModel) -> bool:
        return seq > 0 and model.newest_of(operation.user_id, seq) == status

    return claim


def _is_own(operation: Operation, model: DropModel) -> bool:
    life = model.lives.get(operation.reservation_id or "")
    return life is not None and life.user_id == operation.user_id


def _is_nowhere(operation: Operation, seq: int, model: DropModel) -> bool:
    return not _is_own(operation, model) or not model.status_of(operation.reservation_id, seq)


def _it_is(*statuses: str) -> Claim:
    def claim(operation: Operation, seq: int, model: DropModel) -> bool:
        return _is_own(operation, model) and model.status_of(operation.reservation_id, seq) in statuses

    return claim


REFUSALS: Final[Mapping[str, Mapping[str, Claim]]] = {
    Kind.RESERVE: {
        "DROP_NOT_FOUND": _is_not_born,
        "DROP_NOT_ACTIVE": _is_not_live,
        "ALREADY_RESERVED": _is_reserved,
        "OUT_OF_STOCK": _is_sold_out,
    },
    Kind.PURCHASE: {
        "DROP_NOT_FOUND": _is_not_born,
        "RESERVATION_REQUIRED": _newest_is(""),
        "RESERVATION_EXPIRED": _newest_is(EXPIRED),
        "RESERVATION_NOT_ACTIVE": _newest_is(CANCELLED),
        "ALREADY_PURCHASED": _newest_is(CONSUMED),
    },
    Kind.CANCEL: {
        "RESERVATION_NOT_FOUND": _is_nowhere,
        "RESERVATION_EXPIRED": _it_is(EXPIRED),
        "RESERVATION_NOT_ACTIVE": _it_is(CANCELLED, CONSUMED),
    },
    Kind.SHOW: {"DROP_NOT_FOUND": _is_not_born},
}
"""What each refusal of the rules claims of the drop's state."""

# Refusals that decided nothing about a drop: the engine could not (503), the request was none (4xx), or was not sent.
UNDECIDED: Final = frozenset(
    {
        *("OVERLOADED", "DATABASE_UNAVAILABLE", "STORAGE_FULL", "SERVER_STOPPING", "DROP_RESTARTING"),
        *("DROP_OWNED_ELSEWHERE", "DROP_OUT_OF_SERVICE", "IDEMPOTENCY_KEY_REUSED", "VALIDATION_ERROR", "NOT_SENT"),
        *("AUTH_REQUIRED", "INVALID_X_USER_ID", "INVALID_TOKEN", "INVALID_JSON", "UNSUPPORTED_MEDIA_TYPE"),
        *("PAYLOAD_TOO_LARGE", "BAD_REQUEST", "HEAD_TIMEOUT", "BODY_TIMEOUT", "NOT_FOUND", "METHOD_NOT_ALLOWED"),
        *("HEADERS_TOO_LARGE", "URI_TOO_LONG"),
    }
)
# Both say that there is no such thing, and then there may be no drop to give a `seq` of.
MAY_LACK_SEQ: Final = frozenset({"DROP_NOT_FOUND", "RESERVATION_NOT_FOUND"})


def check_refusal(operation: Operation, seq: int, model: DropModel, found: Findings) -> None:
    """A refusal of the rules, true at `seq`."""
    claim = REFUSALS[operation.kind][operation.code]
    if claim(operation, seq, model):
        return
    sentence = f"{operation.kind} was told {operation.code} at seq {seq}, where {_state(operation, seq, model)}"
    found.add("I13", sentence, model.drop_id, operation, seq=seq)


def last_without(operation: Operation, model: DropModel) -> int | None:
    """Until which `seq` it is true that there is no such thing (`MAY_LACK_SEQ`); None: for ever."""
    if operation.code == "DROP_NOT_FOUND":
        return 0
    return model.lives[operation.reservation_id or ""].seq - 1 if _is_own(operation, model) else None


def _state(operation: Operation, seq: int, model: DropModel) -> str:
    if seq == 0:
        return "there is no drop yet"
    if operation.kind == Kind.CANCEL:
        status = model.status_of(operation.reservation_id, seq) or "not there"
        owner = "" if _is_own(operation, model) or status == "not there" else ", another user's"
        return f"the reservation is {status}{owner}"
    newest = model.newest_of(operation.user_id, seq) or "none"
    return f"the drop is {model.statuses[seq]}, {model.stock[seq]} are free, the user's newest reservation is {newest}"


def check_show(operation: Operation, seq: int, model: DropModel, found: Findings) -> None:
    if seq == 0:
        found.add("I12", "a drop was shown before it was born", model.drop_id, operation)
    if operation.available_stock is not None and operation.available_stock != model.stock[seq]:
        sentence = f"shown with {operation.available_stock} free at seq {seq}, where {model.stock[seq]} are"
        found.add("I12", sentence, model.drop_id, operation)
    if operation.status is not None and operation.status != model.statuses[seq]:
        sentence = f"shown as {operation.status} at seq {seq}, where it is {model.statuses[seq]}"
        found.add("I12", sentence, model.drop_id, operation)


def check_change(operation: Operation, model: DropModel, found: Findings) -> int | None:
    """An `ok` answer to a change is in the log, as it was told; returns at which `seq`."""
    kind = operation.kind
    life = model.lives.get(operation.reservation_id or "")
    seq: int | None
    if kind == Kind.RESERVE:
        seq = None if life is None else life.seq
    elif kind == Kind.PURCHASE:
        has_it = life is not None and life.purchase_id is not None and life.purchase_id == operation.purchase_id
        seq = life.ended_seq if has_it and life is not None else None
    elif kind == Kind.CANCEL:
        seq = life.ended_seq if life is not None and life.status == CANCELLED else None
    else:
        seq = 1 if model.seq and model.row is not None else None
    if seq is None:
        id_ = operation.purchase_id or operation.reservation_id or operation.drop_id
        found.add("I3", f"{kind} {id_} was acknowledged, and is not there", model.drop_id, operation)
        return None
    event = model.events[seq]
    if event is None or operation.seq != seq:
        found.add("I12", f"told seq {operation.seq}, the log has it at {seq}", model.drop_id, operation)
        return seq
    if kind == Kind.CREATE:
        is_as_told = operation.status is None or operation.status == event.status
        is_as_asked = operation.total_stock is None or operation.total_stock == event.available_stock
        if not (is_as_told and is_as_asked):
            found.add("I12", "born otherwise than told", model.drop_id, operation)
    elif event.user_id != operation.user_id:
        found.add("I12", f"{event.type} at seq {seq} is user {event.user_id}'s", model.drop_id, operation)
    elif kind == Kind.RESERVE and event.qty != operation.qty:
        found.add("I12", f"{operation.qty} asked for, {event.qty} reserved", model.drop_id, operation)
    if operation.available_stock is not None and operation.available_stock != model.stock[seq]:
        sentence = f"told {operation.available_stock} free after seq {seq}, where {model.stock[seq]} are"
        found.add("I12", sentence, model.drop_id, operation)
    if operation.created_at is not None and operation.created_at != event.at:
        sentence = f"told that it happened at {operation.created_at}, the log says {event.at}"
        found.add("I12", sentence, model.drop_id, operation)
    if operation.expires_at is not None and operation.expires_at != event.expires_at:
        sentence = f"told that it lasts until {operation.expires_at}, the log says {event.expires_at}"
        found.add("I19", sentence, model.drop_id, operation)
    return seq
