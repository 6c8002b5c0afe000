"""What viewers were shown: committed changes alone, in their order, and no gap that goes unsaid (I11).

The feed names what happened in the contract's words. Of the changes of stock that wait for a viewer only the newest
is told: those that were passed over are owed until a later one, or a snapshot, tells the stock. Everything else is told
one by one, or a snapshot stands for it.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Final

import msgspec

from tests.proof.history import Delivery
from tests.proof.model import DropModel
from tests.proof.violation import Findings

STOCK: Final = frozenset({"DROP_CREATED", "RESERVED", "CANCELLED", "EXPIRED"})
# Which events of the log each event of the feed may tell of; the log's own names tell of themselves.
TELLS: Final[Mapping[str, Collection[str]]] = {
    "STOCK_UPDATED": STOCK,
    "ACTIVITY_UPDATED": ("PURCHASED",),
    "PURCHASE_COMPLETED": ("PURCHASED",),
    "RESERVATION_EXPIRED": ("EXPIRED",),
    "DROP_CREATED": ("DROP_CREATED",),
    "DROP_UPDATED": ("DROP_UPDATED",),
    **{name: (name,) for name in ("RESERVED", "PURCHASED", "CANCELLED", "EXPIRED")},
}
# Events of the feed, and of the log, that say how many are free: a drop's birth has it in the drop.
TELLS_STOCK: Final = frozenset({"STOCK_UPDATED", "DROP_CREATED", "RESERVED", "CANCELLED", "EXPIRED"})


HaveAll = Mapping[tuple[int, str], int]
"""Viewers and drops, and a `seq`: all up to that they had time to hear, while they watched."""


class Position(msgspec.Struct):
    """Where a viewer is: the `seq` of its last message, what it was told at it, and the newest stock that it knows."""

    seq: int
    types: list[str]
    stock_seq: int
    is_snapshot: bool


class Passed:
    """How many events up to each `seq` must be told one by one, and which was the last that changed the stock."""

    def __init__(self, model: DropModel) -> None:
        self.told = [0]
        self.stock = [0]
        for event in model.events[1:]:
            is_stock = event is None or event.type in STOCK
            self.told.append(self.told[-1] + (not is_stock))
            self.stock.append(event.seq if is_stock and event is not None else self.stock[-1])


def check_deliveries(
    deliveries: Iterable[Delivery],
    models: Mapping[str, DropModel],
    found: Findings,
    *,
    may_conflate: bool,
    may_read_stale: bool,
    have_all: bool | HaveAll,
) -> None:
    """`have_all`: in the end each of these knows all up to there; True: every viewer knows all of the drops that it was
    shown anything of.
    """
    positions: dict[tuple[int, str], Position] = {}
    passed: dict[str, Passed] = {}
    for delivery in deliveries:
        drop_id, seq = delivery.drop_id, delivery.seq
        model = models[drop_id]
        if not 1 <= seq <= model.seq or model.events[seq] is None:
            _report(found, delivery, f"seq {seq}, which the tables lack")
            continue
        skipped = passed.get(drop_id)
        if skipped is None:
            skipped = passed[drop_id] = Passed(model)
        told_stock = delivery.available_stock
        if told_stock is not None and told_stock != model.stock[seq]:
            _report(found, delivery, f"{told_stock} free after seq {seq}, where {model.stock[seq]} are")
        position = positions.get((delivery.viewer, drop_id))
        if delivery.is_snapshot:
            if position is None:
                positions[delivery.viewer, drop_id] = Position(seq, [], seq, True)
                continue
            if seq < position.seq and not may_read_stale:
                _report(found, delivery, f"a snapshot of seq {seq} after seq {position.seq}")
            position.seq, position.stock_seq, position.is_snapshot = seq, seq, True
            position.types.clear()
            continue
        event = model.events[seq]
        if event is not None and event.type not in TELLS.get(delivery.type, ()):
            _report(found, delivery, f"{delivery.type} at seq {seq}, which is {event.type}")
        stock_seq = seq if delivery.type in TELLS_STOCK else 0
        if position is None:
            # It came just then: all before is not its own.
            positions[delivery.viewer, drop_id] = Position(seq, [delivery.type], max(stock_seq, seq - 1), False)
            continue
        last = position.seq
        if seq == last:
            if position.is_snapshot or delivery.type in position.types:
                _report(found, delivery, f"seq {seq} again")
            position.types.append(delivery.type)
        elif seq < last:
            _report(found, delivery, f"seq {seq} after seq {last}")
            continue
        else:
            if skipped.told[seq - 1] > skipped.told[last] or (not may_conflate and seq > last + 1):
                _report(found, delivery, f"a gap without a snapshot: seq {seq} after seq {last}")
            position.seq, position.types, position.is_snapshot = seq, [delivery.type], False
        position.stock_seq = max(position.stock_seq, stock_seq)
    if have_all is True:
        have_all = {where: models[where[1]].seq for where in positions}
    for where, seq in (have_all or {}).items():
        _check_end(where, seq, positions[where], passed[where[1]], found)


def _check_end(where: tuple[int, str], seq: int, position: Position, skipped: Passed, found: Findings) -> None:
    viewer, drop_id = where
    if skipped.told[seq] > skipped.told[position.seq]:
        sentence = f"viewer {viewer} was last told of seq {position.seq}, the drop is at {seq}"
        found.add("I11", sentence, drop_id, seq=position.seq)
    elif skipped.stock[seq] > position.stock_seq:
        sentence = (
            f"viewer {viewer} last heard the stock of seq {position.stock_seq}, it changed at {skipped.stock[seq]}"
        )
        found.add("I11", sentence, drop_id, seq=skipped.stock[seq])


def _report(found: Findings, delivery: Delivery, sentence: str) -> None:
    found.add("I11", f"viewer {delivery.viewer} was shown {sentence}", delivery.drop_id, seq=delivery.seq)
