"""What viewers are told, in the contract's words: the same names and payloads for every kind of client."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from api import answers
from api.answers import iso
from engine.drop import Drop
from engine.hub import News, Told
from engine.model import DropCreated, DropId, DropUpdated, Expired, Instant, LatestPurchase, Purchased, UserId


class Message(msgspec.Struct, frozen=True):
    """One event as clients know it. Those of one change share its `seq`."""

    name: str
    seq: int
    at: Instant
    data: dict[str, Any]
    only_for: UserId | None = None  # whom alone it concerns


def as_event(message: Message) -> dict[str, Any]:
    """The message as native clients get it, over a WebSocket or as a server-sent event."""
    return {
        "type": "event",
        "event": message.name,
        "seq": message.seq,
        "at": iso(message.at),
        "data": message.data,
    }


def as_snapshot(drop: Drop) -> dict[str, Any]:
    """The same of a snapshot."""
    return {"type": "snapshot", "seq": drop.seq, "drop": answers.drop(drop)}


def messages(news: News) -> Iterator[Message]:
    """Everything in the order of `seq`, the newest stock in its place."""
    stock = news.stock
    for told in news.events:
        if stock is not None and told.event.seq > stock.seq:
            yield stock_updated(news.drop, stock.seq, stock.at, stock.available)
            stock = None
        yield from _of(told, news.drop)
    if stock is not None:
        yield stock_updated(news.drop, stock.seq, stock.at, stock.available)


def stock_updated(drop: Drop, seq: int, at: Instant, available: int) -> Message:
    return Message("STOCK_UPDATED", seq, at, {"dropId": drop.terms.id, "availableStock": available})


def activity(drop_id: DropId, latest: Sequence[LatestPurchase]) -> dict[str, Any]:
    """The payload of `ACTIVITY_UPDATED`."""
    lines = [
        {"userId": line.user_id, "username": line.username, "qty": line.qty, "createdAt": iso(line.created_at)}
        for line in latest
    ]
    return {"dropId": drop_id, "latestPurchasers": lines}


def _of(told: Told, drop: Drop) -> Iterator[Message]:
    event, drop_id = told.event, drop.terms.id
    match event:
        case DropCreated():
            yield Message("DROP_CREATED", event.seq, event.at, {"drop": answers.new_drop(event)})
            yield stock_updated(drop, event.seq, event.at, event.terms.total_stock)
        case DropUpdated(status=status):
            shape = answers.drop(drop) | {"status": status.value}  # as of this event; the rest does not change by it
            yield Message("DROP_UPDATED", event.seq, event.at, {"drop": shape})
        case Purchased():
            if told.latest is not None:
                yield Message("ACTIVITY_UPDATED", event.seq, event.at, activity(drop_id, told.latest))
            bought = {"dropId": drop_id, "username": event.username, "purchasedAt": iso(event.at)}
            yield Message("PURCHASE_COMPLETED", event.seq, event.at, bought)
        case Expired(hold=hold):
            ended = {"dropId": drop_id, "reservationId": hold.id}
            yield Message("RESERVATION_EXPIRED", event.seq, event.at, ended, hold.user_id)
        case _:
            pass  # it changes the stock alone
