"""Harmed frames, packets and openings: the server says what is wrong, or good-bye, and nobody else notices."""

from tests.proof.fuzz import campaign, frames, rfc6455
from tests.proof.fuzz.arena import Arena
from tests.proof.fuzz.conftest import AT_MOST_S, CASES
from tests.proof.fuzz.rfc6455 import CLOSE, CONTINUATION, PING, TEXT, frame


def test_viewers_that_break_every_rule_are_told_so_and_hurt_nobody(stage: Arena, seed: int) -> None:
    report = campaign.run(stage, frames.TARGET, seed, CASES, at_most_s=AT_MOST_S)
    assert report.is_good, report.told()
    met = set(report.labels)
    assert {"live: 1000", "live: 1002", "live: 1007", "socketio: 1008", "polling: 400", "opening: 200"} <= met


def test_reading_of_frames_is_that_of_the_rfc() -> None:
    def ends(data: bytes) -> set[int]:
        return rfc6455.read(data, 100).codes

    assert rfc6455.read(frame(TEXT, b"a", fin=False) + frame(PING, b"p") + frame(CONTINUATION, b"b"), 100) == (
        [b"ab"],
        [b"p"],
        set(),
        set(),
    )
    assert ends(frame(TEXT, b"x" * 100)) == set()
    assert ends(frame(TEXT, b"x" * 101)) == {1009}
    assert ends(frame(TEXT, b"\xc3")) == {1007}
    assert ends(frame(TEXT, b"\xed\xa0", fin=False)) == set()
    assert ends(frame(TEXT, b"\xed\xa0", fin=False) + frame(CONTINUATION, b"\x80", fin=False)) == {1007}
    assert ends(frame(TEXT, b"\xed\xa0")) == ends(frame(TEXT, b"\xe0\x80", fin=False)) == {1007}
    assert ends(frame(TEXT, b"x", mask=None)) == {1002}
    assert ends(frame(PING, b"x" * 126)) == {1002}
    assert ends(frame(CLOSE, b"\x03\xe8")) == {1000}
    assert ends(frame(CLOSE, b"\x03\xed")) == {1002}
