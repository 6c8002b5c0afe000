"""Schemathesis, a stranger who knows the OpenAPI document alone, against real servers.

It sends what the document allows and what it forbids, goes from one answer to the next along the document's links
(make a drop, reserve, purchase, cancel, list), and holds every answer to what the document says: status, headers,
body, methods. Once over plain connections, where the hot lane reads all and answers what is hot; once behind TLS,
where Hypercorn and Quart do all of it.

Its choices are new each time; a failure prints the request as a curl command. HOLDFAST_SCHEMATHESIS_S=600 gives each
of its searches ten minutes instead of the usual seconds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.contract.conftest import certificate  # noqa: F401 - a fixture
from tests.proof import checks
from tests.proof.conftest import StartEngine, bugs_in, wait_for
from tests.server import Server

ROOT: Final = Path(__file__).parents[2]
CONFIGURATION: Final = Path(__file__).with_name("schemathesis.toml")
LONG_S: Final = int(os.environ.get("HOLDFAST_SCHEMATHESIS_S", "0"))
EACH: Final = "examples,coverage"  # each value and each bound of the document once: 760 requests, 7 s, always all
FUZZED: Final = "fuzzing"
LINKED: Final = "stateful"  # from answer to request, along the links
MORE_MAX: Final = 3  # runs more, should the first one have bought and given back nothing
# Requests for each operation, and ways along the links: by number, since a busy machine does little in a fixed time.
NUMBER: Final = {FUZZED: 5, LINKED: 50}
PATIENCE_S: Final = 120  # beyond its own time: to start, to shrink what it found, to write its report
CASES_MIN: Final = 500  # of the phases that try everything once
# Of the server's memory, from ready on: what first use costs (6 MiB), and drops, which stay (3 MiB in 75 s).
GROWTH_MIB: Final = 64
DESCRIPTORS: Final = 5  # beyond those that were open before: pools of connections to the database may have grown


def test_plain_server_keeps_to_its_document(engine: StartEngine, database: str, tmp_path: Path) -> None:
    server = engine(database, RESERVATION_TTL_SECONDS="3")

    check(server, tmp_path, (EACH, FUZZED, LINKED))

    for _ in range(MORE_MAX):
        if reached_ends(database):
            break
        check(server, tmp_path, (LINKED,))
    assert reached_ends(database)


@pytest.mark.usefixtures("certificate")
def test_server_behind_tls_keeps_to_its_document(
    engine: StartEngine,
    database: str,
    tmp_path: Path,
    certificate: Path,  # noqa: F811
) -> None:
    server = engine(database, RESERVATION_TTL_SECONDS="3", TLS_CERTFILE=str(certificate))

    check(server, tmp_path, (EACH, FUZZED) if LONG_S else (EACH,), "--tls-verify", str(certificate))

    assert checks.number(database, "SELECT count(*) FROM reservations") > 0


def check(server: Server, folder: Path, phases: tuple[str, ...], *options: str) -> None:
    """Let it go through the phases: it must find nothing, and do no harm."""
    before = usage(server)
    for phase in phases:
        try_out(server, folder, phase, options)
    assert server.process.poll() is None, server.log()
    assert httpx.get(f"{server.url}/readyz", verify=server.tls or True, timeout=5).status_code == 200
    wait_for(lambda: usage(server)[1] <= before[1] + DESCRIPTORS)
    after = usage(server)
    print(f"resident MiB and descriptors: {before} before, {after} after")
    assert after[0] <= before[0] + GROWTH_MIB, (before, after)
    assert bugs_in(server) == []
    assert checks.violations(server.dsn) == []


def try_out(server: Server, folder: Path, phases: str, options: tuple[str, ...]) -> None:
    """What it finds fails the test, in its own words; so does an operation that it could not try."""
    document, report = folder / "openapi.json", folder / "report.json"
    # From a file, or it would leave out the operation that the document came from.
    document.write_bytes(httpx.get(f"{server.url}/openapi.json", verify=server.tls or True, timeout=5).content)
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIGURATION)),
        *("run", str(document), "--url", server.url, "--phases", phases, "--no-color"),
        *bound(phases),
        *(("--mode", "positive") if phases == LINKED else ()),  # what is refused leads nowhere
        *("--report", "json", "--report-json-path", str(report), *options),
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONG_S + PATIENCE_S,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    found = json.loads(report.read_text())
    if phases == EACH:  # not all have links
        assert found["operations"]["tested"] == found["operations"]["total"] == operations_in(document)
        assert found["test_cases"]["generated"] >= CASES_MIN


def bound(phases: str) -> tuple[str, ...]:
    if phases not in NUMBER:
        return ()  # they have an end of their own
    return ("--max-time", str(LONG_S)) if LONG_S else ("--max-examples", str(NUMBER[phases]))


def operations_in(document: Path) -> int:
    return sum(len(operations) for operations in json.loads(document.read_bytes())["paths"].values())


def usage(server: Server) -> tuple[float, int]:
    """The process's resident memory (MiB), and how many descriptors it has open."""
    folder = Path(f"/proc/{server.process.pid}")
    (resident,) = (line for line in (folder / "status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(resident.split()[1]) / 1024, len(list((folder / "fd").iterdir()))


def reached_ends(dsn: str) -> int:
    """How many reservations ended by their holder's word: the way along the links was really gone."""
    return checks.number(dsn, "SELECT count(*) FROM reservations WHERE status IN ('cancelled', 'consumed')")
