"""What every ledger does, held against both: the one in memory and PostgreSQL."""

from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest
import trio
import trio.testing

from engine.ledger import Change, InDoubt, Rejected, Resolution
from engine.model import (
    DropRecord,
    DropStatus,
    Hold,
    LatestPurchase,
    Purchased,
    ReservationId,
    ReservationStatus,
    Terms,
)
from tests.persistence.scribe import HOLD_MS, Scribe, at, new_id, receipt, user
from tests.persistence.subjects import MemorySubject, Subject, postgres_subject


@pytest.fixture(params=["memory", "postgres"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def dsn(request: pytest.FixtureRequest, kind: str) -> str:
    return str(request.getfixturevalue("database")) if kind == "postgres" else ""


@pytest.fixture
async def subject(kind: str, dsn: str) -> AsyncIterator[Subject]:
    if kind == "memory":
        yield MemorySubject()
    else:
        async with postgres_subject(dsn) as subject:
            yield subject


async def born(subject: Subject, *scribes: Scribe) -> None:
    hit = await subject.ledger.commit([scribe.birth() for scribe in scribes])
    assert hit == {scribe.drop_id for scribe in scribes}


async def load(subject: Subject, scribe: Scribe) -> DropRecord:
    """Take the drop over; the scribe goes on in the new epoch."""
    (record,) = await subject.ledger.take_over([scribe.drop_id])
    scribe.epoch = record.epoch
    return record


def counts(record: DropRecord) -> tuple[int, int, int, int]:
    """(available, held, sold, seq)"""
    return record.available_stock, record.held_count, record.sold_count, record.seq


# Births -------------------------------------------------------------------------------------------------


async def test_a_drop_is_loaded_as_it_was_born(subject: Subject) -> None:
    scribe = Scribe(total=7)
    await born(subject, scribe)
    record = await load(subject, scribe)
    assert record == DropRecord(
        terms=scribe.terms,
        status=DropStatus.LIVE,
        available_stock=7,
        held_count=0,
        sold_count=0,
        epoch=2,
        seq=1,
        holds=[],
        newest_ended={},
        latest_purchases=(),
        updated_at=scribe.terms.created_at,
    )


async def test_terms_keep_every_field_and_strange_names(subject: Subject) -> None:
    creator = user()
    await subject.name(creator, "creator")
    scribe = Scribe()
    scribe.terms = Terms(
        id=scribe.drop_id,
        name="NULL",
        price=0,
        currency="EUR",
        total_stock=0,
        starts_at=None,
        ends_at=at(1),
        created_by=creator,
        created_at=at(-1),
    )
    await born(subject, scribe)
    assert (await load(subject, scribe)).terms == scribe.terms
    (created,) = await subject.events(scribe.drop_id)
    assert created.seq == 1
    assert created.at == at(0)


async def test_several_drops_are_born_in_one_batch(subject: Subject) -> None:
    scribes = [Scribe(total=n) for n in (3, 1, 2)]
    await born(subject, *scribes)
    records = await subject.ledger.take_over(None)
    assert {record.terms.id: record.available_stock for record in records} == {
        scribe.drop_id: scribe.available for scribe in scribes
    }


async def test_a_second_birth_changes_nothing(subject: Subject) -> None:
    scribe, other = Scribe(total=5), Scribe()
    birth = scribe.birth()
    await subject.ledger.commit([birth])
    scribe.reserves(user())
    await subject.ledger.commit([scribe.change()])
    caller = user()
    again = Change(birth.drop_id, 1, 0, birth.events, [receipt(caller, "again")])
    assert await subject.ledger.commit([again, other.birth()]) == {other.drop_id}
    assert counts(await load(subject, scribe)) == (4, 1, 0, 2)
    assert len(await subject.events(scribe.drop_id)) == 2
    assert await subject.receipt(caller, "reserve", "again") is None


async def test_a_birth_may_carry_more_events(subject: Subject) -> None:
    scribe = Scribe(total=5)
    birth = scribe.birth(DropStatus.SCHEDULED)
    scribe.becomes(DropStatus.LIVE)
    hold = scribe.reserves(user(), qty=2)
    more = scribe.change()
    change = Change(scribe.drop_id, 1, 0, [*birth.events, *more.events], [])
    assert await subject.ledger.commit([change]) == {scribe.drop_id}
    record = await load(subject, scribe)
    assert counts(record) == (3, 2, 0, 3)
    assert record.status is DropStatus.LIVE
    assert record.holds == [hold]
    assert record.updated_at == change.events[-1].at
    assert await subject.events(scribe.drop_id) == change.events


# Changes ------------------------------------------------------------------------------------------------


async def test_each_kind_of_event_moves_the_counts_and_the_rows(subject: Subject) -> None:
    scribe, (ann, ben, cat, dan) = Scribe(total=10), [user() for _ in range(4)]
    await born(subject, scribe)
    bought, given, lapsed, kept = (scribe.reserves(who, qty=2) for who in (ann, ben, cat, dan))
    await subject.ledger.commit([scribe.change()])
    assert counts(await load(subject, scribe)) == (2, 8, 0, 5)

    scribe.purchases(bought)
    scribe.cancels(given)
    scribe.expires(lapsed)
    scribe.becomes(DropStatus.PAUSED, ms=HOLD_MS)
    await subject.ledger.commit([scribe.change()])
    record = await load(subject, scribe)
    assert counts(record) == (6, 2, 2, 9)
    assert record.status is DropStatus.PAUSED
    assert record.holds == [kept]
    assert record.newest_ended == {
        ann: ReservationStatus.CONSUMED,
        ben: ReservationStatus.CANCELLED,
        cat: ReservationStatus.EXPIRED,
    }


async def test_events_come_back_as_they_were_committed_and_in_order(subject: Subject) -> None:
    scribe, ann = Scribe(), user()
    await born(subject, scribe)
    changes = []
    hold = scribe.reserves(ann)
    lapsing = scribe.reserves(user())
    changes.append(scribe.change())
    scribe.purchases(hold)
    scribe.cancels(scribe.reserves(ann, ms=2), ms=3)
    scribe.expires(lapsing)
    scribe.becomes(DropStatus.ENDED, ms=HOLD_MS)
    changes.append(scribe.change())
    for change in changes:
        await subject.ledger.commit([change])
    events = await subject.events(scribe.drop_id)
    assert [event.seq for event in events] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert events[1:] == [*changes[0].events, *changes[1].events]


async def test_a_hold_may_be_taken_and_bought_in_one_change(subject: Subject) -> None:
    scribe, ann = Scribe(total=1), user()
    await subject.name(ann, "ann")
    await born(subject, scribe)
    purchase = scribe.purchases(scribe.reserves(ann), ms=5, username="ann")
    assert purchase
    assert await subject.ledger.commit([scribe.change()]) == {scribe.drop_id}
    record = await load(subject, scribe)
    assert counts(record) == (0, 0, 1, 3)
    assert record.newest_ended == {ann: ReservationStatus.CONSUMED}
    assert record.latest_purchases == (LatestPurchase(ann, "ann", 1, at(5)),)


async def test_a_user_may_cancel_and_reserve_again_in_one_change(subject: Subject) -> None:
    scribe, ann = Scribe(), user()
    await born(subject, scribe)
    first = scribe.reserves(ann)
    await subject.ledger.commit([scribe.change()])
    scribe.cancels(first)
    second = scribe.reserves(ann, ms=1)
    scribe.cancels(second, ms=1)
    third = scribe.reserves(ann, ms=1)
    assert await subject.ledger.commit([scribe.change()]) == {scribe.drop_id}
    record = await load(subject, scribe)
    assert record.holds == [third]
    assert record.newest_ended == {}, "the newest is active"


async def test_the_newest_ended_is_the_newest_even_within_one_millisecond(subject: Subject) -> None:
    scribe, ann = Scribe(), user()
    await born(subject, scribe)
    scribe.purchases(scribe.reserves(ann), ms=0)
    scribe.cancels(scribe.reserves(ann), ms=0)
    await subject.ledger.commit([scribe.change()])
    assert (await load(subject, scribe)).newest_ended == {ann: ReservationStatus.CANCELLED}
    scribe.purchases(scribe.reserves(ann), ms=0)
    await subject.ledger.commit([scribe.change()])
    assert (await load(subject, scribe)).newest_ended == {ann: ReservationStatus.CONSUMED}


async def test_the_feed_is_the_newest_three_purchases_newest_first(subject: Subject) -> None:
    scribe, people = Scribe(), [user() for _ in range(5)]
    await born(subject, scribe)
    for who in people:
        scribe.purchases(scribe.reserves(who), ms=7)
    await subject.ledger.commit([scribe.change()])
    latest = (await load(subject, scribe)).latest_purchases
    assert [purchase.user_id for purchase in latest] == [people[4], people[3], people[2]]
    assert latest[0].username == "user_" + people[4].replace("-", "")[:12]


async def test_the_newest_instant_is_that_of_the_newest_event(subject: Subject) -> None:
    newest = subject.ledger.newest_instant  # type: ignore[attr-defined]  # the engine's clock asks, not the port
    assert await newest() is None
    scribe, other = Scribe(), Scribe()
    await born(subject, scribe, other)
    scribe.reserves(user(), ms=1234)
    await subject.ledger.commit([scribe.change()])
    assert await newest() == at(1234)


# The guard ----------------------------------------------------------------------------------------------


async def test_a_change_of_another_epoch_is_not_written(subject: Subject) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    await subject.rival_takes(scribe.drop_id)
    scribe.reserves(user())
    caller = user()
    assert await subject.ledger.commit([scribe.change(receipt(caller, "k"))]) == frozenset()
    assert counts(await load(subject, scribe)) == (10, 0, 0, 1)
    assert len(await subject.events(scribe.drop_id)) == 1
    assert await subject.receipt(caller, "reserve", "k") is None


@pytest.mark.parametrize("from_seq", [1, 3])
async def test_a_change_that_does_not_follow_the_last_one_is_not_written(subject: Subject, from_seq: int) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    await subject.ledger.commit([scribe.change()])
    scribe.committed_seq = scribe.seq = from_seq
    scribe.reserves(user())
    assert await subject.ledger.commit([scribe.change()]) == frozenset()
    assert counts(await load(subject, scribe)) == (9, 1, 0, 2)


async def test_the_last_unit_is_written_and_one_more_is_not(subject: Subject) -> None:
    scribe = Scribe(total=2)
    await born(subject, scribe)
    scribe.reserves(user(), qty=2)
    assert await subject.ledger.commit([scribe.change()]) == {scribe.drop_id}
    scribe.reserves(user(), qty=1)
    assert await subject.ledger.commit([scribe.change()]) == frozenset()
    assert counts(await load(subject, scribe)) == (0, 2, 0, 2)


async def test_an_unknown_drop_is_missed(subject: Subject) -> None:
    scribe = Scribe()
    scribe.birth()
    scribe.reserves(user())
    assert await subject.ledger.commit([scribe.change()]) == frozenset()
    assert await subject.ledger.take_over([scribe.drop_id]) == []


async def test_each_drop_of_a_batch_stands_or_falls_by_its_own_guard(subject: Subject) -> None:
    kept, lost, sold_out = Scribe(), Scribe(), Scribe(total=0)
    await born(subject, kept, lost, sold_out)
    await subject.rival_takes(lost.drop_id)
    callers = [user() for _ in range(3)]
    changes = []
    for scribe, caller in zip((lost, kept, sold_out), callers, strict=True):
        scribe.reserves(caller)
        changes.append(scribe.change(receipt(caller, "k")))
    assert await subject.ledger.commit(changes) == {kept.drop_id}
    assert counts(await load(subject, kept)) == (9, 1, 0, 2)
    assert counts(await load(subject, lost)) == (10, 0, 0, 1)
    assert counts(await load(subject, sold_out)) == (0, 0, 0, 1)
    stored = [await subject.receipt(caller, "reserve", "k") for caller in callers]
    assert [one is not None for one in stored] == [False, True, False]


async def test_an_empty_batch_hits_nothing(subject: Subject) -> None:
    assert await subject.ledger.commit([]) == frozenset()
    assert await subject.ledger.resolve([]) == {}
    assert await subject.ledger.take_over([]) == []


# Receipts -----------------------------------------------------------------------------------------------


async def test_a_receipt_comes_back_byte_for_byte(subject: Subject) -> None:
    scribe, ann = Scribe(), user()
    await born(subject, scribe)
    scribe.reserves(ann)
    body = bytes(range(256)) + '{"name": "é \\" NULL"}'.encode()
    kept = receipt(ann, 'ke"y, {1}\\', operation="POST NULL", body=body)
    await subject.ledger.commit([scribe.change(kept, receipt(ann, "", body=b""))])
    assert await subject.receipt(ann, "POST NULL", 'ke"y, {1}\\') == kept
    assert await subject.receipt(ann, "reserve", "") == receipt(ann, "", body=b"")
    assert await subject.receipt(user(), "POST NULL", 'ke"y, {1}\\') is None


async def test_a_refusal_under_a_key_is_kept_without_any_event(subject: Subject) -> None:
    scribe, ann = Scribe(), user()
    await born(subject, scribe)
    assert await subject.ledger.commit([scribe.change(receipt(ann, "k"))]) == {scribe.drop_id}
    assert await subject.receipt(ann, "reserve", "k") is not None
    assert counts(await load(subject, scribe)) == (10, 0, 0, 1)


async def test_a_key_has_one_effect_whichever_drop_it_is_used_with(subject: Subject) -> None:
    scribe, other, ann = Scribe(), Scribe(), user()
    await born(subject, scribe, other)
    scribe.reserves(ann)
    await subject.ledger.commit([scribe.change(receipt(ann, "k"))])
    other.reserves(ann)
    with pytest.raises(Rejected):
        await subject.ledger.commit([other.change(receipt(ann, "k"))])
    assert counts(await load(subject, other)) == (10, 0, 0, 1)


# Rejections: the whole batch or nothing -----------------------------------------------------------------


async def rejected(subject: Subject, bad: Change, good: Change) -> None:
    """`bad` takes `good` down with it, and nothing of either is there."""
    records = await subject.ledger.take_over(None)
    epochs = {record.terms.id: record.epoch for record in records}
    batch = [Change(c.drop_id, epochs[c.drop_id], c.from_seq, c.events, c.receipts) for c in (good, bad)]
    with pytest.raises(Rejected):
        await subject.ledger.commit(batch)
    after = {record.terms.id: record for record in await subject.ledger.take_over(None)}
    for before in records:
        assert counts(after[before.terms.id]) == counts(before)
        assert after[before.terms.id].holds == before.holds


async def two(subject: Subject) -> tuple[Scribe, Change]:
    """A drop to spoil, and a good change of another."""
    scribe, other = Scribe(), Scribe()
    await born(subject, scribe, other)
    other.reserves(user())
    return scribe, other.change()


async def test_an_end_of_a_reservation_that_is_not_active_is_rejected(subject: Subject) -> None:
    scribe, good = await two(subject)
    hold = scribe.reserves(user())
    scribe.reserves(user())
    await subject.ledger.commit([scribe.change()])
    await subject.end_behind_the_engine(hold)
    scribe.purchases(hold)
    await rejected(subject, scribe.change(), good)


async def test_an_end_of_an_unknown_reservation_is_rejected(subject: Subject) -> None:
    scribe, good = await two(subject)
    scribe.reserves(user())
    await subject.ledger.commit([scribe.change()])
    scribe.expires(Hold(ReservationId(new_id()), scribe.drop_id, user(), 1, at(0), at(HOLD_MS)))
    await rejected(subject, scribe.change(), good)


async def test_a_second_active_reservation_of_a_user_is_rejected(subject: Subject) -> None:
    scribe, good = await two(subject)
    ann = user()
    scribe.reserves(ann)
    await subject.ledger.commit([scribe.change()])
    scribe.reserves(ann)
    await rejected(subject, scribe.change(), good)


async def test_a_count_that_disagrees_with_its_events_is_rejected(subject: Subject) -> None:
    scribe, good = await two(subject)
    scribe.available += 1
    scribe.reserves(user())
    await rejected(subject, scribe.change(), good)


async def test_an_early_expiry_is_rejected(subject: Subject) -> None:
    scribe, good = await two(subject)
    hold = scribe.reserves(user())
    await subject.ledger.commit([scribe.change()])
    scribe.expires(hold, ms=HOLD_MS - 1)
    await rejected(subject, scribe.change(), good)


async def test_a_purchase_at_the_deadline_is_rejected(subject: Subject) -> None:
    scribe, good = await two(subject)
    hold = scribe.reserves(user())
    await subject.ledger.commit([scribe.change()])
    scribe.purchases(hold, ms=HOLD_MS)
    await rejected(subject, scribe.change(), good)


async def test_a_purchase_id_that_exists_is_rejected(subject: Subject) -> None:
    scribe, good = await two(subject)
    purchase_id = scribe.purchases(scribe.reserves(user()))
    await subject.ledger.commit([scribe.change()])
    scribe.purchases(scribe.reserves(user(), ms=2), ms=3)
    change = scribe.change()
    reserved, purchased = change.events
    assert isinstance(purchased, Purchased)
    twice = msgspec.structs.replace(purchased, purchase_id=purchase_id)
    await rejected(subject, Change(change.drop_id, 1, 3, [reserved, twice], []), good)


async def test_a_rejected_batch_can_be_sent_again_without_its_bad_part(subject: Subject) -> None:
    scribe, good = await two(subject)
    scribe.purchases(Hold(ReservationId(new_id()), scribe.drop_id, user(), 1, at(0), at(HOLD_MS)))
    with pytest.raises(Rejected):
        await subject.ledger.commit([scribe.change(), good])
    assert await subject.ledger.commit([good]) == {good.drop_id}


# Taking over --------------------------------------------------------------------------------------------


async def test_taking_over_fences_the_old_epoch_off(subject: Subject) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    record = (await subject.ledger.take_over([scribe.drop_id]))[0]
    assert record.epoch == 2
    scribe.reserves(user())
    old = scribe.change()
    assert await subject.ledger.commit([old]) == frozenset()
    new = Change(scribe.drop_id, 2, old.from_seq, old.events, [])
    assert await subject.ledger.commit([new]) == {scribe.drop_id}
    assert (await subject.ledger.take_over([scribe.drop_id]))[0].epoch == 3


async def test_taking_over_everything_leaves_out_what_can_not_change_by_itself(subject: Subject) -> None:
    statuses = [*DropStatus, DropStatus.ENDED]
    scribes = [Scribe() for _ in statuses]
    await subject.ledger.commit([scribe.birth(status) for scribe, status in zip(scribes, statuses, strict=True)])
    scribes[-1].reserves(user())
    await subject.ledger.commit([scribes[-1].change()])
    taken = {record.terms.id for record in await subject.ledger.take_over(None)}
    assert taken == {
        scribe.drop_id
        for scribe, status in zip(scribes[:-1], statuses, strict=False)
        if status not in (DropStatus.ENDED, DropStatus.CANCELLED)
    } | {scribes[-1].drop_id}


async def test_taking_over_by_name_takes_any_drop_and_leaves_out_the_unknown(subject: Subject) -> None:
    ended, other = Scribe(), Scribe()
    await subject.ledger.commit([ended.birth(DropStatus.ENDED), other.birth()])
    unknown = Scribe()
    records = await subject.ledger.take_over([unknown.drop_id, ended.drop_id])
    assert [record.terms.id for record in records] == [ended.drop_id]
    (untouched,) = await subject.ledger.take_over([other.drop_id])
    assert untouched.epoch == 2


async def test_a_drop_is_reclaimed_once_from_the_epoch_that_was_ours(subject: Subject) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    hold = scribe.reserves(user())
    await subject.ledger.commit([scribe.change()])
    record = await subject.ledger.reclaim(scribe.drop_id, 1)
    assert record is not None
    assert (record.epoch, record.holds) == (2, [hold])
    assert await subject.ledger.reclaim(scribe.drop_id, 1) is None
    assert await subject.ledger.reclaim(Scribe().drop_id, 1) is None


async def test_a_drop_that_a_rival_took_is_not_reclaimed(subject: Subject) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    await subject.rival_takes(scribe.drop_id)
    assert await subject.ledger.reclaim(scribe.drop_id, 1) is None
    assert (await load(subject, scribe)).epoch == 3, "the rival's is untouched"


# Doubt --------------------------------------------------------------------------------------------------


async def in_doubt(subject: Subject, batch: Sequence[Change], *, committed: bool) -> None:
    await subject.lose_next(after_commit=committed)
    with pytest.raises(InDoubt):
        await subject.ledger.commit(batch)


@pytest.mark.parametrize("committed", [True, False])
async def test_a_doubt_is_resolved_to_the_truth(subject: Subject, committed: bool) -> None:
    scribe, other = Scribe(), Scribe()
    await born(subject, scribe, other)
    scribe.reserves(user())
    other.reserves(user())
    batch = [scribe.change(), other.change()]
    await in_doubt(subject, batch, committed=committed)
    assert await subject.ledger.resolve(batch) == {
        scribe.drop_id: Resolution(committed, 2),
        other.drop_id: Resolution(committed, 2),
    }
    # The old batch can't come any more, and the new epoch goes on.
    assert await subject.ledger.commit(batch) == frozenset()
    record = await load(subject, scribe)
    assert counts(record) == ((9, 1, 0, 2) if committed else (10, 0, 0, 1))


async def test_the_new_epoch_of_a_resolution_goes_on(subject: Subject) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    batch = [scribe.change()]
    await in_doubt(subject, batch, committed=False)
    resolution = (await subject.ledger.resolve(batch))[scribe.drop_id]
    assert resolution.epoch is not None
    retry = [Change(scribe.drop_id, resolution.epoch, 1, batch[0].events, [])]
    assert await subject.ledger.commit(retry) == {scribe.drop_id}


@pytest.mark.parametrize("committed", [True, False])
async def test_a_doubt_about_receipts_alone_is_resolved_to_the_truth(subject: Subject, committed: bool) -> None:
    scribe, caller = Scribe(), user()
    await born(subject, scribe)
    batch = [scribe.change(receipt(caller, "k"), receipt(caller, "l"))]
    await in_doubt(subject, batch, committed=committed)
    assert await subject.ledger.resolve(batch) == {scribe.drop_id: Resolution(committed, 2)}
    assert (await subject.receipt(caller, "reserve", "l") is not None) is committed


@pytest.mark.parametrize("committed", [True, False])
async def test_a_doubt_about_a_birth_is_resolved_to_the_truth(subject: Subject, committed: bool) -> None:
    scribe = Scribe()
    batch = [scribe.birth()]
    await in_doubt(subject, batch, committed=committed)
    expected = Resolution(True, 2) if committed else Resolution(False, None)
    assert await subject.ledger.resolve(batch) == {scribe.drop_id: expected}
    assert len(await subject.ledger.take_over([scribe.drop_id])) == committed


@pytest.mark.parametrize("committed", [True, False])
async def test_a_drop_that_a_rival_took_is_lost_but_the_truth_is_known(subject: Subject, committed: bool) -> None:
    scribe, birth = Scribe(), Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    batch = [scribe.change()]
    await in_doubt(subject, batch, committed=committed)
    await subject.rival_takes(scribe.drop_id)
    assert await subject.ledger.resolve(batch) == {scribe.drop_id: Resolution(committed, None)}

    batch = [birth.birth()]
    await in_doubt(subject, batch, committed=committed)
    if committed:
        await subject.rival_takes(birth.drop_id)
    assert await subject.ledger.resolve(batch) == {birth.drop_id: Resolution(committed, None)}


async def test_a_rivals_own_writes_are_not_taken_for_ours(subject: Subject) -> None:
    scribe, caller = Scribe(), user()
    await born(subject, scribe)
    hold = scribe.reserves(user())
    batch = [scribe.change()]
    await in_doubt(subject, batch, committed=False)
    rivals = (await subject.ledger.take_over([scribe.drop_id]))[0]
    theirs = Change(scribe.drop_id, rivals.epoch, 1, batch[0].events, [receipt(caller, "k")])
    assert await subject.ledger.commit([theirs]) == {scribe.drop_id}
    assert await subject.ledger.resolve(batch) == {scribe.drop_id: Resolution(False, None)}
    assert (await load(subject, scribe)).holds == [hold]


async def test_a_drop_that_stands_still_can_be_resolved_too(subject: Subject) -> None:
    # How a registry asks whether a drop is still its own.
    scribe = Scribe()
    await born(subject, scribe)
    standing = Change(scribe.drop_id, 1, 1, [], [])
    assert await subject.ledger.resolve([standing]) == {scribe.drop_id: Resolution(False, 2)}
    assert await subject.ledger.resolve([standing]) == {scribe.drop_id: Resolution(False, None)}


# Cancellation -------------------------------------------------------------------------------------------


async def test_a_cancelled_caller_starts_nothing_and_stops_nothing(subject: Subject) -> None:
    scribe = Scribe()
    await born(subject, scribe)
    scribe.reserves(user())
    change = scribe.change()
    with trio.CancelScope() as scope:
        scope.cancel()
        await subject.ledger.commit([change])
    assert scope.cancelled_caught
    assert counts(await load(subject, scribe)) == (10, 0, 0, 1)

    hits: list[frozenset[str]] = []

    async def commit() -> None:
        hits.append(frozenset(await subject.ledger.commit([Change(scribe.drop_id, 2, 1, change.events, [])])))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(commit)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert hits == [{scribe.drop_id}]
    assert counts(await load(subject, scribe)) == (9, 1, 0, 2)
