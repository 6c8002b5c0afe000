"""Every deliberate bug is caught, by each test that is meant to; and whoever says so can be believed."""

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import msgspec
import pytest

from tests.proof.canaries import SWITCH, hunt
from tests.proof.canaries.flock import FLOCK, Trap
from tests.proof.canaries.hunt import Catch, Flight, Said
from tests.proof.canaries.surgery import Moved, edit, reword, wrap


def test_every_canary_is_caught_by_all_of_its_traps_for_the_right_reason(
    record_property: Callable[[str, object], None],
) -> None:
    flights = hunt.hunt(list(FLOCK))
    found = hunt.table(flights)
    print(found)
    record_property("canaries", msgspec.json.encode(flights).decode())
    assert all(flight.is_caught for flight in flights), found


# Who says so --------------------------------------------------------------------------------------------

TRAP = Trap("tests/test_x.py::test_y", "I3: .* is not there")


@pytest.mark.parametrize(
    ("said", "is_caught"),
    [
        (Said("some words\nE   I3: it is not there\nmore", 1.0), True),
        (Said("E   I4: it is there", 1.0), False),  # red for another reason
        (Said("I3: it is not there", 1.0, has_run=False), False),
        (Said(None, 1.0), False),
    ],
)
def test_trap_has_caught_what_it_is_red_for(said: Said, is_caught: bool) -> None:
    catch = hunt._judged(TRAP, said)
    assert catch.is_caught is is_caught
    assert not is_caught or catch.said == "I3: it is not there"


CAUGHT = Catch("here", True, "I3", 1.0)
MISSED = Catch("there", False, "noticed nothing", 1.0)


@pytest.mark.parametrize(
    ("catches", "songs", "is_caught", "fate"),
    [
        ([CAUGHT], 1, True, "caught"),
        ([CAUGHT, MISSED], 1, False, "SURVIVED"),  # a net with a hole in it
        ([CAUGHT], 0, False, "DID NOT SING"),  # red, and it can't have been this bug's doing
        ([], 1, False, "SURVIVED"),
    ],
)
def test_canary_is_caught_if_it_sang_and_every_trap_has_it(
    catches: list[Catch], songs: int, is_caught: bool, fate: str
) -> None:
    flight = Flight("clamp", catches, songs, 1.0)
    assert flight.is_caught is is_caught
    assert hunt.table([flight]).startswith(f"clamp: {fate}")


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("test_a_drop_is_born_once", "noticed nothing"),
        ("test_that_nobody_wrote", "it did not run: there is no such test"),
    ],
)
def test_test_that_is_content_and_one_that_is_not_there_have_caught_nothing(test: str, said: str) -> None:
    flight = hunt.hunt_one("clamp", [Trap("tests/engine/test_drop.py::" + test, ".")])
    assert [(catch.is_caught, catch.said) for catch in flight.catches] == [(False, said)]
    assert not flight.is_caught


# How they are planted -----------------------------------------------------------------------------------


class Subject:
    """What is operated on here."""

    LIMIT = 3

    def is_full(self, count: int) -> bool:
        return count >= self.LIMIT

    @classmethod
    def made(cls) -> str:
        return f"by {cls.__name__}"


@pytest.fixture
def subject() -> type[Subject]:
    return type("Copy", (Subject,), dict(vars(Subject)))


def test_edit_changes_what_it_names(subject: type[Subject]) -> None:
    edit(subject, "is_full", ("count >= self.LIMIT", "count > self.LIMIT"))
    edit(subject, "made", ("by ", "not by "))
    assert not subject().is_full(3)
    assert subject().is_full(4)
    assert subject.made() == "not by Copy"
    assert Subject().is_full(3)


@pytest.mark.parametrize(
    ("name", "old"),
    [("is_full", "count >= self.MAX"), ("is_full", "count"), ("is_empty", "count >= self.LIMIT")],
    ids=["not there", "there twice", "no such method"],
)
def test_edit_of_what_has_moved_is_refused_and_changes_nothing(subject: type[Subject], name: str, old: str) -> None:
    with pytest.raises(Moved):
        edit(subject, name, (old, "count"))
    assert subject().is_full(3)


def test_statement_that_has_moved_is_refused() -> None:
    texts = {b"write": "WHERE epoch = $1 AND seq = $2"}
    with pytest.raises(Moved):
        reword(texts, b"write", ("epoch = $1 AND ", "", 2))
    assert texts == {b"write": "WHERE epoch = $1 AND seq = $2"}
    reword(texts, b"write", ("epoch = $1 AND ", "", 1))
    assert texts == {b"write": "WHERE seq = $2"}


def test_function_that_has_moved_is_not_wrapped() -> None:
    module = SimpleNamespace(__name__="module", ask=lambda: 1)
    wrap(module, "ask", lambda ask: lambda: ask() + 1)
    assert module.ask() == 2
    with pytest.raises(Moved):
        wrap(module, "answer", lambda answer: answer)


@pytest.mark.parametrize(
    "command",
    [
        ["tests.proof.canaries", "serve"],
        ["tests.proof.canaries", "seeds", "."],
        ["pytest", "tests/engine/test_clock.py"],
    ],
    ids=["server", "simulation", "tests"],
)
def test_unknown_canary_stops_whatever_should_have_it(command: list[str]) -> None:
    environment = {**os.environ, SWITCH: "nightingale"}
    ended = subprocess.run(
        [sys.executable, "-m", *command], env=environment, cwd=hunt.ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode != 0
    assert "there is no canary 'nightingale', only synchronous_commit_off, " in ended.stdout + ended.stderr


def test_process_without_a_canary_does_not_even_import_one() -> None:
    said = "import tests.conftest, sys; print(any('canaries.' in name for name in sys.modules))"
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    ended = subprocess.run(
        [sys.executable, "-c", said], env=environment, cwd=hunt.ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout == "False\n", ended.stderr
