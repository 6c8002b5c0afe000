"""One effect per user, operation and key; a retry gets the first answer again, byte for byte.

The answer is written in the same transaction as its effect, so the ledger never has one without the other. This
module keeps what the ledger can't: which keys are being worked on right now, and which ones it need not ask for.
"""

import hashlib
import mmap
from collections.abc import Callable, Iterable
from typing import Final

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

# Of one key, waiting. Who gave up and asks again waits in its first place still, for as long as a commit is in doubt.
RETRIES_MAX: Final = 16
# After these the ledger may have the key: the drop stumbled over it, used where we did not see it, or nobody knows.
# After others, one for want of room above all, a retry must not cost more than the first try.
STUMBLED: Final = frozenset({FaultCode.RESTARTING, FaultCode.FENCED, FaultCode.UNKNOWN})
BLOCK_BYTES: Final = 64
BLOCKS: Final = 2**18

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
    one is forgotten when the younger has lasted `keep_s`.
    """

    def __init__(self, find: Find, keep_s: float) -> None:
        self._find = find
        self._keep_s = keep_s
        self._running: dict[KeyId, _Running] = {}
        self._young, self._old = HashFilter(), HashFilter()
        self._young_since = trio.current_time()

    def learn(self, keys: Iterable[KeyId]) -> None:
        """Keys that the ledger has."""
        if trio.current_time() - self._young_since > self._keep_s:
            self._old, self._young = self._young, HashFilter()
            self._young_since = trio.current_time()
        for key in keys:
            self._young.add(hash(key))

    async def once(self, key: KeyId, fingerprint: bytes, ask: Ask, render: Render) -> Outcome | Replayed | StoredAnswer:
        """Ask, unless this key has been used: then wait for its answer, or find it, and replay it.

        `ask` hands the command over with the receipt and with whom to tell. Awaits promises only. A caller that
        waits no longer leaves the key taken until the engine has told what became of it.

        Raises:
            ApiError: 422, the key was used with another request; 503, too many retries wait already.
            Unavailable: the key may have been used, and the ledger is out of reach.
        """
        while (running := self._running.get(key)) is not None:
            if running.is_first:
                running.match(fingerprint)
            if len(running.waiting) > RETRIES_MAX:
                raise errors.fault(FaultCode.UNKNOWN)
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
            # What was found is for those, too, who wait by now.
            running.fingerprint, running.answer = stored.fingerprint, stored.answer
            self._finish(key, running, Fault(FaultCode.UNAVAILABLE))
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
        if is_stored or (isinstance(outcome, Fault) and outcome.code in STUMBLED):
            self.learn([key])
        del self._running[key]
        waiting, running.waiting = running.waiting, []
        for promise in waiting:
            promise.keep(None)


class HashFilter:
    """Hashes that were added, in 16 MiB however many: it may say yes of one that was not, and never no of one that was.

    A Bloom filter in blocks of a cache line, so that a hash touches one page (Putze, Sanders and Singler, 2007). It was
    seen to be wrong of 0.15 % after 7 million hashes and of 3 % after 18 million, an hour of 5,000 a second; by the
    formula it is of half after 60 million. A set took 93 bytes for each, without end.
    """

    __slots__ = ("_bits",)

    def __init__(self) -> None:
        self._bits = mmap.mmap(-1, BLOCKS * BLOCK_BYTES)  # zeroes, which take no room before they are touched

    def add(self, hashed: int) -> None:
        at, bits = _place(hashed)
        block = int.from_bytes(self._bits[at : at + BLOCK_BYTES], "little") | bits
        self._bits[at : at + BLOCK_BYTES] = block.to_bytes(BLOCK_BYTES, "little")

    def __contains__(self, hashed: int) -> bool:
        at, bits = _place(hashed)
        return int.from_bytes(self._bits[at : at + BLOCK_BYTES], "little") & bits == bits


def _place(hashed: int) -> tuple[int, int]:
    """Where the block of a hash begins, and its bits in it: of 64 bits the lower 18 for the one, 36 for the others."""
    at = hashed % BLOCKS * BLOCK_BYTES
    hashed >>= 18
    bits = 1 << (hashed & 511) | 1 << (hashed >> 9 & 511) | 1 << (hashed >> 18 & 511) | 1 << (hashed >> 27 & 511)
    return at, bits


class _Running:
    """A key that is being worked on, by its first request (`is_first`) or by one that may be a retry."""

    __slots__ = ("answer", "fingerprint", "is_first", "outcome", "rendered", "waiting")

    def __init__(self, fingerprint: bytes) -> None:
        self.fingerprint = fingerprint
        self.is_first = False
        self.waiting: list[Promise[None]] = []  # the first, and its retries
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
