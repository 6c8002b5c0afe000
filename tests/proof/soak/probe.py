"""Quiet buyers, one at a time, at a drop that nobody else wants: reserve a unit, give it back, twenty times a second.

What the day is like for those who have nothing to do with the crowd; and, when the crowd has gone, how soon it is as it
was before.
"""

import http.client
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec

from tests.bench.job import Server

PAUSE_S: Final = 0.05
PATIENCE_S: Final = 10.0


class Touch(msgspec.Struct, frozen=True):
    """One reserve: when it was answered, and after how long. `is_served`: with a unit."""

    at: float
    latency_ms: float
    is_served: bool


class Probe:
    def __init__(self, server: Server, drop: str, user_ids: Sequence[str]) -> None:
        """Of several users, so that a hold that could not be given back stands in nobody's way."""
        self.touches: list[Touch] = []
        self._server = server
        self._reserve = f"{server.base}/drops/{drop}/reserve"
        self._users = itertools.cycle(user_ids)
        self._is_over = threading.Event()

    @contextmanager
    def touching(self) -> Iterator["Probe"]:
        thread = threading.Thread(target=self._touch_on)
        thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            thread.join()

    def since(self, at: float, until: float = float("inf")) -> list[Touch]:
        return [touch for touch in list(self.touches) if at <= touch.at <= until]

    def _touch_on(self) -> None:
        connection = self._connection()
        while not self._is_over.wait(PAUSE_S):
            began = time.monotonic()
            try:
                self._touch(connection, next(self._users), began)
            except (OSError, http.client.HTTPException):
                now = time.monotonic()
                self.touches.append(Touch(now, (now - began) * 1000, False))
                connection.close()
                connection = self._connection()
        connection.close()

    def _touch(self, connection: http.client.HTTPConnection, user_id: str, began: float) -> None:
        headers = {"X-User-Id": user_id, "Content-Length": "0"}
        connection.request("POST", self._reserve, headers=headers)
        answer = connection.getresponse()
        body, now = answer.read(), time.monotonic()
        is_served = answer.status == 201
        self.touches.append(Touch(now, (now - began) * 1000, is_served))
        if is_served:
            hold_id = msgspec.json.decode(body)["data"]["reservation"]["id"]
            # Not timed: were it refused, the hold would run out by itself.
            connection.request("DELETE", f"{self._server.base}/reservations/{hold_id}/cancel", headers=headers)
            connection.getresponse().read()

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._server.host, self._server.port, timeout=PATIENCE_S)
