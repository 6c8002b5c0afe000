"""One effect per user, operation and key; a retry gets the first answer again, byte for byte.

The answer is written in the same transaction as its effect, so the ledger never has one without the other. This
module keeps what the ledger can't: which keys are being worked on right now, and which ones it need not ask for.
"""

import hashlib
from collections.abc import Callable, Iterable

import msgspec
import trio

from api import errors
from api.errors import ApiError
from api.promises import Promise
from engine.model import (
    Decision,
    Fault,
    FaultCode,
    Outcome,
    Receipt,
    RefusalCode,
    Refused,
    Reply,
    StoredAnswer,
    StoredReceipt,
    UserId,
)

KeyId = tuple[UserId, str, str]  # user, operation, key
Find = Callable[[UserId, str, str], Promise[StoredReceipt | None]]
Render = Callable[[Decision], StoredAnswer]
Ask = Callable[[Reply, Receipt | None], None]


class Replayed(msgspec.Struct, frozen=True):
    """The first answer, again."""

    answer: StoredAnswer


class KeyBook:
    """Every key of at least the last `keep_s` is known by its hash; its answer stays in the ledger.

    A hash that means nothing (a collision, a pruned row) costs one look-up, nothing else. Two generations: the older
    one is forgotten when the younger has lasted `keep_s`, so memory holds at most twice that time's keys.
    """

    def __init__(self, find: Find, keep_s: float) -> None:
        self._find = find
        self._keep_s = keep_s
        self._running: dict[KeyId, _Running] = {}
        self._young: set[int] = set()
        self._old: set[int] = set()
        self._young_since = trio.current_time()

    def learn(self, keys: Iterable[KeyId]) -> None:
        """Keys that the ledger has."""
        if trio.current_time() - self._young_since > self._keep_s:
            self._old, self._young = self._young, set()
            self._young_since = trio.current_time()
        self._young.update(hash(key) for key in keys)

    async def once(self, key: KeyId, fingerprint: bytes, ask: Ask, render: Render) -> Outcome | Replayed | StoredAnswer:
        """Ask, unless this key has been used: then wait for its answer, or find it, and replay it.

        `ask` hands the command over with the receipt and with whom to tell. Awaits promises only. A caller that
        waits no longer leaves the key taken until the engine has told what became of it.

        Raises:
            ApiError: 422, the key was used with another request.
            Unavailable: the key may have been used, and the ledger is out of reach.
        """
        while (running := self._running.get(key)) is not None:
            if running.is_first:
                running.match(fingerprint)
            await running.told()
            if running.answer is not None:
                running.match(fingerprint)
                return Replayed(running.answer)
        return await self._first(key, fingerprint, ask, render)

    async def _first(
        self, key: KeyId, fingerprint: bytes, ask: Ask, render: Render
    ) -> Outcome | Replayed | StoredAnswer:
        running = self._running[key] = _Running(fingerprint)

        def remembering(decision: Decision) -> StoredAnswer:
            running.rendered = render(decision)
            return running.rendered

        def reply(outcome: Outcome) -> None:
            self._finish(key, running, outcome)

        try:
            stored = await self._look_up(key)
        except BaseException:
            self._finish(key, running, Fault(FaultCode.UNAVAILABLE))
            raise
        if stored is not None:
            self._finish(key, running, Fault(FaultCode.UNAVAILABLE))
            running.fingerprint = stored.fingerprint
            running.match(fingerprint)
            return Replayed(stored.answer)
        running.is_first = True
        told = running.told()  # before it is asked: the answer may come at once
        ask(reply, Receipt(*key, fingerprint, remembering))
        await told
        return running.answer or running.outcome

    async def _look_up(self, key: KeyId) -> StoredReceipt | None:
        hashed = hash(key)
        if hashed in self._young or hashed in self._old:
            return await self._find(*key)
        return None

    def _finish(self, key: KeyId, running: "_Running", outcome: Outcome) -> None:
        running.outcome = outcome
        # Only what an actor decided was stored; a fault changed nothing, and an unknown drop has no ledger row.
        is_stored = not isinstance(outcome, Fault) and not (
            isinstance(outcome, Refused) and outcome.code is RefusalCode.DROP_NOT_FOUND
        )
        if is_stored:
            running.answer = running.rendered
        # After a fault too: the drop may have stumbled over this very key, used where we did not see it.
        self.learn([key])
        del self._running[key]
        waiting, running.waiting = running.waiting, []
        for promise in waiting:
            promise.keep(None)


class _Running:
    """A key that is being worked on, by its first request (`is_first`) or by one that may be a retry."""

    __slots__ = ("answer", "fingerprint", "is_first", "outcome", "rendered", "waiting")

    def __init__(self, fingerprint: bytes) -> None:
        self.fingerprint = fingerprint
        self.is_first = False
        self.waiting: list[Promise[None]] = []  # as many as requests in flight
        self.rendered: StoredAnswer | None = None
        self.answer: StoredAnswer | None = None
        self.outcome: Outcome = Fault(FaultCode.UNKNOWN)

    def told(self) -> Promise[None]:
        """Kept when it is known what became of it."""
        promise: Promise[None] = Promise()
        self.waiting.append(promise)
        return promise

    def match(self, fingerprint: bytes) -> None:
        if self.fingerprint != fingerprint:
            raise reused()


def reused() -> ApiError:
    return errors.ApiError(422, "IDEMPOTENCY_KEY_REUSED", "This Idempotency-Key was used with another request.")


def fingerprint(*parts: bytes) -> bytes:
    """What identifies a request besides its user and operation: its target and its body."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
