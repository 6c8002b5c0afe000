"""Where committed events leave the engine: in commit order, each once, to whoever subscribed.

Called between the commit and the answers to its callers, without an await: a subscriber must be quick, must not
block and must not raise. The board is one; the live feed will be another.
"""

from collections.abc import Callable

from engine.model import DropId, Event

Subscriber = Callable[[DropId, Event], None]


class Publisher:
    def __init__(self) -> None:
        self._subscribers: list[Subscriber] = []
        self.published = 0

    def subscribe(self, subscriber: Subscriber) -> None:
        self._subscribers.append(subscriber)

    def publish(self, drop_id: DropId, event: Event) -> None:
        self.published += 1
        for subscriber in self._subscribers:
            subscriber(drop_id, event)
