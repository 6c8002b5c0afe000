"""The start of a server whose database is full of holds: from the command to `/readyz`, on a real PostgreSQL.

The rows are made by SQL, as an engine would have left them, and `holdfast audit` looks at them first. Each round starts
the server anew, on the database as the round before left it.

    python -m tests.bench.start [--holds 1000000] [--drops 10000] [--rounds 3]
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Final

import psycopg

from persistence import audit, migrate
from persistence.embedded import forget_pg_variables, running
from tests.bench import usage
from tests.server import Server

USER: Final = "00000000-0000-4000-8000-000000000001"
# Half of each drop's stock is held, for a day.
STATEMENTS: Final = (
    "INSERT INTO users VALUES (%(user)s, 'bench', '2026-01-01Z')",
    "INSERT INTO drops (id, name, price, currency, total_stock, available_stock, held_count, sold_count, status,"
    " created_by, created_at, updated_at, epoch, seq)"
    " SELECT gen_random_uuid(), 'Bench', 1, 'USD', 2 * %(each)s, %(each)s, %(each)s, 0, 'live', %(user)s, now, now, 1,"
    " %(each)s + 1 FROM generate_series(1, %(drops)s), date_trunc('milliseconds', now()) AS now",
    "INSERT INTO reservations (id, drop_id, user_id, qty, status, created_at, expires_at, seq)"
    " SELECT gen_random_uuid(), id, gen_random_uuid(), 1, 'active', created_at, created_at + interval '24 hours', n + 1"
    " FROM drops, generate_series(1, %(each)s) AS n",
    "INSERT INTO drop_events (drop_id, seq, epoch, type, at, available_stock, status, data)"
    " SELECT id, 1, 1, 'DROP_CREATED', created_at, total_stock, 'live', jsonb_build_object('name', name,"
    " 'price', price, 'currency', currency, 'total_stock', total_stock, 'starts_at', null, 'ends_at', null,"
    " 'created_by', created_by, 'created_at', (extract(epoch FROM created_at) * 1000)::bigint) FROM drops",
    "INSERT INTO drop_events (drop_id, seq, epoch, type, at, reservation_id, user_id, qty, expires_at, available_stock)"
    " SELECT drop_id, r.seq, 1, 'RESERVED', r.created_at, r.id, user_id, 1, expires_at, total_stock - r.seq + 1"
    " FROM reservations AS r JOIN drops ON drops.id = drop_id",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--holds", type=int, default=1_000_000)
    parser.add_argument("--drops", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    forget_pg_variables()
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as name, running(Path(name)) as postgres:
        migrate.upgrade(postgres.dsn)
        values = {"user": USER, "drops": asked.drops, "each": asked.holds // asked.drops}
        with psycopg.connect(postgres.dsn) as connection:
            for statement in STATEMENTS:
                connection.execute(statement, values)
        with psycopg.connect(postgres.dsn, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")
        broken = [one.check.name for one in audit.run(postgres.dsn) if not one.holds]
        assert not broken, f"what was made is not what an engine leaves behind: {broken}"
        taken = []
        for _ in range(asked.rounds):
            server = Server(postgres.dsn, Path(name) / "server.log", ALLOW_UNSAFE_DURABILITY="false")
            try:
                server.start(until="")
                taken.append(server.wait_for("/readyz", timeout_s=300))
                resident = (usage.rss_bytes(server.process.pid) or 0) / 2**20
            finally:
                server.stop()
            print(f"{asked.holds:,} holds in {asked.drops:,} drops: ready after {taken[-1]:.1f} s, {resident:.0f} MiB")
        print(f"median {statistics.median(taken):.1f} s")


if __name__ == "__main__":
    main()
