"""`holdfast serve` as it is, with a window: what its queues, heaps and tables hold, for whoever asks on a Unix socket.

And, of the test alone, faults that a soak must see (`SOAK_FAULT`): memory that each command leaves behind, descriptors
that are never closed, holders who wait for all the others. Without one, nothing of the product is changed.

    SOAK_STATISTICS=<path> [SOAK_FAULT=memory|descriptors|starvation] python -m tests.proof.soak.server serve
"""

import ctypes
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, Final

import msgspec
import trio

from api import cli, serve
from api.handlers import Gate, Service
from engine.model import Cancel, Command, DropId, Purchase
from engine.registry import Registry

GATE: Final = Gate.__name__  # of which `api.serve` makes one
LEAKED_BYTES: Final = 1024  # of each command
LEAKED_EVERY: Final = 50  # commands, for a descriptor
DESCRIPTORS_MAX: Final = 9_000  # that are leaked: the crowd needs the others
STARVED_S: Final = 0.4


class Statistics(msgspec.Struct, frozen=True):
    """How much of everything there is. Each is bounded by what people do at the time, none by how long they have."""

    drops: int
    in_flight: int
    mailboxes: int  # commands that wait for their drops, over all of them
    parts: int  # decided, on their way to a commit
    outbox: int  # committed, on their way to whoever asked
    timer: int
    deadlines: int  # holds, and such that are over and not cleaned out yet
    holds: int
    endings: int  # how users' newest reservations ended, over all drops
    viewers: int
    parked: int
    feeds: int
    ring: int
    keys: int
    users: int
    blocks: int  # of memory that Python has handed out
    heap_bytes: int  # that libraries in C and large objects have of the heap, handed out and not given back


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and newer: mallinfo(3)."""

    _fields_: ClassVar = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def _heap_bytes() -> Callable[[], int]:
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:  # another C library: it is not known
        return lambda: 0
    mallinfo2.restype = _Mallinfo2

    def heap_bytes() -> int:
        seen = mallinfo2()
        return int(seen.uordblks + seen.hblkhd)

    return heap_bytes


heap_bytes: Final = _heap_bytes()


def statistics(service: Service) -> Statistics:
    """All of one instant: called from within the server's loop."""
    registry, hub = service.registry, service.hub
    figures, told = registry.statistics(), hub.statistics()
    actors = list(registry._actors.values())
    return Statistics(
        drops=figures.drops,
        in_flight=figures.in_flight,
        mailboxes=sum(len(actor.mailbox) for actor in actors),
        parts=sum(part.size for actor in actors for part in (actor._waiting, actor.in_flight) if part is not None),
        outbox=len(registry._committer._outbox),
        timer=figures.timer.waiting,
        deadlines=sum(len(actor._tentative._deadlines or ()) for actor in actors),
        holds=sum(len(actor.committed.holds) for actor in actors),
        endings=sum(len(actor.committed.newest_ended) for actor in actors),
        viewers=told.viewers,
        parked=told.parked,
        feeds=len(hub._feeds),
        ring=told.ring,
        keys=len(service.keys._running),
        users=len(service.users._names),
        blocks=sys.getallocatedblocks(),
        heap_bytes=heap_bytes(),
    )


def watch(path: str, gate: Gate, loop: trio.lowlevel.TrioToken) -> None:
    """Answer each who connects with the figures of this moment; in a thread of its own."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        while True:
            asking, _ = listening.accept()
            service = gate.service
            with asking, suppress(OSError):  # who asked may have lost patience
                figures = None if service is None else trio.from_thread.run_sync(statistics, service, trio_token=loop)
                asking.sendall(msgspec.json.encode(figures))


# Faults -----------------------------------------------------------------------------------------------

_leaked: list[Any] = []


def _before_each_command(leak: Callable[[], None]) -> None:
    ask = Registry.ask

    def asked(self: Registry, *arguments: Any, **more: Any) -> None:
        leak()
        ask(self, *arguments, **more)

    Registry.ask = asked  # type: ignore[method-assign]


def _leak_memory() -> None:
    _before_each_command(lambda: _leaked.append(bytearray(LEAKED_BYTES)))


def _leak_descriptors() -> None:
    commands = 0

    def leak() -> None:
        nonlocal commands
        commands += 1
        if commands % LEAKED_EVERY == 0 and len(_leaked) < DESCRIPTORS_MAX:
            _leaked.append(os.dup(2))

    _before_each_command(leak)


def _starve_holders() -> None:
    """Whoever holds a unit waits a while for whoever wants one."""
    ask = Registry.ask

    async def later(registry: Registry, *arguments: Any) -> None:
        await trio.sleep(STARVED_S)
        ask(registry, *arguments)

    def asked(self: Registry, drop_id: DropId, command: Command, *arguments: Any) -> None:
        if isinstance(command, Purchase | Cancel):
            trio.lowlevel.spawn_system_task(later, self, drop_id, command, *arguments)
        else:
            ask(self, drop_id, command, *arguments)

    Registry.ask = asked  # type: ignore[assignment,method-assign]


FAULTS: Final[dict[str, Callable[[], None]]] = {
    "memory": _leak_memory,
    "descriptors": _leak_descriptors,
    "starvation": _starve_holders,
}


def main() -> int:
    fault = os.environ.get("SOAK_FAULT")
    if fault:
        FAULTS[fault]()
    path = os.environ["SOAK_STATISTICS"]

    def new_gate() -> Gate:
        gate = Gate()
        threading.Thread(target=watch, args=(path, gate, trio.lowlevel.current_trio_token()), daemon=True).start()
        return gate

    setattr(serve, GATE, new_gate)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
