"""The benchmark itself: it counts rightly, sees what is wrong, and tells it. Against a stub that can be made to err."""

import base64
import itertools
import re
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from api.viewers import frame
from tests.bench import audience, frames, generator, goals, report, viewers
from tests.bench.__main__ import WRONG, main
from tests.bench.job import Job, Plan, Server, Users, requests_of, schedule_of
from tests.bench.results import FORMAT, Audit, Load, Moment, Report, Run, latency_of, new_histogram, together
from tests.ports import free_port

DROP = "0190a5a0-0000-7000-8000-000000000001"
OTHER_DROP = "0190a5a0-0000-7000-8000-000000000002"
TOTAL = 1_000
USERS = Users("0123456789abcdef0123")

Answer = Callable[[int, str, str], bytes | None]
"""From the request's number, its first line and its user: the bytes of the answer, or None to hang up."""


class Stub(socketserver.ThreadingTCPServer):
    """Answers each request with what `answer` says; a request's number counts from 0 over all connections."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.numbers = itertools.count()
        self.is_split = False
        super().__init__(("127.0.0.1", free_port()), _Conversation)

    @property
    def server(self) -> Server:
        return Server("127.0.0.1", self.server_address[1])


class _Conversation(socketserver.StreamRequestHandler):
    server: Stub

    def handle(self) -> None:
        while line := self.rfile.readline().decode():
            headers = dict(header.rstrip("\r\n").split(": ", 1) for header in self._header_lines())
            self.rfile.read(int(headers.get("content-length", 0)))
            said = self.server.answer(next(self.server.numbers), line.strip(), headers.get("x-user-id", ""))
            if said is None:
                return
            half = len(said) // 2 if self.server.is_split else len(said)
            for part in (said[:half], said[half:]):
                self.wfile.write(part)
                self.wfile.flush()
                if self.server.is_split:
                    time.sleep(0.002)

    def _header_lines(self) -> Iterator[str]:
        while (line := self.rfile.readline().decode()).strip():
            name, _, value = line.partition(": ")
            yield f"{name.lower()}: {value}"


@contextmanager
def stub(answer: Answer) -> Iterator[Stub]:
    with Stub(answer) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()


def http(status: int, body: Any, *more: str) -> bytes:
    encoded = msgspec.json.encode(body)
    head = "\r\n".join((f"HTTP/1.1 {status} x", f"content-length: {len(encoded)}", *more))
    return f"{head}\r\n\r\n".encode() + encoded


def reserved(number: int, user: str, **wrong: Any) -> bytes:
    hold = {
        "id": f"0190a5a0-0000-7000-8000-{number:012x}",
        "drop_id": DROP,
        "user_id": user,
        "status": "active",
        "expires_at": "2026-01-07T10:01:00.000Z",
        "created_at": "2026-01-07T10:00:00.000Z",
    }
    stock = {"id": DROP, "available_stock": wrong.pop("available_stock", TOTAL - 1 - number)}
    return http(201, {"success": True, "data": {"reservation": hold | wrong, "drop": stock}, "meta": {}})


def refused(status: int, code: str) -> bytes:
    return http(status, {"success": False, "error": {"code": code, "message": "no"}})


def job(running: Stub, **more: Any) -> Job:
    """40 users who reserve, over 4 connections; all are done long before the time is over."""
    plan = {"first_user": 0, "users": 40, "requests": 40, "drops": (DROP,), **more.pop("plan", {})}
    wanted = {"connections": 4, "seconds": 5.0, "warm_up_s": 0.0, "expected": "201", "total_stock": TOTAL}
    return Job(**{"server": running.server, "users": USERS, "plan": Plan(**plan), **wanted, **more})


def load_of(answer: Answer, **more: Any) -> Load:
    with stub(answer) as running:
        return generator.run(job(running, **more))


def test_right_answers_are_counted_and_none_is_wrong() -> None:
    load = load_of(lambda number, line, user: reserved(number, user))
    assert (load.sent, load.lost, load.failed) == (40, 0, 0)
    assert load.all_answers == {"201": 40}
    assert load.checked == {"whole": 40, "holds name drop and user, and are new": 40}
    assert load.ran_out
    assert len(base64.b64decode(load.reservation_ids)) == 40 * 16
    # The window ends with the last request that was there; up to 3 answers were still under way.
    assert 36 <= load.done == sum(moment.answers for moment in load.over_time) <= 40
    assert 0 < load.latency.p50_ms <= load.latency.max_ms


def test_answer_that_comes_in_pieces_is_one_answer() -> None:
    with stub(lambda number, line, user: reserved(number, user)) as running:
        running.is_split = True
        load = generator.run(job(running))
    assert (load.all_answers, load.failed) == ({"201": 40}, 0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"drop_id": OTHER_DROP}, f"the answer names drop {OTHER_DROP}"),
        ({"user_id": DROP}, f"the answer names user {DROP}"),
        ({"id": "0190a5a0-0000-7000-8000-000000000000"}, "was given before"),
        ({"status": "expired"}, "the hold is expired"),
        ({"available_stock": TOTAL}, f"{TOTAL} units available of {TOTAL}"),
        ({"available_stock": -1}, f"-1 units available of {TOTAL}"),
    ],
)
def test_wrong_reservation_is_seen(wrong: dict[str, Any], said: str) -> None:
    load = load_of(lambda number, line, user: reserved(number, user, **(wrong if number == 20 else {})))
    # The id of 0 is the one that is given again; it counts once, whichever of the two came first.
    assert load.failed == 1
    assert said in load.failures[0]
    assert load.all_answers == {"201": 39, "201 wrong": 1}


def test_other_refusal_than_the_expected_one_is_wrong() -> None:
    load = load_of(lambda number, line, user: refused(409, "OUT_OF_STOCK") if number == 7 else reserved(number, user))
    assert load.failed == 1
    assert "409 OUT_OF_STOCK, where 201 was expected" in load.failures[0]


def test_sold_out_scenario_takes_nothing_else_for_right() -> None:
    load = load_of(lambda number, line, user: refused(409, "OUT_OF_STOCK"), expected="409 OUT_OF_STOCK")
    assert (load.failed, load.all_answers) == (0, {"409 OUT_OF_STOCK": 40})
    assert 36 <= load.done <= 40


def test_overload_is_counted_and_neither_done_nor_wrong() -> None:
    load = load_of(lambda number, line, user: refused(503, "OVERLOADED") if number < 10 else reserved(number, user))
    assert load.all_answers == {"201": 30, "503 OVERLOADED": 10}
    assert (load.failed, load.lost) == (0, 0)
    assert load.done <= 30


def test_connection_closed_under_a_request_is_a_lost_answer() -> None:
    load = load_of(lambda number, line, user: None if number == 5 else reserved(number, user))
    assert (load.lost, load.failed, load.sent, load.all_answers) == (1, 1, 40, {"201": 39})
    assert "no answer (the server closed the connection)" in load.failures[0]


def test_answer_with_another_length_than_it_states_is_wrong() -> None:
    def answer(number: int, line: str, user: str) -> bytes:
        right = reserved(number, user)
        return right if number != 39 else right + b"}}"

    load = load_of(answer, connections=1)
    assert load.failed == 1
    assert "the body has" in load.failures[0]


def test_open_loop_counts_from_the_instant_at_which_a_request_was_meant_to_be_sent() -> None:
    def answer(number: int, line: str, user: str) -> bytes:
        if number == 10:
            time.sleep(0.2)
        return reserved(number, user)

    # 100 a second on one connection: while the 11th waits for 200 ms, 20 more are due, and each waits for its turn.
    load = load_of(answer, rate=100.0, arrivals="constant", seconds=0.4, connections=1, connections_max=1)
    assert (load.done, load.failed, load.connections_used) == (40, 0, 1)
    assert load.late >= 15
    assert load.lateness_max_ms > 150
    assert load.latency.max_ms > 190
    assert load.latency.mean_ms > 30  # one slow answer of 40 alone would make 5


def test_open_loop_takes_another_connection_while_one_waits() -> None:
    def answer(number: int, line: str, user: str) -> bytes:
        if number == 10:
            time.sleep(0.2)
        return reserved(number, user)

    load = load_of(answer, rate=100.0, arrivals="constant", seconds=0.4, connections=1, connections_max=8)
    assert (load.done, load.failed) == (40, 0)
    assert 2 <= load.connections_used <= 8
    assert load.latency.p50_ms < 50


def test_purchase_follows_its_reservation_on_the_same_connection() -> None:
    asked: list[str] = []

    def answer(number: int, line: str, user: str) -> bytes:
        asked.append(f"{line.split('/')[-2].split(' ')[0]} {user}")
        return reserved(len(asked), user) if "/reserve " in line else refused(409, "RESERVATION_REQUIRED")

    load = load_of(answer, connections=1, plan={"users": 3, "requests": 3, "is_bought": True})
    users = USERS.ids(0, 3)
    assert asked == [f"{step} {user}" for user in users for step in ("reserve", "purchase")]
    assert load.failed == 3


def test_replay_must_be_the_first_answer_byte_for_byte() -> None:
    given: dict[str, int] = {}

    def answer(number: int, line: str, user: str, *, is_wrong: bool) -> bytes:
        if user not in given:
            given[user] = number
            return reserved(number, user)
        again = reserved(given[user], user, status="active" if not is_wrong else "ACTIVE")
        return again.replace(b"\r\n", b"\r\nIdempotency-Replayed: true\r\n", 1)

    for is_wrong in (False, True):
        given.clear()
        load = load_of(
            lambda number, line, user, is_wrong=is_wrong: answer(number, line, user, is_wrong=is_wrong),  # type: ignore[misc]
            connections=1,
            plan={"keys": "k", "twice": 0.5},
        )
        replays = load.all_answers["201"] - 40
        assert 5 < replays < 35
        assert load.failed == (replays if is_wrong else 0)
        assert load.checked.get("replays are the first answer", 0) == (0 if is_wrong else replays)


def test_many_drops_are_wanted_by_zipf_and_each_user_asks_once() -> None:
    drops = tuple(f"0190a5a0-0000-7000-8000-{number:012x}" for number in range(100))
    with stub(lambda number, line, user: None) as running:
        requests, _ = requests_of(job(running, plan={"users": 10_000, "requests": 10_000, "drops": drops}))
    wanted = [sum(f"/drops/{drop}/".encode() in request for request in requests) for drop in drops[:10]]
    # The sum of 1/k up to 100 is 5.187.
    assert wanted[0] == pytest.approx(10_000 / 5.187, rel=0.1)
    assert wanted[0] / wanted[9] == pytest.approx(10, rel=0.3)
    assert len(set(requests)) == 10_000


def test_schedule_has_the_rate_and_repeats_with_its_seed() -> None:
    assert schedule_of(4.0, 1.0, "constant", 1) == [0.0, 0.25, 0.5, 0.75]
    poisson = schedule_of(1_000.0, 2.0, "poisson", 7)
    assert len(poisson) == pytest.approx(2_000, rel=0.1)
    assert poisson == sorted(poisson)
    assert 0 < poisson[0] < poisson[-1] < 2.0
    assert poisson == schedule_of(1_000.0, 2.0, "poisson", 7) != schedule_of(1_000.0, 2.0, "poisson", 8)


# --- results -----------------------------------------------------------------------------------------


def stored(per_s: int = 1_000, **more: Any) -> Load:
    histogram = new_histogram()
    for ms in range(1, 101):
        histogram.record_value(ms * 1_000)
    wanted = {
        "began_at": 0.0, "seconds": 1.0, "done": per_s, "answers": {"201": per_s}, "all_answers": {"201": per_s},
        "sent": per_s, "lost": 0, "late": 0, "lateness_max_ms": 0.0, "connections_used": 64, "ran_out": False,
        "latency": latency_of(histogram), "bucket_s": 0.5,
        "over_time": [Moment(0.0, per_s // 2, 1.0, 2.0), Moment(0.5, per_s // 2, 1.5, 3.0)],
        "stock": [(0.0, 100), (0.5, 50)], "cpu_s": {"generator": 0.2, "server": 0.6, "postgres": 0.2, "machine": 1.5},
        "rss_bytes": (0, 512 * per_s), "checked": {"whole": per_s}, "failed": 0, "failures": [], "figures": {},
    }  # fmt: skip
    return Load(**{**wanted, **more})


def run_of(scenario: str, target: str, per_s: int, number: int = 1, **more: Any) -> Run:
    load = stored(per_s, **more)
    return Run(scenario=scenario, target=target, round=number, connections=64, processes=1, load=load)


def report_of(runs: list[Run]) -> Report:
    return Report(
        format=FORMAT, began_at="2026-01-07T10:00:00Z", command="python -m tests.bench <&>", machine={"cores": "2"},
        versions={"python": "3.11"}, settings={"rounds": "1"}, notes=["a note"], runs=runs, goals=goals.of(runs),
        audits=[Audit("holdfast", 19, [])], problems=["<b>a problem</b>"],
    )  # fmt: skip


def test_percentiles_are_those_of_what_was_recorded() -> None:
    latency = stored().latency
    assert (latency.p50_ms, latency.p90_ms, latency.p99_ms) == pytest.approx((50, 90, 99), rel=0.002)
    assert latency.max_ms == pytest.approx(100, rel=0.002)


def test_goal_is_the_median_of_ratios_within_rounds() -> None:
    rounds = enumerate([(900, 100), (890, 100), (1_000, 100)], start=1)
    runs = [run for n, (ours, theirs) in rounds for run in (
        run_of("hot", "holdfast", ours, n), run_of("hot", "classic", theirs, n),
    )]  # fmt: skip
    found = {goal.name: goal for goal in goals.of(runs)}
    classic = found["reserves on one hot drop, to the classic transaction"]
    assert (classic.seen, classic.median, classic.holds) == ([9.0, 8.9, 10.0], 9.0, True)
    assert not msgspec.structs.replace(classic, seen=[8.9]).holds
    memory = found["resident memory of the server, an active hold"]
    assert (memory.median, memory.holds) == (0.5, True)
    assert "1,000 drops, to one hot drop" not in found


def test_figure_of_viewers_is_ours_to_a_rival_of_the_same_round() -> None:
    runs = [
        run_of("viewers 4000", target, 10, figures={"last_ms": last, "server_cpu_us_per_frame": cpu})
        for target, last, cpu in (("holdfast", 20.0, 4.0), ("ws", 40.0, 7.0), ("broadcast", 30.0, 8.0))
    ]
    found = {goal.name: goal for goal in goals.of(runs)}
    last = found["one update to the last of 4,000 viewers, to Node ws"]
    assert (last.seen, last.holds, last.promised) == ([0.5], True, "≤ 0.8 × (far 0.65)")
    assert found["server CPU for a viewer's frame, to broadcast() of websockets"].seen == [0.5]
    assert len(found) == 2


def test_share_of_the_generator_leaves_others_out() -> None:
    run = run_of("hot", "holdfast", 100)
    assert run.generator_share == pytest.approx(0.2)
    assert run.others_cores == pytest.approx(0.5)


def test_reservation_given_to_two_generators_is_wrong() -> None:
    mine, yours = base64.b64encode(bytes(16)).decode(), base64.b64encode(bytes(15) + b"\1").decode()
    assert together([stored(reservation_ids=mine), stored(reservation_ids=yours)]).failed == 0
    both = together([stored(reservation_ids=mine), stored(reservation_ids=mine)])
    assert (both.failed, both.done, both.reservation_ids) == (1, 2_000, "")
    assert both.failures == ["1 reservation ids were given to users of two generators"]


def test_report_is_one_file_that_needs_no_other(tmp_path: Path) -> None:
    runs = [run_of("hot", target, 100) for target in ("holdfast", "classic", "cte")]
    runs += [run_of("rate", "holdfast", 50, figures={"rate": 50.0})]
    runs += [run_of("journey", "holdfast", 10, figures={"held": 9.0})]
    runs += [run_of("viewers 200", "ws", 10, figures={"viewers": 200.0, "last_ms": 1.25})]
    written = msgspec.json.encode(report_of(runs))
    page = report.html(msgspec.json.decode(written, type=Report))
    assert page.count("<svg") == 6
    assert "<text" in page  # words stay words
    assert "<td>Node ws</td><td>1.25</td>" in page
    assert not re.search(r"https?:|//[a-z]|<script|<link|<img|@import|src=", page)
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in page
    assert "&lt;b&gt;a problem&lt;/b&gt;" in page
    report.picture(report_of(runs), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_nothing_can_be_drawn(tmp_path: Path) -> None:
    assert "a note" in report.html(report_of([]))
    report.picture(report_of([]), tmp_path / "picture.png")


# --- viewers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536])
def test_frame_ends_where_its_length_says_however_it_is_cut(size: int) -> None:
    payload = bytes(number % 251 for number in range(size))
    whole = frame(payload)
    for cut in {0, 1, 2, 3, 4, 9, 10, 11, len(whole) // 2, len(whole) - 1} & set(range(len(whole))):
        found, rest = frames.frames_in(whole[:cut])
        assert (found, rest) == ([], whole[:cut])
        assert frames.frames_in(rest + whole[cut:]) == ([(frames.TEXT, payload)], b"")


def test_frames_of_one_receive_are_told_apart_and_the_begun_one_is_kept() -> None:
    whole = frame(b"a" * 200) + b"\x89\x00" + frame(b"") + frame(b"b")
    found = [(frames.TEXT, b"a" * 200), (frames.PING, b""), (frames.TEXT, b""), (frames.TEXT, b"b")]
    assert frames.frames_in(whole) == (found, b"")
    assert frames.frames_in(whole + b"\x81\x7e\x00") == (found, b"\x81\x7e\x00")


def test_masked_frame_is_none_of_a_server() -> None:
    with pytest.raises(ValueError, match="masked"):
        frames.frames_in(frames.said(b"abc"))


def test_number_is_found_behind_its_name() -> None:
    data = b'{"a":{"available_stock":0120},"availableStock":7}'
    assert viewers.number_after(data, b'"availableStock":') == 7
    assert viewers.number_after(data, b'"available_stock":') == 120
    assert viewers.number_after(data, b'"seq":') is None
    assert viewers.number_after(b'{"seq":null}', b'"seq":') is None


def test_numbers_of_viewers_make_scenarios() -> None:
    assert audience.expanded("viewers", (200, 4_000)) == ["viewers 200", "viewers 4000"]
    assert audience.expanded("watched", (200, 1_000, 4_000)) == ["watched 0", "watched 1000", "watched 4000"]
    assert audience.expanded("watched", (20,)) == ["watched 0", "watched 20"]
    assert audience.expanded("wire", (20,)) == ["wire 20", "wire 5"]


@pytest.mark.parametrize("name", [audience.BARE, audience.BROADCAST])
def test_rival_tells_each_viewer_each_update_once(tmp_path: Path, name: str) -> None:
    found, versions, _ = audience.rivals()
    assert versions["websockets"]
    with found[name](tmp_path) as target:
        load = audience.passes(target, USERS, 20, 0.3, 180)
    assert load.failures == []
    assert load.done >= 2
    assert load.checked == {"each viewer had it, once": 20 * load.done}
    assert load.figures["text_bytes"] == 180
    assert 0 < load.figures["middle_ms"] <= load.figures["last_ms"]


# --- the command -------------------------------------------------------------------------------------


def shop(number: int, line: str, user: str, *, is_lying: bool) -> bytes:
    """As much of a shop as `hot` needs; a lying one gives every reservation to somebody else."""
    if line.startswith("GET"):
        return http(200, {"success": True, "data": {"available_stock": 0}})
    if line.startswith("POST /api/v1/drops HTTP"):
        return http(201, {"success": True, "data": {"id": DROP}})
    return reserved(number, DROP if is_lying else user)


def test_wrong_answers_end_the_command_with_a_sentence_after_the_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with stub(lambda number, line, user: shop(number, line, user, is_lying=True)) as running:
        arguments = ["noop", "--url", f"http://127.0.0.1:{running.server.port}", "--rounds", "1", "--seconds", "0.1"]
        arguments += ["--connections", "2", "--users-max", "50", "--report", str(tmp_path)]
        assert main(arguments) == WRONG
    assert "answers are wrong or missing" in capfd.readouterr().err
    written = msgspec.json.decode((tmp_path / "results.json").read_bytes(), type=Report)
    assert written.problems
    assert (tmp_path / "report.html").exists()


def test_run_whose_requests_end_with_the_warm_up_is_no_result(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with stub(lambda number, line, user: shop(number, line, user, is_lying=False)) as running:
        arguments = ["hot", "--url", f"http://127.0.0.1:{running.server.port}", "--rounds", "1", "--seconds", "0.1"]
        arguments += ["--connections", "2", "--users-max", "20", "--report", str(tmp_path)]
        assert main(arguments) == WRONG
    assert "all requests were used up in the warm-up" in capfd.readouterr().err


def test_url_where_nobody_answers_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["hot", "--url", f"http://127.0.0.1:{free_port()}", "--report", str(tmp_path)]) == 2
    assert re.fullmatch(r"Nobody answers at http://127.0.0.1:\d+/api/v1: .*\n", capfd.readouterr().err)


def test_hot_and_journey_on_a_real_server_are_right_and_pass_the_audit(tmp_path: Path) -> None:
    arguments = ["hot", "journey", "--no-baseline", "--rounds", "1", "--seconds", "0.3", "--connections", "16"]
    arguments += ["--buyers", "60", "--patience", "0.5", "--users-max", "20000", "--report", str(tmp_path)]
    assert main(arguments) == 0
    written = msgspec.json.decode((tmp_path / "results.json").read_bytes(), type=Report)
    assert [run.scenario for run in written.runs] == ["hot", "journey"]
    assert [audit.violations for audit in written.audits] == [[], []]
    hot, journey = (run.load for run in written.runs)
    assert hot.done > 50
    assert hot.checked["stock is what was not given out"] == 1
    assert journey.figures["held"] >= 36
    assert journey.checked["what was not bought is there again"] == 1


def test_viewers_of_a_real_server_have_every_update(tmp_path: Path) -> None:
    arguments = ["viewers", "watched", "stalled", "--viewers", "20", "--no-rivals", "--no-baseline"]
    arguments += ["--rounds", "1", "--seconds", "0.5", "--connections", "8", "--users-max", "8000"]
    assert main([*arguments, "--report", str(tmp_path)]) == 0
    written = msgspec.json.decode((tmp_path / "results.json").read_bytes(), type=Report)
    loads = {run.scenario: run.load for run in written.runs}
    assert list(loads) == ["watched 0", "watched 20", "viewers 20", "stalled 0", "stalled 1"]
    assert [audit.violations for audit in written.audits] == [[], []]
    assert loads["viewers 20"].checked == {"each viewer had it, once": 20 * loads["viewers 20"].done}
    assert loads["viewers 20"].figures["server_cpu_us_per_frame"] > 0
    assert loads["watched 20"].checked["stock is what was not given out"] == 1
    assert loads["watched 20"].checked["viewers in step at the end"] == 20
    assert loads["stalled 0"].checked == {"each viewer heard of each update": 100 * loads["stalled 0"].done}
    assert loads["stalled 1"].checked["the one that never read is told all when it does"] >= 300
