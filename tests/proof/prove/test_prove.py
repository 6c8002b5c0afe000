"""The long set in small: what was done adds up; whatever is found makes it red, with its seed and how to replay it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import pytest
from rich.console import Console

from tests.proof.canaries.hunt import Catch, Flight
from tests.proof.conftest import wait_for
from tests.proof.faults.tally import Sort, Tally
from tests.proof.fuzz import campaign as fuzzing
from tests.proof.prove import __main__ as prove
from tests.proof.prove import checkout, commands, coverage, document, parts, report
from tests.proof.prove.commands import Ended
from tests.proof.prove.crew import Crew
from tests.proof.prove.figures import FAST, LONG, Figures, Flown, Simulated, SlowSeed, Struck, Violation
from tests.proof.prove.parts import Simulation, Turn, Wanted
from tests.proof.prove.report import Report
from tests.proof.prove.screen import Screen
from tests.proof.prove.sittings import Counted, InUse, Shelf, Sitting, counted, next_seed
from tests.proof.simulation import corpus
from tests.proof.simulation.coverage import feasible
from tests.proof.simulation.seeds import Result

ROOT: Final = Path(__file__).parents[3]
WRONG: Final = 13
DEADLY: Final = 14
ENDLESS: Final = 15
FICKLE: Final = 100


def made_up(seed: int) -> Result:
    """Of 10 operations and half an hour, and each bad seed bad in its way."""
    if seed == DEADLY:
        os._exit(3)
    if seed == ENDLESS:
        time.sleep(600)
    digest = os.urandom(8).hex() if seed == FICKLE else str(seed)
    cell = ("reserve", "live", "none", ">0", "late")
    found = ["I3: lost: a reservation <#7>", "I10: a gap"] if seed == WRONG else []
    return Result(seed, 10, 1_800.0, {"late": 2}, {cell: 3}, found, digest)


@pytest.fixture
def turn() -> Turn:
    return Turn(Figures(), Screen(Console(quiet=True)))


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(2, simulate=made_up) as crew:
        yield crew


def simulate(turn: Turn, crew: Crew, seeds: range) -> tuple[Simulation, dict[int, str]]:
    failing: dict[int, str] = {}
    simulation = Simulation(crew, seeds.start, note_failing=failing.__setitem__)
    simulation.run(turn, Wanted(seeds=len(seeds)))
    return simulation, failing


def sitting(
    commit: str = "aaaa", *, first: int = 0, end: int = 0, figures: Figures | None = None, at: int = 1
) -> Sitting:
    return Sitting(
        began_at=f"2026-01-07T10:00:{at:02}Z",
        seconds=1_800,
        commit=commit,
        is_dirty=False,
        machine={"system": "Linux", "processor": "Z80", "cores": "2", "python": "3.11.7"},
        command="python -m tests.proof.prove",
        first=first,
        end=end,
        is_whole=True,
        figures=figures or Figures(simulated=Simulated(seeds=end - first, operations=10 * (end - first))),
    )


@pytest.fixture(autouse=True)
def _no_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made up has nothing to say of seeds that are kept."""
    monkeypatch.setattr(corpus, "seeds", dict)


# All of it ----------------------------------------------------------------------------------------------


def test_a_small_set_runs_from_end_to_end(tmp_path: Path) -> None:
    options = ["--seeds=4", "--first=100", "--only=simulation,faults", "--faults=0", "--cuts=1", "--kills=0"]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.proof.prove", *options, f"--folder={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    (kept,) = Shelf(tmp_path).sittings()
    figures = kept.figures
    assert (kept.first, kept.end, figures.simulated.seeds, figures.struck.cuts) == (100, 104, 4, 1)
    assert figures.simulated.replayed == 1  # seed 100
    assert figures.simulated.operations > 500
    assert figures.struck.operations > 10
    cells = {tuple(name.split(coverage.JOINT)) for name in figures.simulated.coverage}
    assert cells
    assert cells <= set(feasible())
    assert "| seeds, each a simulated world of its own | 50,000 | **4** |" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["counted"]["figures"]["simulated"]["seeds"] == 4
    assert "Still lacking" in ran.stdout
    assert not (tmp_path / "failing-seeds.txt").exists()


def test_ctrl_c_keeps_what_was_done(tmp_path: Path) -> None:
    options = ["--seeds=100000", "--first=1", "--only=simulation", f"--folder={tmp_path}"]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.proof.prove", *options], cwd=ROOT, stdout=subprocess.PIPE
    ) as ran:
        children = Path(f"/proc/{ran.pid}/task/{ran.pid}/children")
        wait_for(lambda: len(children.read_text().split()) >= 2, timeout_s=60)  # a process has its seed
        ran.send_signal(signal.SIGINT)
        out, _ = ran.communicate(timeout=60)

    assert ran.returncode == 0, out
    assert b"stopping" in out
    (kept,) = Shelf(tmp_path).sittings()
    assert not kept.is_whole
    simulated = kept.figures.simulated
    assert kept.end - kept.first == simulated.seeds < 1_000
    assert simulated.corpus + simulated.seeds >= 1  # what was under way was waited for
    assert not (tmp_path / "unfinished.json").exists()


def test_a_violation_makes_it_red_and_names_its_seed(
    tmp_path: Path, crew: Crew, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prove, "Crew", lambda jobs: crew)
    options = ["--only=simulation", f"--folder={tmp_path}"]

    assert prove.main([*options, "--seeds=1", "--first=12"]) == 0
    assert prove.main([*options, "--seeds=1"]) == 1  # goes on with 13

    told = capsys.readouterr().out
    assert "VIOLATION: simulation, seed 13\nI3: lost: a reservation <#7>\nI10: a gap\n" in told
    assert "replay: python -m tests.proof.simulation --seed 13 --trace" in told
    failing = (tmp_path / "failing-seeds.txt").read_text()
    assert '#     echo "<seed> <why>" >> tests/proof/simulation/corpus.txt' in failing
    assert "\n13 I3: lost: a reservation <7>\n" in failing  # in the corpus a # begins a comment
    written = (tmp_path / "report.md").read_text()
    assert "| violations | 0 | **2** |" in written
    assert "### simulation, seed 13" in written
    assert "a reservation &lt;#7&gt;" in (tmp_path / "report.html").read_text()
    assert prove.main(["--report-only", f"--folder={tmp_path}"]) == 1


# Seeds --------------------------------------------------------------------------------------------------


def test_seeds_add_up_whoever_runs_them(turn: Turn, crew: Crew) -> None:
    simulation, failing = simulate(turn, crew, range(0, 12))

    simulated = turn.figures.simulated
    assert (simulated.seeds, simulated.operations, simulated.hours, simulation.end) == (12, 120, 6.0, 12)
    assert simulated.faults == {"late": 24}
    assert simulated.coverage == {"reserve | live | none | >0 | late": 36}
    assert simulated.replayed == 1  # seed 0
    assert failing == {}


def test_a_process_that_dies_or_hangs_convicts_its_seed_and_the_others_go_on(turn: Turn) -> None:
    with Crew(1, simulate=made_up, seed_max_s=2.0) as crew:
        _, failing = simulate(turn, crew, range(DEADLY, DEADLY + 4))

    assert failing == {
        DEADLY: "its process died, with exit code 3",
        ENDLESS: "I18: it hangs: not done after 2 s",
    }
    assert turn.figures.violation_count == 2
    assert turn.figures.simulated.seeds == 4


def by_whom(seed: int) -> Result:
    return Result(seed, digest=str(os.getpid()))


def test_a_process_makes_way_for_another_after_so_many_seeds() -> None:
    with Crew(1, simulate=by_whom, seeds_each=3) as crew:
        pids = [done.result.digest for done in crew.results(iter(range(7)))]

    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]


def test_a_seed_that_gives_two_histories_is_a_violation(turn: Turn, crew: Crew) -> None:
    _, failing = simulate(turn, crew, range(FICKLE, FICKLE + 2))

    (told,) = failing.values()
    assert told.startswith("two runs of it are two histories: ")
    assert turn.figures.violations[0].seed == FICKLE
    assert (turn.figures.simulated.replayed, turn.figures.simulated.seeds) == (1, 2)


def test_it_goes_on_until_all_that_is_wanted_is_reached(turn: Turn, crew: Crew) -> None:
    simulation = Simulation(crew, 20, note_failing=lambda seed, told: None)

    simulation.run(turn, Wanted(seeds=2, operations=40, hours=2.9))

    assert turn.figures.simulated.hours >= 2.9
    assert turn.figures.simulated.seeds in (6, 7)  # one more was under way


# Sittings -----------------------------------------------------------------------------------------------


def test_sittings_of_the_commits_that_count_are_summed_up() -> None:
    struck = Figures(
        simulated=Simulated(seeds=5, coverage={"a": 1}, slowest=[SlowSeed(2.0, 51, 9)]),
        struck=Struck(cuts=3, operations=7, by_name={"cut": {"LATE": 3}}, served_max_s={"LATE": 0.5}),
        canaries={"clamp": Flown(False, ["a test"], 1.0)},
    )
    later = Figures(
        simulated=Simulated(seeds=2, coverage={"a": 1, "b": 4}, slowest=[SlowSeed(3.0, 60, 9)]),
        struck=Struck(cuts=1, by_name={"cut": {"LATE": 1}, "engine": {"kill": 2}}, kills=2, served_max_s={"LATE": 0.2}),
        canaries={"clamp": Flown(True, ["a test"], 1.0)},
    )
    shelf = [
        sitting("aaaa", first=50, end=55, figures=struck),
        sitting("bbbb", first=0, end=50),
        sitting("aaaa", first=60, end=62, figures=later),
    ]

    total = counted(shelf, frozenset(["aaaa"]))

    figures = total.figures
    assert (figures.simulated.seeds, figures.struck.cuts, figures.struck.kills, figures.operations) == (7, 4, 2, 7)
    assert figures.struck.by_name == {"cut": {"LATE": 4}, "engine": {"kill": 2}}
    assert figures.struck.served_max_s == {"LATE": 0.5}
    assert figures.simulated.coverage == {"a": 2, "b": 4}
    assert [slow.seed for slow in figures.simulated.slowest] == [60, 51]
    assert figures.caught == 1  # by the newest flight
    assert [one.commit for one in total.left_out] == ["bbbb"]
    assert counted(shelf, frozenset(["aaaa", "bbbb"])).figures.simulated.seeds == 57
    assert struck.simulated.seeds == 5  # what is on the shelf stays as it is


def test_no_seed_counts_twice() -> None:
    shelf = [sitting(first=0, end=50), sitting(first=40, end=60), sitting(first=60, end=70)]

    total = counted(shelf, frozenset(["aaaa"]))

    assert total.figures.simulated.seeds == 30
    assert total.twice == shelf[:1]
    assert next_seed(shelf) == 70


def test_a_sitting_that_was_killed_is_taken_over_by_the_next_one(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    with shelf.held():
        shelf.finish(sitting(first=0, end=5))
        shelf.keep(sitting(first=5, end=7, at=2))
        assert len(shelf.sittings()) == 1
        with pytest.raises(InUse), Shelf(tmp_path / "shelf").held():
            pass

    with shelf.held():
        assert [(one.first, one.end) for one in shelf.sittings()] == [(0, 5), (5, 7)]
        shelf.keep(sitting(first=5, end=7, at=2))  # killed between its two last steps: it is there already
    with shelf.held():
        assert len(shelf.sittings()) == 2


def test_a_sitting_does_what_is_still_lacking() -> None:
    figures = Figures(simulated=Simulated(seeds=600, operations=500_000, simulated_s=3_600), struck=Struck(cuts=250))
    figures.canaries["clamp"] = Flown(True, [], 1.0)
    done = Counted(figures)
    asked = ["--set=fast", "--cases=7"]

    wanted = prove.wanted_of(prove._parser().parse_args([*asked, "--sitting"]), done)
    afresh = prove.wanted_of(prove._parser().parse_args(asked), done)
    timed = prove.wanted_of(prove._parser().parse_args([*asked, "--minutes=5"]), done)

    assert (wanted.seeds, wanted.operations, wanted.hours) == (400, 0, 24)
    assert (wanted.faults, wanted.cuts, wanted.kills, wanted.cases) == (40, 0, 20, {"lane": 7, "frames": 7})
    assert "clamp" not in wanted.canaries
    assert wanted.canaries
    assert (afresh.seeds, afresh.hours, afresh.cuts) == (FAST.seeds, FAST.hours, FAST.cuts)
    assert timed.seeds == timed.cuts == float("inf")


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_commits_count_from_the_named_one_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    git("init", "--quiet")
    commits = []
    for number in range(3):
        git("commit", "--quiet", "--allow-empty", "--no-verify", "-m", str(number))
        commits.append(git("rev-parse", "HEAD"))

    assert checkout.since(commits[1][:9]) == frozenset(commits[1:])
    assert checkout.since("HEAD") == frozenset(commits[2:])
    assert checkout.here() == checkout.Checkout(commits[2], is_dirty=False)
    (tmp_path / "new.py").touch()
    assert checkout.here().is_dirty
    with pytest.raises(checkout.NoSuchCommit):
        checkout.since("nonsense")


# Other parts --------------------------------------------------------------------------------------------


def ended(out: object, code: int | None = 0) -> Ended:
    return Ended(code, False, out if isinstance(out, str) else json.dumps(out), "its last words", 2.0)


def test_faults_are_read_as_their_command_tells_them(turn: Turn) -> None:
    tally = Tally()
    for _ in range(4):
        tally.note(Sort.CUT, "LATE", 0.5)
    tally.note(Sort.DATABASE, "stop", 0.2)
    tally.note(Sort.ENGINE, "kill", 2.5)
    tally.note(Sort.DATABASE, "stop", 0.1)
    tally.operations = 40
    told = tally.summary() | {"seed": 5, "broke_off": None}

    assert parts.absorb_faults(turn, ended(told), "replay me")
    tally.convict(["I3: lost", "I4: made up"])
    assert parts.absorb_faults(turn, ended(tally.summary() | {"seed": 6, "broke_off": None}, 1), "replay me")
    assert not parts.absorb_faults(turn, ended(tally.summary() | {"seed": 7, "broke_off": "OSError()"}, 2), "replay me")

    struck = turn.figures.struck
    assert (struck.database, struck.cuts, struck.kills, struck.operations, struck.served_late) == (6, 12, 3, 120, 3)
    assert turn.figures.violation_count == 4
    assert turn.figures.violations[0] == Violation("faults", 6, "I3: lost\nI4: made up", "replay me", 2)
    assert turn.figures.problems == ["faults: broke off: OSError(); again: replay me"]


def test_the_fuzzers_report_is_read_as_they_write_it(turn: Turn) -> None:
    found = fuzzing.Report("lane", 9, cases=30)
    found.answers["200"] = 4
    parts.absorb_fuzz(turn, ended(json.dumps(found.figures(), indent=2)), "replay me")
    assert turn.figures.violation_count == 0
    found.wrongs = ["memory grew"]
    found.found = [fuzzing.Found("17", fuzzing.corpus("lane")[0][1], ["500"])]

    parts.absorb_fuzz(turn, ended(json.dumps(found.figures(), indent=2), 1), "replay me")

    assert turn.figures.fuzzed.cases == {"lane": 60}
    assert turn.figures.fuzzed.answers == {"200": 8}
    assert [(one.seed, one.replay) for one in turn.figures.violations] == [
        (9, "python -m tests.proof.fuzz lane --seed 9 --only 17"),
        (9, "replay me"),
    ]


def test_a_canary_that_survives_is_a_violation(turn: Turn) -> None:
    flights = [
        Flight("clamp", [Catch("tests/a.py::b", True, "I1", 1.0)], 3, 2.0),
        Flight("two_engines", [Catch("tests/a.py::c", False, "noticed nothing", 1.0)], 3, 2.0),
    ]
    told = [{**msgspec.to_builtins(flight), "is_caught": flight.is_caught} for flight in flights]

    assert parts.absorb_canaries(turn, ended(told, 1))

    assert turn.figures.caught == 1
    (found,) = turn.figures.violations
    assert found.replay == "python -m tests.proof.canaries two_engines"
    assert "tests/a.py::c: noticed nothing" in found.told


def test_a_red_test_of_schemathesis_is_a_violation_and_a_skipped_one_a_problem(turn: Turn, tmp_path: Path) -> None:
    xml = tmp_path / "report.xml"
    xml.write_text(
        '<testsuites><testsuite><testcase name="test_a" classname="c" time="1"/>'
        '<testcase name="test_b"><failure message="500">curl -X GET</failure></testcase>'
        '<testcase name="test_c"><skipped message="no openssl"/></testcase></testsuite></testsuites>'
    )

    parts.absorb_schemathesis(turn, ended("", 1), xml, 30)

    (found,) = turn.figures.violations
    assert "curl -X GET" in found.told
    assert found.replay.startswith("HOLDFAST_SCHEMATHESIS_S=30 python -m pytest ")
    assert turn.figures.problems == ["schemathesis: test_c was skipped: no openssl"]
    assert turn.figures.tried.tests == 3


@pytest.mark.parametrize("out", ["", "Traceback", "[1, 2"])
def test_a_part_that_breaks_off_is_a_problem_with_its_last_words(turn: Turn, out: str) -> None:
    assert not parts.absorb_canaries(turn, ended(out, 3))
    assert not parts.absorb_fuzz(turn, ended(out, 0), "replay me")

    assert [problem.partition(":")[0] for problem in turn.figures.problems] == ["canaries", "fuzz"]
    assert all("its last words" in problem for problem in turn.figures.problems)


def python(statement: str) -> list[str]:
    return ["timeit", "-n1", "-r1", statement]


def test_a_command_is_heard_while_it_runs_and_ended_when_its_time_is_over() -> None:
    heard: list[str] = []
    endless = "import sys, time; print('here', file=sys.stderr, flush=True); time.sleep(600)"

    late = commands.run(python(endless), limit_s=1.0, is_stopped=lambda: False, on_line=heard.append)
    stopped = commands.run(python(endless), limit_s=60, is_stopped=lambda: len(heard) > 1, on_line=heard.append)
    whole = commands.run(python("print(7)"), limit_s=60, is_stopped=lambda: False)

    assert (late.code, late.was_stopped, stopped.code, stopped.was_stopped) == (None, False, None, True)
    assert heard.count("here") >= 1
    assert (whole.code, whole.out.startswith("7\n")) == (0, True)


# The report ---------------------------------------------------------------------------------------------


def reported(figures: Figures, canaries: Sequence[str] = ("clamp",)) -> Report:
    one = sitting("0123456789abcdef", first=7, end=50_007, figures=figures)
    other = sitting("fedcba9876543210")
    return Report("long", LONG, canaries, [one.commit], Counted(figures, [one], [other]))


def complete() -> Figures:
    figures = Figures(
        simulated=Simulated(50_000, 20_000_000, 3_600_000.0, slowest=[SlowSeed(2.5, 4711, 500)]),
        struck=Struck(1_000, 5_000, 200, 12_345, by_name={"cut": {"LATE": 5_000}}),
        canaries={"clamp": Flown(True, ["tests/a.py::b"], 4.0)},
    )
    figures.simulated.coverage = {coverage.on_file(cell): 2 for cell in feasible()}
    figures.fuzzed.cases = {"lane": 50_000, "frames": 50_000}
    figures.tried.longest_s, figures.tried.tests = 300, 2
    return figures


def test_the_report_says_that_all_was_reached_and_nothing_found(tmp_path: Path) -> None:
    told = reported(complete())

    report.write(told, tmp_path)

    written = (tmp_path / "report.md").read_text()
    assert told.is_complete
    assert "No violation was found, and all figures of the long set are reached." in written
    assert (
        "|  | long set | done |\n"
        "| --- | ---: | ---: |\n"
        "| seeds, each a simulated world of its own | 50,000 | 50,000 |\n"
        "| operations checked | 20,000,000 | 20,012,345 |\n"
        "| simulated hours | 1,000 | 1,000 |\n"
        "| database faults under load | 1,000 | 1,000 |\n"
        "| COMMITs cut | 5,000 | 5,000 |\n"
        "| engine kills | 200 | 200 |\n"
    ) in written
    assert "| canaries caught | 1 | 1 |" in written
    assert "| violations | 0 | 0 |" in written
    assert "**" not in written
    assert "1 sitting of 30 min together, 2026-01-07; 1 commit (0123456789)" in written
    assert "python -m tests.proof.simulation --seed 4711 --trace" in written
    assert "fedcba9876" in written.partition("Sittings that do not count")[2]


def test_the_report_shows_missing_cells_in_bold() -> None:
    figures = complete()
    del figures.simulated.coverage["purchase | live | active | 0 | crash"]
    told = reported(figures)

    written = document.markdown("", report._blocks(told))

    assert not told.is_complete
    assert "| **purchase** | **live** | **active** | **0** | **crash** |" in written
    assert "**18 (9 of 10)**" in written
    count = len(list(feasible()))
    assert f"| cells of command × state × fault reached | {count:,} | **{count - 1:,}** |" in written


@pytest.mark.parametrize("name", ["seeds", "operations", "simulated_s"])
def test_a_figure_that_is_not_reached_is_named(name: str) -> None:
    figures = complete()
    figures.struck.operations = 0
    setattr(figures.simulated, name, getattr(figures.simulated, name) - 1)

    assert not reported(figures).is_complete
    assert "Still lacking" in report.verdict(reported(figures)).text


def test_a_canary_that_was_not_set_loose_is_missed() -> None:
    told = reported(complete(), ["clamp", "two_engines"])

    written = document.markdown("", report._blocks(told))

    assert "| canaries caught | 2 | **1** |" in written
    assert "| two_engines | **not set loose** |" in written


def test_the_page_needs_nothing_beside_itself_and_is_light_and_dark(tmp_path: Path) -> None:
    figures = complete()
    figures.convict(Violation("fuzz lane", 3, "<script>alert('&')</script>", "python -m tests.proof.fuzz lane"))

    report.write(reported(figures), tmp_path)

    page = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in page
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", page)
    assert "color-scheme: light dark" in page
    assert "prefers-color-scheme: dark" in page
    assert "python -m tests.proof.fuzz lane" in page


def test_of_many_violations_the_first_are_kept_and_all_are_counted() -> None:
    figures = Figures()
    for number in range(300):
        figures.convict(Violation("simulation", number, "x" * 10_000, "", 2))

    assert figures.violation_count == 600
    assert len(figures.violations) == 200
    assert len(figures.violations[0].told) < 6_100


def test_where_no_sitting_counts_nothing_has_been_proved() -> None:
    told = Report("long", LONG, [], [], Counted(left_out=[sitting()]))

    assert not told.is_good
    assert report.verdict(told).text == "Nothing has been proved: no sitting counts."
    assert "No violation" not in document.markdown("", report._blocks(told))
