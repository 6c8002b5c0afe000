"""Bugs planted in the engine and in front of it."""

from api.viewers import ViewerStream
from engine.clock import Clock
from engine.committer import Committer
from engine.drop import Drop, Rules
from engine.registry import Registry
from tests.proof.canaries.surgery import edit


def reply_before_commit() -> None:
    """Callers are answered as soon as their batch is sent."""
    edit(
        Committer,
        "_commit",
        (
            "    self._sent.unpark_all()\n",
            "    self._sent.unpark_all()\n"
            "    for part in parts:\n"
            "        while part.asks:\n"
            "            canary_sings()\n"
            "            ask = part.asks.pop(0)\n"
            "            self._load.answer(ask, ask.outcome)\n",
        ),
    )


def emit_before_commit() -> None:
    """The world is told as soon as a batch is sent."""
    edit(Registry, "_publish", ("    self._publisher.publish(drop_id, events)\n", ""))
    edit(
        Committer,
        "_commit",
        (
            "    self._sent.unpark_all()\n",
            "    self._sent.unpark_all()\n"
            "    for part in parts:\n"
            "        canary_sings()\n"
            "        self.outage._publisher.publish(part.actor.drop_id, part.events)\n",
        ),
    )


def ignored_row_count() -> None:
    """A part whose guard missed counts as committed."""
    edit(
        Committer,
        "_settle",
        ("if part.actor.drop_id in hit:", "if part.actor.drop_id in hit or canary_sings() is None:"),
    )


def deadline_too_late() -> None:
    """`<=` for `<`: a hold lasts up to its deadline and at it, wherever that is asked."""
    edit(
        Rules,
        "_decide_purchase",
        (
            "if now >= hold.expires_at:",
            "if now == hold.expires_at:\n        canary_sings()\n    if now > hold.expires_at:",
        ),
    )
    edit(Rules, "_decide_cancel", ("if now >= hold.expires_at:", "if now > hold.expires_at:"))
    edit(Rules, "apply", ("assert event.at < hold.expires_at,", "assert event.at <= hold.expires_at,"))
    edit(Rules, "due", ("hold.expires_at <= now:", "hold.expires_at < now:"))
    edit(
        Rules,
        "next_deadline",
        (
            "return clock_at if hold is None else hold.expires_at",
            "return clock_at if hold is None else hold.expires_at + 1",
        ),
        ("return min(hold.expires_at, clock_at)", "return min(hold.expires_at + 1, clock_at)"),
    )


def clamp() -> None:
    """Nobody looks whether there is stock: what would fall below nothing is nothing."""
    edit(
        Rules,
        "_decide_reserve",
        ("return Refused(RefusalCode.OUT_OF_STOCK, self.seq)", "canary_sings()"),
        ("self.available - command.qty)", "max(0, self.available - command.qty))"),
    )
    edit(Rules, "apply", ("self.available -= hold.qty", "self.available = max(0, self.available - hold.qty)"))
    edit(
        Rules,
        "_assert_conserved",
        ("== self.terms.total_stock", ">= self.terms.total_stock"),
    )


def timer_on_the_wall_clock() -> None:
    """Engine time is whatever the machine's clock says at that moment."""
    edit(
        Clock,
        "__init__",
        ("    anchor_ms = int(wall() * MS_PER_S)\n", "    self._wall = wall\n    anchor_ms = int(wall() * MS_PER_S)\n"),
    )
    edit(
        Clock,
        "now",
        (
            "return Instant(self._anchor_ms + int((self._current_time() - self._anchor_s) * MS_PER_S))",
            "canary_sings()\n    return Instant(int(self._wall() * MS_PER_S))",
        ),
    )
    edit(
        Clock,
        "trio_time",
        (
            "return self._anchor_s + (instant - self._anchor_ms) / MS_PER_S + ROUNDING_S",
            "return self._current_time() + instant / MS_PER_S - self._wall() + ROUNDING_S",
        ),
    )


def no_expiry_reload() -> None:
    """The deadlines of holds that were taken before the start are forgotten."""
    edit(
        Drop,
        "restored",
        (
            "drop._deadlines = Deadlines(record.holds)",
            "drop._deadlines = Deadlines(())\n    if record.holds:\n        canary_sings()",
        ),
    )


def unbounded_viewer_queue() -> None:
    """Whatever is told to a viewer that does not read is kept for it."""
    edit(
        ViewerStream,
        "send",
        (
            "    if not self.has_room:\n        return False\n",
            "    if not self.has_room:\n"
            "        if self._is_over or self.is_closed:\n"
            "            return False\n"
            "        canary_sings()\n"
            "        self._left += data\n"
            "        return True\n",
        ),
    )
    edit(ViewerStream, "write", ("> LEFT_MAX:", "> float('inf'):"))
