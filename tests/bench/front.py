"""`make bench`: durable reserves per second on one hot drop, beside a route that does nothing, through the same front.

The ratio of the two is what the engine and its commits leave of what the front end can do at all. Both run against the
same server process, in alternating rounds; PostgreSQL (fsync on) and the load generator share the machine's cores with
it. Each reserve is by another user; users stand in the table before, and are unknown to the server's memory.

    python -m tests.bench.front [--rounds 5] [--seconds 3] [--connections 64]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import httpx
import psycopg
from rich.console import Console
from rich.table import Table

from persistence import audit, migrate
from persistence.embedded import running
from tests.server import serving

PER_S_MAX = 4_000  # requests prepared for a second: more than the front end can take
STOCK = 100_000_000


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=3.0)
    options.add_argument("--connections", type=int, default=64)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as directory, running(Path(directory)) as postgres:
        migrate.upgrade(postgres.dsn)
        with serving(postgres.dsn, Path(directory) / "server.log", LOG_LEVEL="WARNING") as server:
            rounds = [_round(postgres.dsn, server.port, Path(directory), asked) for _ in range(asked.rounds)]
        broken = [result for result in audit.run(postgres.dsn) if not result.holds]
    _report(asked, rounds)
    if broken:
        sys.exit(f"the audit found violations: {broken}")


def _round(dsn: str, port: int, directory: Path, asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    count = int((asked.seconds + 1) * PER_S_MAX)
    users = _new_users(dsn, count)
    path = f"/api/v1/drops/{_new_drop(port, users[0])}/reserve"
    nothing = [{"method": "GET", "path": "/healthz", "headers": {}}] * count
    reserves = [{"method": "POST", "path": path, "headers": {"X-User-Id": user}} for user in users]
    return {
        "nothing": _load(port, directory, asked, nothing, 200),
        "reserve": _load(port, directory, asked, reserves, 201),
    }


def _load(
    port: int, directory: Path, asked: argparse.Namespace, requests: list[dict[str, Any]], status: int
) -> dict[str, Any]:
    """One run of the generator; an answer of any other status ends the benchmark."""
    requests_file = directory / "requests.jsonl"
    requests_file.write_text("\n".join(map(json.dumps, requests)))
    arguments = ["127.0.0.1", port, asked.connections, asked.seconds, requests_file]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.load", *map(str, arguments)], capture_output=True, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    if set(result["statuses"]) != {str(status)}:
        sys.exit(f"expected {status} only, got {result['statuses']}")
    result["per_s"] = result["statuses"][str(status)] / result["seconds"]
    return result


def _new_users(dsn: str, count: int) -> list[str]:
    users = [str(uuid.uuid4()) for _ in range(count)]
    copying = "COPY users (id, username, created_at) FROM STDIN"
    with psycopg.connect(dsn) as connection, connection.cursor() as cursor, cursor.copy(copying) as copy:
        for user in users:
            copy.write_row((user, f"bench_{user[:20]}", "2026-01-01T00:00:00Z"))
    return users


def _new_drop(port: int, user: str) -> str:
    drop = {"name": "Bench", "price": 1, "total_stock": STOCK, "status": "live"}
    answer = httpx.post(f"http://127.0.0.1:{port}/api/v1/drops", json=drop, headers={"X-User-Id": user})
    answer.raise_for_status()
    return str(answer.json()["data"]["id"])


def _report(asked: argparse.Namespace, rounds: list[dict[str, dict[str, Any]]]) -> None:
    title = f"{asked.connections} connections, {asked.rounds} alternating rounds of {asked.seconds:g} s, medians"
    table = Table(title=title)
    for heading in ("route", "per s", "p50 ms", "p99 ms"):
        table.add_column(heading, justify="left" if heading == "route" else "right")
    for name, label in (("nothing", "GET /healthz, which does nothing"), ("reserve", "POST …/reserve, durable")):
        runs = [one[name] for one in rounds]
        medians = [statistics.median(run["ms"][p] for run in runs) for p in ("p50", "p99")]
        per_s = statistics.median(run["per_s"] for run in runs)
        table.add_row(label, f"{per_s:,.0f}", *(f"{ms:.1f}" for ms in medians))
    console = Console(width=100)
    console.print(table)
    ratios = [one["reserve"]["per_s"] / one["nothing"]["per_s"] for one in rounds]
    console.print(
        f"reserve / nothing: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}"
    )
    console.print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, fsync on")


if __name__ == "__main__":
    main()
