"""The birth of a drop whose answer gets lost, in every way: it is made once, or not at all, and its maker learns which.

What holds for every other commit is shown under load (`test_faults`). The short time limits save the test time.
"""

import trio

from tests.proof import checks
from tests.proof.clients import Shop, new_key
from tests.proof.conftest import StartEngine, bugs_in
from tests.proof.proxy import Fault, Proxy

SHORT = {"COMMIT_STALL_MS": "150", "COMMIT_TIMEOUT_MS": "400", "ANSWER_TIMEOUT_MS": "300"}


async def test_cuts_at_the_birth_of_a_drop_make_it_once_or_not_at_all(
    database: str, proxy: Proxy, engine: StartEngine
) -> None:
    server = engine(proxy.dsn(database), **SHORT)
    shop = Shop(server.port)
    (user,) = await shop.users(1)
    made: set[str] = set()
    for fault in Fault:
        strike = proxy.strike(fault, delay_s=0.1)
        key = new_key()
        body = b'{"name": "Air", "price": 1, "total_stock": 5, "status": "live"}'
        first = await user.send("POST", "/drops", key=key, body=body)
        assert strike.struck.is_set()
        assert first.code in ("", "DATABASE_UNAVAILABLE", "OUTCOME_UNKNOWN"), (fault, first)
        answer = first
        with trio.fail_after(20):
            while answer.status == 503 or answer is first:
                answer = await user.send("POST", "/drops", key=key, body=body)
        assert answer.status == 201
        if first.status == 201:
            assert answer.body == first.body
        made.add(answer.data["id"])
        assert await trio.to_thread.run_sync(strike.over.wait, 5), fault
    assert {str(row["id"]) for row in checks.rows(database, "SELECT id FROM drops")} == made
    assert checks.violations(database) == []
    assert bugs_in(server) == []
