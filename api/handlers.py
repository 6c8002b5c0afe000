"""One function a route: parse, ask, render. No framework in here: every lane calls the same functions.

A handler takes a `Request` whose body has been read in full and returns an `Answer`, or raises an `ApiError`, or
`Unavailable` where the database is needed and out of reach. The hot ones (`show_drop`, `reserve`, `purchase`,
`cancel_reservation`) await promises only (see `api.promises`), so that the hot lane runs them without a task; the
others run in one, and `patiently` lets them, too, do what the hot ones do.
"""

from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, assert_never

import msgspec
import trio

from api import answers, errors, idempotency, schemas
from api.answers import Answer, Version
from api.auth import Authenticator, Caller, UserDirectory
from api.errors import ApiError
from api.idempotency import KeyBook, Replayed
from api.ids import IdSource
from api.promises import Errands, Handling, Promise, in_trio
from api.settings import Settings
from engine.drop import Drop
from engine.hub import Hub
from engine.ledger import InDoubt, Unavailable
from engine.model import (
    Cancel,
    Cancelled,
    Command,
    Create,
    Decision,
    DropCreated,
    DropId,
    DropUpdated,
    Expired,
    Fault,
    FaultCode,
    Hold,
    Outcome,
    Purchase,
    Purchased,
    PurchaseId,
    Receipt,
    RefusalCode,
    Refused,
    Reply,
    ReservationId,
    ReservationStatus,
    Reserve,
    Reserved,
    StoredAnswer,
    Swept,
    Terms,
    UserId,
)
from engine.registry import Registry
from persistence.reads import Reads, UsernameTaken

HEALTH_S = 0.9  # how long a probe waits for the database
FIND_S = 10.0  # for all drops that a viewer names, two round trips for each that is not in memory

# Told, and never raised: making the exception anew took 0.8 of the 2.2 µs of a sold-out answer.
REFUSED = {code: errors.refused(code) for code in RefusalCode}


class Request(msgspec.Struct):
    """One request, read in full. `headers` and `query` have their last value; header names are lower case.

    `drop_id` is the one drop that it is about, set by its handler as soon as that knows; there may be no such drop.
    """

    headers: Mapping[str, str]
    query: Mapping[str, str]
    path: Mapping[str, str]
    body: bytes
    request_id: str
    drop_id: DropId | None = None


class Service(msgspec.Struct, frozen=True):
    """What handlers work with, once the engine is up."""

    settings: Settings
    registry: Registry
    reads: Reads
    users: UserDirectory
    auth: Authenticator
    keys: KeyBook
    ids: IdSource
    errands: Errands
    hub: Hub
    started_at: float  # Trio's clock, s

    async def ping(self) -> None:
        """One round trip to the database.

        Raises:
            Unavailable: it did not come back in time.
        """
        with trio.move_on_after(HEALTH_S) as patience:
            await self.reads.ping()
        if patience.cancelled_caught:
            raise Unavailable(f"the database did not answer within {HEALTH_S} s")


class Gate:
    """What stands between clients and the engine: open while there is a service behind it."""

    def __init__(self) -> None:
        self.service: Service | None = None
        self.is_stopping = False

    def enter(self) -> Service:
        """The service.

        Raises:
            ApiError: 503, it is not up, or going down.
        """
        if self.is_stopping:
            raise errors.fault(FaultCode.STOPPING)
        if self.service is None:
            raise errors.fault(FaultCode.UNAVAILABLE)
        return self.service


Handler = Callable[[Service, Request], Coroutine[Any, Any, Answer]]


async def patiently(
    service: Service, request: Request, handling: Handling[Answer], late: FaultCode = FaultCode.UNKNOWN
) -> Answer:
    """What a coroutine that awaits promises answers, or `late` when that takes longer than anybody waits.

    Cancelling the wait, or its end, does not cancel what was asked.
    """
    with trio.move_on_after(service.registry.answer_s):
        return await in_trio(handling)
    return failed(service, request, errors.fault(late))


def failed(service: Service | None, request: Request, failure: Exception) -> Answer:
    """What is answered to a request whose handler raised.

    Where the failing is ours, it says in which committed state it left the drop; where it is the request's, or the
    drop is not on the board, there is no state to speak of.
    """
    told = errors.explained(failure)
    version = None
    if service is not None and request.drop_id is not None and told.status_code >= 500:
        state = service.registry.board.drop(request.drop_id)
        version = None if state is None else _version(service, request, state.seq)
    return answers.error(told, request.request_id, version)


# Drops ------------------------------------------------------------------------------------------------


async def create_drop(service: Service, request: Request) -> Answer:
    caller = await in_trio(service.auth.caller(request.headers))
    wanted = schemas.body(schemas.NewDrop, request.headers.get("content-type"), request.body)
    now = service.registry.clock.now()
    status = schemas.status_of(wanted, now)
    terms = Terms(
        DropId(service.ids.new()),
        wanted.name,
        wanted.price,
        wanted.currency,
        wanted.total_stock,
        None if wanted.starts_at is None else schemas.instant(wanted.starts_at),
        None if wanted.ends_at is None else schemas.instant(wanted.ends_at),
        caller.user_id,
        now,
    )
    command = Create(terms, status)
    request.drop_id = terms.id

    def ask(reply: Reply, receipt: Receipt | None) -> None:
        service.registry.create(command, reply, receipt)

    handling = _decided(service, request, caller, "create_drop", msgspec.json.encode(wanted), ask)
    return await patiently(service, request, handling)


async def list_drops(service: Service, request: Request) -> Answer:
    page = schemas.page(request.query)
    drops, total = service.registry.board.listed(page.limit, page.offset)
    data = {"items": [answers.drop(state) for state in drops], "pagination": _pagination(page, total)}
    return answers.success(200, data, request.request_id)


async def show_drop(service: Service, request: Request) -> Answer:
    request.drop_id = _drop_id(request)
    state = await find_drop(service, request.drop_id)
    # At one instant, as promises allow: the state is its actor's own, and changes with the next commit.
    version = _version(service, request, state.seq)
    return answers.success(200, answers.drop(state), request.request_id, version)


# Reservations -----------------------------------------------------------------------------------------


async def reserve(service: Service, request: Request) -> Answer:
    caller, drop_id = await _buyer(service, request)
    command = Reserve(caller.user_id, ReservationId(service.ids.new()), service.settings.hold_ms)
    return await _asked(service, request, caller, "reserve", drop_id, command)


async def purchase(service: Service, request: Request) -> Answer:
    caller, drop_id = await _buyer(service, request)
    command = Purchase(caller.user_id, caller.username, PurchaseId(service.ids.new()))
    return await _asked(service, request, caller, "purchase", drop_id, command)


async def cancel_reservation(service: Service, request: Request) -> Answer:
    caller = await service.auth.caller(request.headers)
    schemas.body(schemas.Nothing, request.headers.get("content-type"), request.body)
    reservation_id = ReservationId(schemas.path_id("id", request.path["id"]))
    for hold in service.registry.board.holds_of(caller.user_id):
        if hold.id == reservation_id:
            request.drop_id = hold.drop_id
            told: Promise[Outcome] = Promise()
            service.registry.ask(hold.drop_id, Cancel(caller.user_id, reservation_id), told.keep)
            outcome = await told
            if not (isinstance(outcome, Refused) and outcome.code is RefusalCode.RESERVATION_NOT_FOUND):
                return _answer(service, request, outcome)
    return await _why_not_on_board(service, request, caller, reservation_id)


async def my_reservations(service: Service, request: Request) -> Answer:
    caller = await in_trio(service.auth.caller(request.headers))
    now = service.registry.clock.now()
    board = service.registry.board
    found: list[tuple[Hold, Drop]] = []
    for hold in board.holds_of(caller.user_id):
        state = board.drop(hold.drop_id)
        if hold.expires_at > now and state is not None:
            found.append((hold, state))
    return answers.success(200, answers.holds(found), request.request_id)


async def my_purchases(service: Service, request: Request) -> Answer:
    caller = await in_trio(service.auth.caller(request.headers))
    page = schemas.page(request.query)
    found = await service.reads.purchases_of(caller.user_id, limit=page.limit, offset=page.offset)
    items = [
        {
            "id": line.id,
            "drop_id": line.drop_id,
            "reservation_id": line.reservation_id,
            "qty": line.qty,
            "status": "paid",
            "created_at": answers.iso(line.created_at),
            "drop": {"id": line.drop_id, "name": line.drop_name},
        }
        for line in found.items
    ]
    return answers.success(200, {"items": items, "pagination": _pagination(page, found.total)}, request.request_id)


# The rest ---------------------------------------------------------------------------------------------


async def health(service: Service, request: Request) -> Answer:
    await service.ping()
    uptime_s = round(trio.current_time() - service.started_at, 3)
    return answers.success(200, {"service": "api", "uptime": uptime_s, "db": "up"}, request.request_id)


async def me(service: Service, request: Request) -> Answer:
    caller = await in_trio(service.auth.caller(request.headers))
    return answers.success(200, {"user": {"id": caller.user_id, "username": caller.username}}, request.request_id)


async def echo(service: Service, request: Request) -> Answer:
    received = schemas.body(schemas.Echo, request.headers.get("content-type"), request.body)
    return answers.success(200, {"received": received}, request.request_id)


async def create_user(service: Service, request: Request) -> Answer:
    _development_only(service)
    wanted = schemas.body(schemas.NewUser, request.headers.get("content-type"), request.body)
    user_id = service.ids.new()
    try:
        await service.reads.add_user(UserId(user_id), wanted.username, at=service.registry.clock.now())
    except UsernameTaken:
        raise ApiError(409, "USERNAME_TAKEN", "Somebody has that name already.") from None
    except InDoubt as doubt:
        raise errors.fault(FaultCode.UNKNOWN) from doubt
    return answers.success(201, {"id": user_id, "username": wanted.username}, request.request_id)


async def expire_now(service: Service, request: Request) -> Answer:
    _development_only(service)
    expired = await service.registry.expire_now()
    data = {"expiredCount": sum(expired.values()), "updatedDropIds": sorted(expired)}
    return answers.success(200, data, request.request_id)


# Asking and answering ---------------------------------------------------------------------------------


async def _buyer(service: Service, request: Request) -> tuple[Caller, DropId]:
    """The caller and the drop of a hot request whose body says nothing."""
    request.drop_id = drop_id = DropId(request.path["id"])
    caller = await service.auth.caller(request.headers)
    is_known = service.registry.board.drop(drop_id) is not None  # then it is an id in canonical form, too
    if not is_known:
        request.drop_id = drop_id = _drop_id(request)
    if request.body:
        schemas.body(schemas.Nothing, request.headers.get("content-type"), request.body)
    if not is_known:
        await find_drop(service, drop_id)
    return caller, drop_id


async def _asked(
    service: Service, request: Request, caller: Caller, operation: str, drop_id: DropId, command: Command
) -> Answer:
    if "idempotency-key" not in request.headers:
        told: Promise[Outcome] = Promise()
        service.registry.ask(drop_id, command, told.keep)
        return _answer(service, request, await told)

    def ask(reply: Reply, receipt: Receipt | None) -> None:
        service.registry.ask(drop_id, command, reply, receipt)

    return await _decided(service, request, caller, operation, drop_id.encode(), ask)


async def _decided(
    service: Service, request: Request, caller: Caller, operation: str, target: bytes, ask: idempotency.Ask
) -> Answer:
    """Ask, under the caller's idempotency key if there is one, and render what came of it."""
    key = schemas.idempotency_key(request.headers.get("idempotency-key"))
    if key is None:
        told: Promise[Outcome] = Promise()
        ask(told.keep, None)
        return _answer(service, request, await told)

    def render(decision: Decision) -> StoredAnswer:
        answer = _answer(service, request, decision)
        return StoredAnswer(answer.status_code, answer.body)

    found = await service.keys.once(
        (caller.user_id, operation, key),
        idempotency.fingerprint(target),
        ask,
        render,
    )
    if isinstance(found, Replayed):
        return Answer(found.answer.status_code, found.answer.body, (("Idempotency-Replayed", "true"),))
    if isinstance(found, StoredAnswer):
        return Answer(found.status_code, found.body)
    return _answer(service, request, found)


def _answer(service: Service, request: Request, outcome: Outcome) -> Answer:
    """Render an outcome, synchronously within its reply: the epoch is that of this moment."""
    request_id = request.request_id
    match outcome:
        case Reserved(seq=seq, hold=hold, available_stock=available_stock):
            return answers.reserved(hold, available_stock, request_id, _version(service, request, seq))
        case Refused(code=code, seq=seq):
            return answers.error(REFUSED[code], request_id, _version(service, request, seq))
        case Purchased(seq=seq):
            return answers.success(201, answers.purchased(outcome), request_id, _version(service, request, seq))
        case Cancelled(seq=seq, hold=hold, available_stock=available_stock):
            data = answers.cancelled(hold, available_stock)
            return answers.success(200, data, request_id, _version(service, request, seq))
        case DropCreated(seq=seq):
            return answers.success(201, answers.new_drop(outcome), request_id, _version(service, request, seq))
        case Fault(code=fault_code):
            return failed(service, request, errors.fault(fault_code))
        case Expired() | DropUpdated() | Swept():
            raise AssertionError(f"nobody asked for {outcome}")
    assert_never(outcome)


def _version(service: Service, request: Request, seq: int) -> Version | None:
    """Of the request's drop, at this instant; None where no such drop is in memory."""
    epoch = None if request.drop_id is None else service.registry.epoch_of(request.drop_id)
    return None if epoch is None else Version(seq, epoch)


async def _why_not_on_board(
    service: Service, request: Request, caller: Caller, reservation_id: ReservationId
) -> Answer:
    """Why a reservation is not among the caller's holds: the tables know, and an ended one stays ended."""
    row = await service.errands.run(lambda: service.reads.reservation(reservation_id))
    if row is None or row.user_id != caller.user_id:
        raise errors.refused(RefusalCode.RESERVATION_NOT_FOUND)
    if row.status is ReservationStatus.ACTIVE:
        request.drop_id = row.drop_id
        await find_drop(service, row.drop_id)  # it is held, but its drop is out of service here: this says how
        raise errors.fault(FaultCode.RESTARTING)
    is_expired = row.status is ReservationStatus.EXPIRED
    code = RefusalCode.RESERVATION_EXPIRED if is_expired else RefusalCode.RESERVATION_NOT_ACTIVE
    request.drop_id = row.drop_id
    seq, state = row.drop_seq, service.registry.board.drop(row.drop_id)
    if state is not None:
        # The tables may be ahead of the board by what we don't know yet, and who was told of that must not be shown
        # less by the next answer. In our own epoch it is a commit: ended, and not on the board, is true there, too.
        if service.registry.epoch_of(row.drop_id) != row.drop_epoch:
            raise errors.fault(FaultCode.RESTARTING)
        seq = min(seq, state.seq)
    return answers.error(REFUSED[code], request.request_id, Version(seq, row.drop_epoch))


async def find_drop(service: Service, drop_id: DropId) -> Drop:
    """The drop's committed state, loaded if it is not in memory.

    Raises:
        ApiError: 404.
    """
    state = service.registry.board.drop(drop_id)
    if state is not None:
        return state
    found = await service.errands.run(lambda: _loaded(service, drop_id))
    if found is None:
        raise errors.refused(RefusalCode.DROP_NOT_FOUND)
    if isinstance(found, Fault):
        raise errors.fault(found.code)
    return found


@contextmanager
def finding() -> Iterator[None]:
    """Around the search for several drops: they are waited for together, and not each as long as one may take.

    Raises:
        Unavailable: it took too long. What was found is on the board, so the next search gets further.
    """
    with trio.move_on_after(FIND_S) as patience:
        yield
    if patience.cancelled_caught:
        raise Unavailable(f"the database did not find all drops within {FIND_S} s")


async def try_to_find_drops(service: Service, drop_ids: Iterable[DropId]) -> None:
    """Have on the board those that there are, as far as they can be had.

    Once the database is out of reach it is asked for no other: each would wait for it anew.
    """
    with suppress(Unavailable), finding():
        for drop_id in drop_ids:
            with suppress(ApiError):
                await in_trio(find_drop(service, drop_id))


async def _loaded(service: Service, drop_id: DropId) -> Drop | Fault | None:
    # Asked first, since taking over costs more than a look, and anybody can make up ids.
    if not await service.reads.has_drop(drop_id):
        return None
    return await service.registry.find(drop_id)


def _drop_id(request: Request) -> DropId:
    return DropId(schemas.path_id("id", request.path["id"]))


def _development_only(service: Service) -> None:
    if service.settings.is_production:
        raise errors.not_found()


def _pagination(page: schemas.Page, total: int) -> dict[str, int]:
    return {"limit": page.limit, "offset": page.offset, "total": total}
