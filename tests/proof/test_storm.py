"""Three hundred people want fifty units: each unit goes to one of them, and nobody is told anything untrue."""

import random
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime

import psycopg
import pytest
import trio

from tests.proof import checker, checks, recorder
from tests.proof.clients import Answer, Exchange, History, Shop, User
from tests.proof.conftest import Postgres, StartEngine, until
from tests.server import Server, serving

TTL_S = 1
UNITS = 50


async def test_storm_of_300_users_on_50_units_sells_each_unit_once_and_refuses_honestly(
    database: str, engine: StartEngine, rng: random.Random
) -> None:
    server = engine(database, RESERVATION_TTL_SECONDS=str(TTL_S))
    shop = Shop(server.port)
    drop_id = await shop.new_drop(UNITS)
    users = await shop.users(300)
    plans = [(user, rng.random() < 0.3, [rng.uniform(0, 0.9) for _ in range(4)]) for user in users]

    async def want(user: User, is_buyer: bool, pauses: list[float]) -> None:
        for pause_s in pauses:
            held = await user.reserve(drop_id)
            await trio.sleep(pause_s)
            if held.status == 201 and is_buyer:
                await user.purchase(drop_id)
                return

    async with trio.open_nursery() as nursery:
        for plan in plans:
            nursery.start_soon(want, *plan)
    await until(lambda: checks.number(database, "SELECT sum(held_count) FROM drops") == 0)

    history = shop.history
    print(history.codes())
    assert {exchange.code for exchange in history.exchanges} <= {
        "",
        "OUT_OF_STOCK",
        "ALREADY_RESERVED",
        "RESERVATION_EXPIRED",
    }
    assert history.of("reserve", 409, "OUT_OF_STOCK"), "it was no storm"
    assert checks.violations(database) == []
    assert checks.lost_or_made_up(database, history) == []
    assert checks.dishonest(database, history) == []
    assert checks.out_of_order(database, history) == []
    recording = recorder.recording(
        recorder.operations_of(history.exchanges), database, ttl_ms=TTL_S * 1000, given={drop_id: 1}
    )
    assert [str(violation) for violation in checker.check(recording, clock_slack_ms=100)] == []
    sold = len(history.of("purchase", 201))
    assert 0 < sold <= UNITS
    assert await shop.available(drop_id) == UNITS - sold
    for exchange in history.of("reserve", 201):
        assert exchange.answer is not None
        hold = exchange.answer.data["reservation"]
        lasted = datetime.fromisoformat(hold["expires_at"]) - datetime.fromisoformat(hold["created_at"])
        assert lasted.total_seconds() == TTL_S


@pytest.fixture(scope="module")
def patient(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose holds last longer than any test."""
    log_path = tmp_path_factory.mktemp("patient") / "engine.log"
    with (
        postgres.new_database() as name,
        serving(postgres.server.dsn_of(name), log_path, LOG_LEVEL="WARNING") as server,
    ):
        yield server


async def test_same_user_twenty_times_at_once_gets_one_reservation(patient: Server) -> None:
    shop = Shop(patient.port)
    drop_id = await shop.new_drop(UNITS)
    (user,) = await shop.users(1)
    twins = [user.twin() for _ in range(20)]
    async with trio.open_nursery() as nursery:
        for twin in twins:
            nursery.start_soon(twin.get, "/me")  # so that all are connected when it starts
    async with trio.open_nursery() as nursery:
        for twin in twins:
            nursery.start_soon(twin.reserve, drop_id)
    answers = Counter((exchange.status, exchange.code) for exchange in shop.history.exchanges)
    assert answers == {(201, ""): 1, (409, "ALREADY_RESERVED"): 19}
    assert await shop.available(drop_id) == UNITS - 1
    assert checks.violations(patient.dsn) == []
    assert checks.lost_or_made_up(patient.dsn, shop.history, drop_ids=[drop_id]) == []


async def test_last_unit_wanted_by_a_hundred_at_once_goes_to_one(patient: Server) -> None:
    shop = Shop(patient.port)
    drop_id = await shop.new_drop(1)
    users = await shop.users(100)
    async with trio.open_nursery() as nursery:
        for user in users:
            nursery.start_soon(user.reserve, drop_id)
    answers = Counter((exchange.status, exchange.code) for exchange in shop.history.exchanges)
    assert answers == {(201, ""): 1, (409, "OUT_OF_STOCK"): 99}
    assert await shop.available(drop_id) == 0
    assert checks.violations(patient.dsn) == []
    assert checks.dishonest(patient.dsn, shop.history) == []


async def test_checks_of_this_package_see_what_is_planted(patient: Server) -> None:
    shop = Shop(patient.port)
    drop_id = await shop.new_drop(2)
    (holder,) = await shop.users(1)
    held = await holder.reserve(drop_id)
    dsn, now = patient.dsn, time.time()
    lie = Answer(409, {}, b'{"error": {"code": "OUT_OF_STOCK"}}')
    refused = Exchange("nobody", "reserve", drop_id, None, now + 1, now + 2, lie)

    assert len(checks.dishonest(dsn, History([held, refused]))) == 1, "a unit is free"
    assert checks.lost_or_made_up(dsn, History([held]), drop_ids=[drop_id]) == []
    (made_up,) = checks.lost_or_made_up(dsn, History([]), drop_ids=[drop_id])
    assert made_up.startswith("made up")
    move = "UPDATE reservations SET id = %s WHERE id = %s"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(move, (drop_id, held.made))
        try:
            lost, made_up = checks.lost_or_made_up(dsn, History([held]), drop_ids=[drop_id])
            assert lost.startswith("lost")
            assert made_up.startswith("made up")
            assert checks.violations(dsn) != [], "the log tells of another reservation"
        finally:
            connection.execute(move, (held.made, drop_id))
    assert checks.violations(dsn) == []
