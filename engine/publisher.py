"""Where committed events leave the engine: in commit order, each once, to whoever subscribed.

Called between the commit and the answers to its callers, without an await: a subscriber must be quick, must not
block and must not raise.
"""

from collections.abc import Sequence
from typing import Protocol

from engine.model import DropId, Event


class Subscriber(Protocol):
    def committed(self, drop_id: DropId, event: Event) -> None:
        """An event was committed; the board shows it, and all that was committed with it."""
        ...

    def replaced(self, drop_id: DropId) -> None:
        """The drop's state was loaded anew: it may have gone on without an event being told."""
        ...


class Publisher:
    def __init__(self) -> None:
        self._subscribers: list[Subscriber] = []
        self.published = 0

    def subscribe(self, subscriber: Subscriber) -> None:
        self._subscribers.append(subscriber)

    def publish(self, drop_id: DropId, events: Sequence[Event]) -> None:
        """One drop's events of one commit."""
        self.published += len(events)
        for subscriber in self._subscribers:
            for event in events:
                subscriber.committed(drop_id, event)

    def replace(self, drop_id: DropId) -> None:
        """One drop, loaded anew."""
        for subscriber in self._subscribers:
            subscriber.replaced(drop_id)
