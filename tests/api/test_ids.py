"""Ids: UUIDv7 to the bit."""

import random
import uuid

from hypothesis import given, settings
from hypothesis import strategies as st

from api import schemas
from api.ids import AT_ONCE, IdSource
from engine.model import Instant


def test_id_is_48_bits_of_time_then_version_12_bits_variant_62_bits() -> None:
    zeros = IdSource(lambda: Instant(0x0190_A3C4_0001), bits=lambda count: 0)
    ones = IdSource(lambda: Instant(0x0190_A3C4_0001), bits=lambda count: (1 << count) - 1)

    assert zeros.new() == "0190a3c4-0001-7000-8000-000000000000"
    assert ones.new() == "0190a3c4-0001-7fff-bfff-ffffffffffff"


@settings(deadline=None)
@given(st.integers(0, 2**48 - 1), st.integers(), st.integers(1, 3 * AT_ONCE))
def test_every_id_is_a_uuid_of_version_7_that_carries_its_instant(now: int, seed: int, count: int) -> None:
    ids = IdSource(lambda: Instant(now), random.Random(seed).getrandbits)
    made = [ids.new() for _ in range(count)][-1]

    parsed = uuid.UUID(made)
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    assert parsed.int >> 80 == now
    assert str(parsed) == made == schemas.uuid_or_none(made)


def test_every_bit_that_is_left_to_chance_is_taken_from_it() -> None:
    ids = IdSource(lambda: Instant(0), random.Random(7).getrandbits)
    made = [uuid.UUID(ids.new()).int for _ in range(10 * AT_ONCE)]

    ever_set, always_set = 0, 2**128 - 1
    for number in made:
        ever_set, always_set = ever_set | number, always_set & number
    fixed = 0x7000_8000_0000_0000_0000  # version and variant
    assert always_set == fixed
    assert ever_set == fixed | 0x0FFF_3FFF_FFFF_FFFF_FFFF


def test_ids_carry_the_instant_at_which_each_was_made() -> None:
    instants = iter([5, 5, 6, 300, 300])
    ids = IdSource(lambda: Instant(next(instants)))

    assert [uuid.UUID(ids.new()).int >> 80 for _ in range(5)] == [5, 5, 6, 300, 300]


def test_ids_of_a_later_millisecond_sort_after_all_earlier_ones() -> None:
    now = 1_767_780_000_000
    early = IdSource(lambda: Instant(now))
    late = IdSource(lambda: Instant(now + 1))

    assert max(early.new() for _ in range(100)) < min(late.new() for _ in range(100))


def test_ids_of_one_millisecond_differ() -> None:
    ids = IdSource(lambda: Instant(1_767_780_000_000))

    assert len({ids.new() for _ in range(10_000)}) == 10_000


def test_two_sources_do_not_make_the_same_ids() -> None:
    one, other = IdSource(lambda: Instant(0)), IdSource(lambda: Instant(0))

    assert {one.new() for _ in range(100)}.isdisjoint(other.new() for _ in range(100))


def test_seeded_source_makes_the_same_ids_again() -> None:
    once, again = (IdSource(lambda: Instant(0), random.Random(7).getrandbits) for _ in range(2))

    assert [once.new() for _ in range(5)] == [again.new() for _ in range(5)]
