"""A soak of seconds, on a real server: one that is sound, and ones that leak; each must be told from the other."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from persistence.embedded import EmbeddedServer, forget_pg_variables, running
from tests.bench.job import Users
from tests.proof.soak import judgement
from tests.proof.soak.people import Seen
from tests.proof.soak.sampling import Sample
from tests.proof.soak.stage import Options, Stage, audited, stage

RATE = 200.0
SECONDS = 5.0


@pytest.fixture(scope="module")
def durable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A PostgreSQL that keeps what it says: the server is as it would be."""
    forget_pg_variables()
    with running(tmp_path_factory.mktemp("durable")) as postgres:
        yield postgres


def options(fault: str) -> Options:
    return Options(connections=200, people=2_000, viewers=5, fault=fault)


def soaked(on: Stage) -> tuple[Seen, list[Sample]]:
    on.crowd("", 1.0, warm_up_s=1.0, at_once=32)
    seen = on.crowd("", SECONDS, warm_up_s=0.5, rate=RATE)
    return seen, on.sampler.since(seen.began_at, seen.began_at + seen.seconds)


def grown_bytes_per_command(seen: Seen, samples: list[Sample]) -> float:
    return judgement.grown([(one.at, one.rss_bytes) for one in samples]) / sum(seen.answers.values())


def test_a_sound_server_has_no_more_than_before_and_a_leaking_one_has(durable: EmbeddedServer, tmp_path: Path) -> None:
    users = Users("5" * 20)
    with stage(durable, "sound", tmp_path, users, options(""), lambda text: None) as on:
        seen, samples = soaked(on)
        on.rest()
        assert seen.wrong == 0
        assert seen.came == pytest.approx(RATE * SECONDS, rel=0.2)
        assert seen.answers["purchase 201"] > seen.answers["cancel 200"] > 0
        assert seen.answers["reserve 409 OUT_OF_STOCK"] > 0
        held = {verdict.name for verdict in judgement.of_soak(samples) if verdict.holds}
        assert {"descriptors", "threads", "drops", "viewers", "feeds", "timer", "in_flight"} <= held
        assert on.sampler.visitors.came > 5
        assert on.sampler.visitors.turned_out == 0
        assert all(touch.is_served for touch in on.probe.touches)
    assert not on.complaints()
    assert on.target.dsn is not None
    verdicts = judgement.of_tables(on.purchases(), on.seens, on.active(), *audited(on.target.dsn))
    assert all(verdict.holds for verdict in verdicts), verdicts
    with stage(durable, "leaking", tmp_path, users, options("memory"), lambda text: None) as on:
        seen_leaking, samples_leaking = soaked(on)
    assert grown_bytes_per_command(seen_leaking, samples_leaking) > grown_bytes_per_command(seen, samples) + 700


def test_descriptors_that_are_never_closed_are_seen(durable: EmbeddedServer, tmp_path: Path) -> None:
    with stage(durable, "descriptors", tmp_path, Users("6" * 20), options("descriptors"), lambda text: None) as on:
        _, samples = soaked(on)
    verdicts = {verdict.name: verdict.holds for verdict in judgement.of_soak(samples)}
    assert not verdicts["descriptors"]
    assert verdicts["threads"]


def test_holders_who_wait_for_all_the_others_are_seen(durable: EmbeddedServer, tmp_path: Path) -> None:
    with stage(durable, "starved", tmp_path, Users("7" * 20), options("starvation"), lambda text: None) as on:
        seen, samples = soaked(on)
    verdicts = {verdict.name: verdict.holds for verdict in judgement.of_overload(seen, RATE, 1.0, samples)}
    assert seen.answers["purchase 201"] > 100
    assert verdicts["goodput under overload"]
    assert not verdicts["purchases under overload, p99"]
