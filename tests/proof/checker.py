"""The judge: does a recorded history agree with the tables, with itself, and with every invariant?

It knows `tests.proof.history` and nothing of the product. `check` groups the history by drop, replays each drop's log
on a model of its own (`model`), finds whose work each change is (`effects`), holds every answer to the state at which
it says it was true (`answers`), the log's order to real time (`order`), and what viewers saw to the log
(`deliveries`), the engine's clock to real time (`clock`). One pass of each, and sorts: 400,000 operations take seconds.

Where each invariant is decided:

    I1   conservation            model: stock after each event, and the drop's row
    I2   counters equal rows     model.compare
    I3   nothing lost            answers.check_change: what was acknowledged is in the log; model.compare: in the rows
    I4   no phantom              effects.explain: each change, and each key, is some operation's that was not refused
    I5   one active hold         model: at each RESERVED
    I6   never bought late       model: at each PURCHASED, by the instant of its decision
    I7   never expired early     model: at each EXPIRED, and in the rows
    I8   lateness of expiry      not here: the instants of commits are needed (test_exactness)
    I9   a hold ends once        model: at each end; model.compare: consumed and purchases are one to one
    I10  numbering               model: 1, 2, 3 … up to the row's
    I11  viewers                 deliveries; that nothing is shown before its operation began: order
    I12  strict serializability  model (the log is legal, what is due is settled first), answers (as they were told),
                                 order (real time)
    I13  honest refusals         answers.check_refusal, each code by its exact meaning
    I14  idempotency             effects: one answer and one effect a key, and as the tables have them
    I15  one writer              model: epochs never fall; order: nor against real time; answers carry no other one
    I16  doubt is frozen         follows: a unit that is sold or returned while its change is in doubt makes the log
                                 oversell, end a hold twice, or refuse dishonestly, whichever way the doubt ends
    I17  bounded resources       not here: test_soak and the benchmark look at a running engine
    I18  liveness                not here: an answer that never came is unknown, which is honest; simulation and fault
                                 tests measure it
    I19  clock                   model: instants never fall, a hold lasts its TTL exactly; clock: and pass as real time
    I20  secrecy                 not here: contract tests; but nobody is told that another user's change is his own

A `refused` write left nothing: that needs no rule of its own, since what it left would be a phantom.
"""

import gc
from collections.abc import Iterable
from typing import TypeVar

from tests.proof.answers import (
    MAY_LACK_SEQ,
    REFUSALS,
    UNDECIDED,
    check_change,
    check_refusal,
    check_show,
    last_without,
)
from tests.proof.clock import Dated, check_clock
from tests.proof.deliveries import HaveAll, check_deliveries
from tests.proof.effects import Keys, Told, explain, explain_births
from tests.proof.history import (
    Delivery,
    DropRow,
    Ending,
    EventRow,
    Kind,
    Operation,
    PurchaseRow,
    Recording,
    ReservationRow,
)
from tests.proof.model import DropModel, compare, replay
from tests.proof.order import Read, Sight, check_epoch, check_order
from tests.proof.violation import FOUND_MAX, Findings, Violation, cut_slices

__all__ = ["Violation", "check", "described"]

OfDrop = TypeVar("OfDrop", Operation, EventRow, ReservationRow, PurchaseRow, Delivery)

OK, REFUSED, UNKNOWN = Ending.OK, Ending.REFUSED, Ending.UNKNOWN
SHOW, EXPIRE = Kind.SHOW, Kind.EXPIRE
READS = frozenset({SHOW, EXPIRE})  # they change nothing themselves


def check(
    recording: Recording,
    *,
    may_read_stale: bool = False,
    may_conflate: bool = True,
    viewers_have_all: bool | HaveAll = False,
    clock_slack_ms: int | None = None,
) -> list[Violation]:
    """Everything in the recording that must not be, in the order in which it was found; [] where all holds.

    `may_read_stale`: there were several engines. One that was superseded does not know it before it commits; until then
    it refuses and shows what was true when it was, and that alone is forgiven.
    `may_conflate`: of changes of stock that follow each other, viewers hear at least the newest; False: each one.
    `viewers_have_all`: the feeds had time to tell all before they were recorded; or whom, and how much.
    `clock_slack_ms`: by how much the engine's clock may differ from real time, more at one time than at another; None:
    somebody set it meanwhile, or the instants are not of one clock.
    """
    was_enabled = gc.isenabled()
    # Millions of tuples and no cycle: the collector would look at them over and over, for a fourth of the time.
    gc.disable()
    try:
        found = _found(recording, may_read_stale, may_conflate, viewers_have_all, clock_slack_ms)
    finally:
        if was_enabled:
            gc.enable()
    cut_slices(found.violations, recording)
    return found.violations


def described(violations: list[Violation]) -> str:
    """For people: the violations with their slices, and how many there are."""
    count = len(violations)
    return "\n\n".join([*map(str, violations), f"{count} violations{' or more' if count == FOUND_MAX else ''}"])


def _found(
    recording: Recording,
    may_read_stale: bool,
    may_conflate: bool,
    viewers_have_all: bool | HaveAll,
    clock_slack_ms: int | None,
) -> Findings:
    found = Findings()
    tables = recording.tables
    keys = Keys(recording.operations, tables.keys, recording.given, found)
    cases = _cases(recording, keys, found)
    births = explain_births(cases, recording.operations, keys, recording.given, found)
    reservations, purchases = _by_drop(tables.reservations), _by_drop(tables.purchases)
    _note_deliveries(recording.deliveries, cases)
    for drop_id, case in cases.items():
        model, told = case.model, case.told
        made = explain(model, told, case.open, recording.given.get(drop_id, 0), found)
        made += [births[drop_id]] if drop_id in births else []
        check_order(model, made, case.reads, case.sights, may_read_stale, found)
        compare(model, reservations.get(drop_id, []), purchases.get(drop_id, []), told.reserved, found)
    if clock_slack_ms is not None:
        check_clock((dated for case in cases.values() for dated in case.dated), clock_slack_ms, found)
    check_deliveries(
        recording.deliveries,
        {drop_id: case.model for drop_id, case in cases.items()},
        found,
        may_conflate=may_conflate,
        may_read_stale=may_read_stale,
        have_all=viewers_have_all,
    )
    return found


class _Case:
    """A drop, and what the history says of it; also what `explain_births` needs."""

    __slots__ = ("dated", "model", "open", "reads", "sights", "told")

    def __init__(self, model: DropModel, told: Told) -> None:
        self.model = model
        self.told = told
        self.open: list[Operation] = []  # operations whose outcome is unknown
        self.reads: list[Read] = []
        self.sights: list[Sight] = []
        self.dated: list[Dated] = []


def _cases(recording: Recording, keys: Keys, found: Findings) -> dict[str, _Case]:
    tables = recording.tables
    rows: dict[str, DropRow] = {}
    for row in tables.drops:
        if row.id in rows:
            found.add("I12", "two rows of one drop", row.id)
        rows[row.id] = row
    events, operations = _by_drop(tables.events), _by_drop(recording.operations)
    others = (_by_drop(tables.reservations), _by_drop(tables.purchases), _by_drop(recording.deliveries))
    cases: dict[str, _Case] = {}
    for drop_id in dict.fromkeys([*rows, *events, *operations, *(id_ for ids in others for id_ in ids)]):
        if not drop_id:
            continue  # a drop that was never made, or all of them: it has no state of its own
        model = replay(drop_id, rows.get(drop_id), events.get(drop_id, []), recording.ttl_ms, found)
        cases[drop_id] = case = _Case(model, Told(keys))
        _hear(case, operations.get(drop_id, []), keys, found)
    return cases


def _hear(case: _Case, operations: list[Operation], keys: Keys, found: Findings) -> None:
    """Hold each answer to the model, and note what it says of the order."""
    model, told = case.model, case.told
    open_, reads, sights = case.open, case.reads, case.sights
    drop_id, last = model.drop_id, model.seq
    for operation in operations:
        kind, ending, seq = operation.kind, operation.ending, operation.seq
        if seq is not None and not 0 <= seq <= last and (ending != OK or kind in READS):
            found.add("I12", f"told of seq {seq}, the tables end at {last}", drop_id, operation)
            continue
        is_decided = ending == OK or (ending == REFUSED and operation.code in REFUSALS.get(kind, ()))
        if ending == UNKNOWN:
            open_.append(operation)
        elif not is_decided:
            if operation.code not in UNDECIDED:
                found.add("I13", f"{operation.code} is no refusal of {kind}", drop_id, operation)
        elif ending == OK and kind not in READS:
            seq = check_change(operation, model, found) if told.take(operation, found) else None
            event = None if seq is None else model.events[seq]
            if event is not None and (operation.key is None or len(keys.of(operation).attempts) == 1):
                case.dated.append((operation, event.at))
        elif seq is not None:
            if ending == REFUSED:
                check_refusal(operation, seq, model, found)
            elif kind == SHOW:
                check_show(operation, seq, model, found)
            if not operation.is_replayed:
                reads.append((operation.began, seq, operation))
            elif keys.is_first_heard(operation):
                reads.append((keys.of(operation).began, seq, operation))
        elif operation.code in MAY_LACK_SEQ:
            until = last_without(operation, model)
            if until is not None:
                reads.append((operation.began, until, operation))
        elif kind != EXPIRE:
            found.add("I12", "an answer about a drop that says no seq", drop_id, operation)
        if seq is not None:
            check_epoch(operation, seq, model, is_decided, found)
            if operation.ended is not None:
                sights.append((operation.ended, seq, is_decided, operation))


def _note_deliveries(deliveries: Iterable[Delivery], cases: dict[str, _Case]) -> None:
    """What a viewer was shown is known: of each change the first sight."""
    first: dict[tuple[str, int], Delivery] = {}
    for delivery in deliveries:
        where = delivery.drop_id, delivery.seq
        before = first.get(where)
        if before is None or delivery.at < before.at:
            first[where] = delivery
    for (drop_id, seq), delivery in first.items():
        case = cases[drop_id]
        if 0 < seq <= case.model.seq:
            case.sights.append((delivery.at, seq, True, delivery))


def _by_drop(rows: Iterable[OfDrop]) -> dict[str, list[OfDrop]]:
    found: dict[str, list[OfDrop]] = {}
    for row in rows:
        of_drop = found.get(row.drop_id)
        if of_drop is None:
            found[row.drop_id] = [row]
        else:
            of_drop.append(row)
    return found
