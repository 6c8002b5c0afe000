"""Who did it: each change in a drop's log is some client's, and each client's change is in the log (I3, I4, I14).

A change that no answer tells of may be the work of an operation whose outcome is unknown, one for each. Which of them
did it matters for the order in real time only: the one that began first explains the earliest change, since of all
assignments this contradicts the fewest observations.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Final, Protocol

import msgspec

from tests.proof.answers import REFUSALS
from tests.proof.history import Ending, EventRow, KeyRow, Kind, Operation
from tests.proof.model import DropModel
from tests.proof.violation import Findings

OK, UNKNOWN = Ending.OK, Ending.UNKNOWN
CREATE, RESERVE, PURCHASE, CANCEL = Kind.CREATE, Kind.RESERVE, Kind.PURCHASE, Kind.CANCEL

# As `idempotency_keys.operation` names them.
KEYED: Final[Mapping[str, str]] = {RESERVE: "reserve", PURCHASE: "purchase", CREATE: "create_drop"}
MAKES: Final[Mapping[str, str]] = {RESERVE: "RESERVED", PURCHASE: "PURCHASED", CANCEL: "CANCELLED"}
# An answer of the rules, but one that no drop can keep: the same key may find the drop later.
NEVER_STORED: Final = "DROP_NOT_FOUND"

GroupId = tuple[str, str, str]  # user, operation, key
Made = tuple[int, int, Operation]
"""A change by a client: when its operation began (µs), its `seq`, and the operation."""


class Group(msgspec.Struct):
    """All that a user asked under one key. `began`: when the first attempt that may have done it did."""

    attempts: list[Operation] = []
    row: KeyRow | None = None
    is_answered: bool = False  # by an answer that was stored
    has_first: bool = False  # somebody got the first answer itself, not a replay of it
    began: int = 0

    @property
    def is_effective(self) -> bool:
        """By the tables."""
        return self.row is not None and self.row.status_code < 300


class Attempt(msgspec.Struct):
    """What may have made a change that nobody was told of. `body`: of the stored answer, which says that it did."""

    began: int
    operation: Operation
    body: bytes | None = None


# Keys -------------------------------------------------------------------------------------------------


def is_stored(operation: Operation) -> bool:
    if operation.ending == OK:
        return True
    return operation.code != NEVER_STORED and operation.code in REFUSALS.get(operation.kind, ())


class Keys:
    """What was asked under each key; that it was answered alike, and stored as it was answered."""

    def __init__(
        self, operations: Iterable[Operation], rows: Iterable[KeyRow], given: Mapping[str, int], found: Findings
    ) -> None:
        self.groups: dict[GroupId, Group] = {}
        self._of_users: dict[str, list[tuple[str, Group]]] | None = None
        for operation in operations:
            if operation.key is not None:
                self._take(operation)
            elif operation.is_replayed:
                found.add("I14", "replayed, and nobody gave a key", operation.drop_id, operation)
        for row in rows:
            group = self.groups.get((row.user_id, row.operation, row.key))
            if group is None:
                if row.drop_id not in given:
                    sentence = f"key {row.key} for {row.operation} is stored, and nobody used it"
                    found.add("I4", sentence, row.drop_id, user_id=row.user_id)
            elif group.row is not None:
                found.add("I14", f"key {row.key} is stored twice", row.drop_id, *group.attempts)
            else:
                group.row = row
        for (_, _, key), group in self.groups.items():
            _check_group(key, group, found)

    def of(self, operation: Operation) -> Group:
        """The group of an operation with a key."""
        return self.groups[_group_id(operation)]

    def is_first_heard(self, replay: Operation) -> bool:
        """Whether the replay is all that anybody heard of the first answer. One without a key has none."""
        return replay.key is not None and not self.of(replay).has_first

    def of_user(self, user_id: str | None) -> list[tuple[str, Group]]:
        """A user's keys, for a finding: made when the first is described."""
        if self._of_users is None:
            self._of_users = defaultdict(list)
            for (owner, _, key), group in self.groups.items():
                self._of_users[owner].append((key, group))
        return self._of_users.get(user_id or "", [])

    def _take(self, operation: Operation) -> None:
        id_ = _group_id(operation)
        group = self.groups.get(id_)
        if group is None:
            group = self.groups[id_] = Group()
        group.attempts.append(operation)


def _group_id(operation: Operation) -> GroupId:
    return operation.user_id, KEYED.get(operation.kind, operation.kind), operation.key or ""


def _check_group(key: str, group: Group, found: Findings) -> None:
    attempts = group.attempts
    stored = [attempt for attempt in attempts if is_stored(attempt)]
    open_ = [attempt for attempt in attempts if attempt.ending == UNKNOWN]
    for attempt in attempts:
        if attempt.code == "IDEMPOTENCY_KEY_REUSED" and len({other.drop_id for other in attempts}) < 2:
            found.add("I14", f"key {key} was used for nothing else", attempt.drop_id, attempt)
    if not stored:
        group.began = min((attempt.began for attempt in open_), default=0)
        if group.row is not None and not open_:
            found.add("I4", f"key {key} is stored, and was refused for sure", group.row.drop_id, *attempts)
        return
    group.is_answered = True
    group.began = min(attempt.began for attempt in (*stored, *open_))
    answer = stored[0]
    made = _told(answer)
    firsts = [attempt for attempt in stored if not attempt.is_replayed]
    group.has_first = bool(firsts)
    for other in stored[1:]:
        if _told(other) != made:
            found.add("I14", f"key {key} had a second effect", answer.drop_id, answer, other)
        elif other.answer != answer.answer:
            found.add("I14", f"two answers under key {key} differ", answer.drop_id, answer, other)
        elif other.drop_id != answer.drop_id:
            found.add("I14", f"one answer under key {key} for two drops", answer.drop_id, answer, other)
        else:
            continue
        return
    if len(firsts) > 1:
        found.add("I14", f"key {key} was decided {len(firsts)} times", answer.drop_id, *firsts)
    elif not firsts and not any(_may_precede(attempt, stored) for attempt in open_):
        found.add("I14", f"key {key} replays what nobody asked before", answer.drop_id, *stored)
    row = group.row
    if row is None:
        found.add("I14", f"key {key} was answered, and the tables lack it", answer.drop_id, answer)
    elif (row.drop_id, row.body, row.status_code < 300) != (answer.drop_id, answer.answer, answer.ending == OK):
        found.add("I14", f"key {key} is stored with another answer ({row.status_code})", answer.drop_id, answer)


def _may_precede(attempt: Operation, answers: list[Operation]) -> bool:
    return any(answer.ended is None or attempt.began <= answer.ended for answer in answers)


def _told(operation: Operation) -> tuple[str | None, str | None, str, str]:
    """What was done, by the answer; the drop where that is it."""
    made = operation.drop_id if operation.kind == CREATE else ""
    return operation.reservation_id, operation.purchase_id, operation.ending, made


# Changes ----------------------------------------------------------------------------------------------


class Told:
    """What clients were told of one drop: the change that each answer acknowledges, by its id."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.reserved: dict[str, Operation] = {}
        self.purchased: dict[str, Operation] = {}
        self.cancelled: dict[str, Operation] = {}
        self.created: Operation | None = None

    def began(self, operation: Operation) -> int:
        """When the operation that made the change began: of a replay, the first that may have."""
        if operation.is_replayed and operation.key is not None:
            return self.keys.of(operation).began
        return operation.began

    def take(self, operation: Operation, found: Findings) -> bool:
        """An `ok` answer, if it names a change. Two answers of one change are one's replay of the other, or a lie."""
        kind = operation.kind
        if kind == CREATE:
            if self.created is None or self.created.is_replayed:
                self.created = operation
            elif not operation.is_replayed:
                found.add("I12", "two operations made one drop", operation.drop_id, self.created, operation)
            return True
        if kind == RESERVE:
            told, id_ = self.reserved, operation.reservation_id
        elif kind == PURCHASE:
            told, id_ = self.purchased, operation.purchase_id
        else:
            told, id_ = self.cancelled, operation.reservation_id
        if id_ is None:
            found.add("I12", f"an answer to {kind} that names nothing", operation.drop_id, operation)
            return False
        before = told.get(id_)
        if before is None or (before.is_replayed and not operation.is_replayed):
            told[id_] = operation
        elif not operation.is_replayed and (operation.key is None or operation.key != before.key):
            found.add("I12", f"two operations made one change: {kind} {id_}", operation.drop_id, before, operation)
        return True


def explain(model: DropModel, told: Told, open_: list[Operation], after: int, found: Findings) -> list[Made]:
    """Find each change's operation. `open_` are the unknown ones; what is up to `after` was there before all."""
    made: list[Made] = []
    unexplained: dict[tuple[str, str, str, int], list[EventRow]] = defaultdict(list)
    reserved, purchased, cancelled = told.reserved, told.purchased, told.cancelled
    for event in model.events:
        if event is None or event.seq <= after:
            continue
        kind = event.type
        if kind == "RESERVED":
            operation = reserved.get(event.reservation_id or "")
        elif kind == "PURCHASED":
            operation = purchased.get(event.purchase_id or "")
        elif kind == "CANCELLED":
            operation = cancelled.get(event.reservation_id or "")
        else:
            continue
        if operation is None:
            unexplained[_what(event)].append(event)
        else:
            began = told.began(operation) if operation.is_replayed else operation.began
            made.append((began, event.seq, operation))
    attempts: dict[tuple[str, str, str, int], list[Attempt]] = defaultdict(list)
    for what, attempt in _attempts(model.drop_id, told.keys, open_):
        attempts[what].append(attempt)
    for what in {**unexplained, **attempts}:
        made += _match(model, told, unexplained.get(what, []), attempts.get(what, []), found)
    return made


def _what(event: EventRow) -> tuple[str, str, str, int]:
    """All that a question says of the change that it asks for."""
    user_id, kind = event.user_id or "", event.type
    if kind == "CANCELLED":
        return user_id, kind, event.reservation_id or "", 0
    return user_id, kind, "", (event.qty or 0) if kind == "RESERVED" else 0


def _attempts(drop_id: str, keys: Keys, open_: list[Operation]) -> Iterable[tuple[tuple[str, str, str, int], Attempt]]:
    """Those of the unknown operations that may have had an effect; of a key's, one."""
    taken: set[int] = set()
    for operation in open_:
        kind = operation.kind
        if kind not in MAKES:
            continue
        is_cancel = kind == CANCEL
        what = (
            operation.user_id,
            MAKES[kind],
            (operation.reservation_id or "") if is_cancel else "",
            operation.qty if kind == RESERVE else 0,
        )
        if operation.key is None or is_cancel:
            yield what, Attempt(operation.began, operation)
            continue
        group = keys.of(operation)
        # A key is stored with its effect, or neither is.
        if group.is_answered or not group.is_effective or id(group) in taken:
            continue
        assert group.row is not None
        if group.row.drop_id == drop_id:
            taken.add(id(group))
            yield what, Attempt(group.began, operation, group.row.body)


def _match(
    model: DropModel, told: Told, events: list[EventRow], attempts: list[Attempt], found: Findings
) -> list[Made]:
    """The events of one kind, user and drop that nobody was told of, and what may have made them."""
    made: list[Made] = []
    for attempt in [attempt for attempt in attempts if attempt.body is not None]:
        for event in events:
            id_ = event.purchase_id or event.reservation_id or ""
            if id_ and id_.encode() in (attempt.body or b""):
                events = [other for other in events if other is not event]
                attempts = [other for other in attempts if other is not attempt]
                made.append((attempt.began, event.seq, attempt.operation))
                break
    certain = [attempt for attempt in attempts if attempt.body is not None]
    for attempt in certain[len(events) :]:
        sentence = f"key {attempt.operation.key} is stored as done, and nothing was done"
        found.add("I14", sentence, model.drop_id, attempt.operation)
    certain = certain[: len(events)]
    possible = sorted((attempt for attempt in attempts if attempt.body is None), key=attrgetter("began"))
    chosen = sorted([*certain, *possible[: len(events) - len(certain)]], key=attrgetter("began"))
    made += [(attempt.began, event.seq, attempt.operation) for attempt, event in zip(chosen, events, strict=False)]
    for event in events[len(chosen) :]:
        _report_phantom(model, told, event, found)
    return made


def _report_phantom(model: DropModel, told: Told, event: EventRow, found: Findings) -> None:
    for key, group in told.keys.of_user(event.user_id):
        answer = next((attempt for attempt in group.attempts if attempt.ending == OK), None)
        if (
            answer is not None
            and answer.drop_id == model.drop_id
            and MAKES.get(answer.kind) == event.type
            and any(attempt.ending == UNKNOWN for attempt in group.attempts)
        ):
            sentence = f"{event.type} at seq {event.seq}: a second effect of key {key}"
            found.add("I14", sentence, model.drop_id, *group.attempts, seq=event.seq)
            return
    sentence = f"{event.type} at seq {event.seq}, which nobody asked for, or was refused"
    found.add("I4", sentence, model.drop_id, user_id=event.user_id, seq=event.seq)


class Case(Protocol):
    """A drop, and what clients were told of it."""

    @property
    def model(self) -> DropModel: ...

    @property
    def told(self) -> Told: ...


def explain_births(
    cases: Mapping[str, Case],
    operations: Iterable[Operation],
    keys: Keys,
    given: Mapping[str, int],
    found: Findings,
) -> dict[str, Made]:
    """Who made each drop. An unknown `create` knows no drop: it may have made any with its stock."""
    made: dict[str, Made] = {}
    creates = [operation for operation in operations if operation.kind == CREATE]
    if not creates:  # somebody else made them, before
        return made
    attempts: dict[int, list[Attempt]] = defaultdict(list)
    by_key: dict[str, Attempt] = {}
    seen: set[int] = set()
    for operation in creates:
        if operation.ending != UNKNOWN:
            continue
        attempt = Attempt(operation.began, operation)
        if operation.key is None:
            attempts[operation.total_stock or 0].append(attempt)
            continue
        group = keys.of(operation)
        if group.is_effective and not group.is_answered and id(group) not in seen:
            assert group.row is not None
            seen.add(id(group))
            by_key[group.row.drop_id] = attempt
    for drop_id, case in cases.items():
        row, created = case.model.row, case.told.created
        if drop_id in given or row is None:
            continue
        if created is not None:
            made[drop_id] = (case.told.began(created), 1, created)
            continue
        matching = attempts[row.total_stock]
        if drop_id in by_key:
            attempt = by_key.pop(drop_id)
        elif matching:
            attempt = matching.pop(0)
        else:
            found.add("I4", "a drop that nobody made, or whose making was refused", drop_id, seq=1)
            continue
        made[drop_id] = (attempt.began, 1, attempt.operation)
    for drop_id, attempt in by_key.items():
        sentence = f"key {attempt.operation.key} is stored as done, and drop {drop_id} is not there"
        found.add("I14", sentence, drop_id, attempt.operation)
    return made
