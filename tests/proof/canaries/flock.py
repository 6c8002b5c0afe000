"""The flock: each canary by name, how it is planted, and who is expected to catch it, by what.

A trap is a test of the fast set, or seeds of the simulation until one catches it. Each is the narrowest that there is
at its height: the rules by themselves, the engine on a ledger in memory, PostgreSQL, the whole server. All of them must
go red, and with a failure that `sign` is found in: a test that fails because the bug keeps it from running at all has
caught nothing.
"""

from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from tests.proof.canaries import bugs_of_the_engine as of_engine
from tests.proof.canaries import bugs_of_the_ledger as of_ledger

SEEDS: Final = "seeds of the simulation"


class Trap(msgspec.Struct, frozen=True):
    """`where` is a test's node id, or SEEDS; `sign` a regular expression for what it says."""

    where: str
    sign: str


class Canary(msgspec.Struct, frozen=True):
    plants: tuple[Callable[[], None], ...]
    traps: tuple[Trap, ...]


def _drop(test: str, sign: str) -> Trap:
    return Trap("tests/engine/test_drop.py::" + test, sign)


def _committer(test: str, sign: str) -> Trap:
    return Trap("tests/engine/test_committer.py::" + test, sign)


def _conformance(test: str, sign: str) -> Trap:
    return Trap(f"tests/persistence/test_ledger_conformance.py::{test}[postgres]", sign)


def _postgres(test: str, sign: str) -> Trap:
    return Trap("tests/persistence/test_ledger_postgres.py::" + test, sign)


def _campaign(test: str, sign: str) -> Trap:
    return Trap("tests/proof/test_short_campaigns.py::" + test, sign)


VIOLATION: Final = r"\bI\d+:"  # of any invariant, as the checker and the simulation name them
LOST: Final = r"\bI3: .*acknowledged, and is not there|\bI14: .*answered, and the tables lack it"
KEPT: Final = "AssertionError: whatever it does not read is kept for it"

FLOCK: Final[Mapping[str, Canary]] = {
    # Those that take longest come first: two at once end together then.
    "synchronous_commit_off": Canary(
        (of_ledger.synchronous_commit_off,),
        (
            _postgres("test_a_server_that_may_forget_is_refused", "it was let in"),
            _campaign("test_a_server_that_writes_lazily_and_is_restarted_loses_nothing", LOST),
        ),
    ),
    "reply_before_commit": Canary(
        (of_engine.reply_before_commit,),
        (
            _committer(
                "test_nobody_sees_anything_before_its_commit_and_everybody_at_it",
                r"assert \(2, 0, 0\) == \(1, 1, 0\)",
            ),
            Trap(SEEDS, LOST),
            _campaign("test_a_server_that_writes_lazily_and_is_restarted_loses_nothing", LOST),
        ),
    ),
    "two_engines": Canary(
        (of_ledger.two_engines,),
        (
            _postgres("test_a_second_engine_is_refused", "it was let in"),
            # What they write over each other the log's own key refuses, or the checker sees.
            _campaign(
                "test_an_engine_that_slept_while_another_took_its_drops_lets_them_go",
                rf"{VIOLATION}|part_rejected.*pk_drop_events",
            ),
        ),
    ),
    "naive_key_look": Canary(
        (of_ledger.naive_key_look,),
        (
            _postgres("test_a_backend_that_holds_the_lock_is_terminated_to_resolve", "epoch=1.* != .*epoch=2"),
            _campaign("test_commits_that_come_late_are_known_before_anybody_is_answered", VIOLATION),
        ),
    ),
    "cancel_scope_over_commit": Canary(
        (of_ledger.cancel_scope_over_commit,),
        (
            _postgres("test_a_commit_under_way_is_not_cancelled_with_its_caller", r"assert \[\] == "),
            _campaign("test_commits_that_take_long_happen_once_or_are_said_not_to_be_known", VIOLATION),
        ),
    ),
    "idempotency_row_apart": Canary(
        (of_ledger.idempotency_row_apart,),
        (
            _conformance(
                "test_a_key_has_one_effect_whichever_drop_it_is_used_with",
                r"assert \(9, 1, 0, 2\) == \(10, 0, 0, 1\)",
            ),
            _campaign("test_a_key_and_its_effect_come_and_go_together", VIOLATION),
        ),
    ),
    "ignored_row_count": Canary(
        (of_engine.ignored_row_count, of_ledger.ignored_row_count),
        (
            _committer(
                "test_a_drop_that_a_rival_took_is_let_go_without_a_fight_and_the_others_go_on",
                r"AssertionError\(Reserved",
            ),
            _conformance("test_each_drop_of_a_batch_stands_or_falls_by_its_own_guard", "Extra items in the left set"),
            Trap(SEEDS, LOST),
        ),
    ),
    "no_epoch_in_the_guard": Canary(
        (of_ledger.no_epoch_in_the_guard,),
        (
            _conformance("test_a_change_of_another_epoch_is_not_written", r"== frozenset\(\)"),
            _conformance("test_taking_over_fences_the_old_epoch_off", r"== frozenset\(\)"),
        ),
    ),
    "clamp": Canary(
        (of_engine.clamp, of_ledger.clamp),
        (
            _drop("test_the_last_unit_goes_to_the_first_who_asks", r"AssertionError: Reserved\("),
            _conformance("test_the_last_unit_is_written_and_one_more_is_not", "ck_drops_conservation"),
            Trap(SEEDS, VIOLATION),
        ),
    ),
    "unbounded_viewer_queue": Canary(
        (of_engine.unbounded_viewer_queue,),
        (
            Trap("tests/api/test_viewers.py::test_rest_of_one_send_is_kept_and_nothing_that_follows", KEPT),
            Trap("tests/contract/test_live.py::test_viewer_that_does_not_read_is_conflated_and_then_sent_away", KEPT),
        ),
    ),
    "emit_before_commit": Canary(
        (of_engine.emit_before_commit,),
        (
            _committer(
                "test_nobody_sees_anything_before_its_commit_and_everybody_at_it",
                r"\['DropCreated', 'Reserved'\] == \['DropCreated'\]",
            ),
            Trap(SEEDS, r"\bI11: "),
        ),
    ),
    "deadline_too_late": Canary(
        (of_engine.deadline_too_late,),
        (
            _drop(
                "test_a_hold_is_bought_before_its_deadline_and_never_at_it[60000-False]",
                r"AssertionError: assert Purchased\(",
            ),
            _committer(
                "test_a_purchase_at_the_deadline_is_refused_however_busy_the_ledger",
                "assert 'DROP_RESTARTING' == 'RESERVATION_EXPIRED'",
            ),
            Trap(SEEDS, "part_rejected never expired early, never ended late"),
        ),
    ),
    "timer_on_the_wall_clock": Canary(
        (of_engine.timer_on_the_wall_clock,),
        (
            Trap("tests/engine/test_clock.py::test_a_step_of_the_wall_clock_moves_nothing", "assert 50000 == 100000"),
            Trap(SEEDS, r"\bI19: "),
        ),
    ),
    "no_expiry_reload": Canary(
        (of_engine.no_expiry_reload,),
        (
            Trap(
                "tests/engine/test_registry.py::test_what_fell_due_while_no_engine_ran_expires_at_the_start",
                r"assert \(0, 5, 0\) == \(5, 0, 0\)",
            ),
            Trap(SEEDS, r"\bI18: .* is due since"),
        ),
    ),
}


def plant(name: str) -> None:
    """Give this process the bug.

    Raises:
        KeyError: no canary has that name.
        Moved: the product is not as the canary expects it.
    """
    canary = FLOCK.get(name)
    if canary is None:
        raise KeyError(f"there is no canary {name!r}, only {', '.join(FLOCK)}")
    for bug in canary.plants:
        bug()
