"""Where committed events leave the engine: in commit order, each once, to whoever subscribed.

Called between the commit and the answers to its callers, without an await: a subscriber must be quick, must not
block and must not raise. The board is one; the live feed will be another.
"""

from collections.abc import Callable, Sequence

from engine.model import DropId, Event

Subscriber = Callable[[DropId, Event], None]


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
                subscriber(drop_id, event)
