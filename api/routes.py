"""Every route, in one table: method, path under the base paths, and the handler that answers.

Each lane serves this table, under `/api/v1` and under its alias `/api`.
"""

import msgspec

from api import handlers
from api.handlers import Handler
from engine.model import FaultCode

BASE_PATHS = ("/api/v1", "/api")


class Route(msgspec.Struct, frozen=True):
    """`path` names its ids in braces: `/drops/{id}`. A hot one has a lane of its own; its handler awaits no task.

    `late` is what a hot one is answered when it takes longer than anybody waits. With a 201 of one that `grants`, the
    caller holds a unit.
    """

    method: str
    path: str
    handler: Handler
    is_hot: bool = False
    late: FaultCode = FaultCode.UNKNOWN
    grants: bool = False


ROUTES = (
    Route("GET", "/health", handlers.health),
    Route("GET", "/me", handlers.me),
    Route("POST", "/demo/echo", handlers.echo),
    Route("GET", "/drops", handlers.list_drops),
    Route("POST", "/drops", handlers.create_drop),
    Route("GET", "/drops/{id}", handlers.show_drop, is_hot=True, late=FaultCode.UNAVAILABLE),
    Route("POST", "/drops/{id}/reserve", handlers.reserve, is_hot=True, grants=True),
    Route("POST", "/drops/{id}/purchase", handlers.purchase, is_hot=True),
    Route("GET", "/reservations/me", handlers.my_reservations),
    Route("DELETE", "/reservations/{id}/cancel", handlers.cancel_reservation, is_hot=True),
    Route("GET", "/purchases/me", handlers.my_purchases),
    Route("POST", "/internal/users", handlers.create_user),
    Route("POST", "/internal/expire-now", handlers.expire_now),
)
