"""Log lines: their shape, the request's id in them, libraries' lines like ours, and no secret anywhere."""

import contextlib
import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import httpx
import pytest
import structlog
import trio

from api import logs
from api.logs import LogFormat, redact_text
from tests.server import Server

ROUTED = ("hypercorn.error", "quart.app", "alembic.runtime.migration")


class Written:
    """What has been written so far."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    def text(self) -> str:
        return self.stream.getvalue()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines()]

    def line(self) -> dict[str, Any]:
        (only,) = self.lines()
        return only


@pytest.fixture
def restored() -> Iterator[None]:
    """Logging as it was before, after a test that configures it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.fixture
def written(restored: None) -> Written:
    written = Written()
    logs.configure("INFO", LogFormat.JSON, written.stream)
    return written


log = structlog.get_logger()


def test_a_line_is_one_json_object_with_instant_level_and_event_first(written: Written) -> None:
    log.info("drop_restarted", drop_id="d1", seq=7)
    line = written.line()
    assert list(line) == ["timestamp", "level", "event", "drop_id", "seq"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"])
    assert (line["level"], line["event"], line["seq"]) == ("info", "drop_restarted", 7)


def test_a_line_stays_one_line_whatever_is_in_it(written: Written) -> None:
    log.info('name\n{"level":"info"}', name="a\r\nb\x1b[31m\u2028")
    assert written.text().count("\n") == 1
    assert written.line()["name"] == "a\r\nb\x1b[31m\u2028"


def test_lines_below_the_level_are_not_written(written: Written) -> None:
    log.debug("ours")
    logging.getLogger("quart.app").debug("theirs")
    assert written.text() == ""


async def test_the_request_id_stands_in_every_line_of_its_request_and_in_no_other(written: Written) -> None:
    async def handle(request_id: str) -> None:
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await trio.lowlevel.checkpoint()
            log.info("ours", of=request_id)
            logging.getLogger("quart.app").info("theirs", extra={"of": request_id})

    async with trio.open_nursery() as nursery:
        for request_id in ("r1", "r2", "r3"):
            nursery.start_soon(handle, request_id)
    log.info("nobody's")
    *of_requests, last = written.lines()
    assert len(of_requests) == 6
    assert all(line["request_id"] == line["of"] for line in of_requests)
    assert "request_id" not in last


@pytest.mark.parametrize("name", ROUTED)
def test_libraries_write_the_same_lines(written: Written, name: str) -> None:
    logging.getLogger(name).warning("lost %d of %s", 3, "them", extra={"peer": "1.2.3.4"})
    line = written.line()
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert (line["level"], line["event"], line["logger"]) == ("warning", "lost 3 of them", name)
    assert line["peer"] == "1.2.3.4"


def test_a_handler_that_a_library_gave_itself_does_not_write_a_line_twice() -> None:
    stray = io.StringIO()
    logger = logging.getLogger("hypercorn.error")
    logger.addHandler(logging.StreamHandler(stray))
    written = Written()
    try:
        logs.configure("INFO", LogFormat.JSON, written.stream)
        logger.error("once")
        assert stray.getvalue() == ""
        assert len(written.lines()) == 1
    finally:
        logs.configure("WARNING", LogFormat.CONSOLE, io.StringIO())
        structlog.reset_defaults()


def test_configuring_again_replaces_the_stream_and_the_level(written: Written) -> None:
    again = Written()
    logs.configure("ERROR", LogFormat.JSON, again.stream)
    log.error("ours")
    logging.getLogger("alembic").error("theirs")
    log.warning("below")
    assert [line["event"] for line in again.lines()] == ["ours", "theirs"]
    assert written.text() == ""


def test_a_warning_of_python_is_a_line(written: Written) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)
    assert written.line()["logger"] == "py.warnings"


# Secrets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        *("password", "PGPASSWORD", "jwt_secret", "access_token", "Authorization", "Cookie", "Set-Cookie", "dsn"),
        *("database_url", "DATABASE_URL", "api_key", "apiKey", "credentials"),
    ],
)
@pytest.mark.parametrize("value", ["hunter2", b"hunter2", ["hunter2"], {"x": "hunter2"}, 1234567])
def test_a_value_whose_key_names_a_secret_is_never_written(written: Written, key: str, value: object) -> None:
    log.info("top", **{key: value})
    log.info("deep", a={"b": [{"c": ({key: value},)}]})
    logging.getLogger("quart.app").info("theirs", extra={key: value})
    assert len(written.lines()) == 3
    assert "hunter2" not in written.text()
    assert "1234567" not in written.text()


def test_what_only_looks_like_a_secrets_key_stays_readable(written: Written) -> None:
    log.info("seen", drop_id="d1", reservation_id="r1", keys=3, idempotency_key="k1", author="ada")
    line = written.line()
    assert (line["drop_id"], line["keys"], line["idempotency_key"], line["author"]) == ("d1", 3, "k1", "ada")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://app:hunter2@db:5432/shop", "postgresql://app:***@db:5432/shop"),
        ("postgres://app:p@ss:hunter2@db/shop", "postgres://app:***@db/shop"),
        ("to postgresql+psycopg://app:hunter2@db failed", "to postgresql+psycopg://app:***@db failed"),
        ("postgresql://db/shop?user=app&password=hunter2&sslmode=require", None),
        ("host=db user=app password=hunter2 dbname=shop", "host=db user=app password=*** dbname=shop"),
        ("host=db password='hunter2 hunter2' dbname=shop", "host=db password=*** dbname=shop"),
        ("password='hunter2 cut off", "password=***"),
        ("{'token': 'hunter2', 'n': 1}", "{'token': ***, 'n': 1}"),
        ('{"jwt_secret": "hunter2"}', '{"jwt_secret": ***}'),
        ("Authorization: Bearer hunter2.hunter2", "Authorization: Bearer ***"),
        ("Authorization: Basic aHVudGVyMg==", "Authorization: Basic ***"),
        ("got Bearer hunter2hunter2 there", "got Bearer *** there"),
        ("a eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJodW50ZXIyIn0.c2ln b", "a *** b"),
        ("postgresql://db:5432/shop", "postgresql://db:5432/shop"),
        ("http://127.0.0.1:4000/api/v1/drops?limit=20", "http://127.0.0.1:4000/api/v1/drops?limit=20"),
        ("mail ada@example.com: at 10:00", "mail ada@example.com: at 10:00"),
    ],
)
def test_credentials_in_a_text_are_hidden_and_the_rest_of_it_is_not(text: str, shown: str | None) -> None:
    redacted = redact_text(text)
    assert "hunter2" not in redacted
    assert "aHVudGVyMg" not in redacted
    if shown is not None:
        assert redacted == shown


def test_credentials_are_hidden_in_the_event_in_values_and_in_objects(written: Written) -> None:
    class Server:
        def __repr__(self) -> str:
            return "<Server postgresql://app:hunter2@db>"

    log.info("opening postgresql://app:hunter2@db", to=["postgresql://app:hunter2@db"], server=Server())
    logging.getLogger("alembic").info("%s and %r", "postgresql://app:hunter2@db", Server())
    assert written.text().count("app:***@db") == 5
    assert "hunter2" not in written.text()


@pytest.mark.parametrize("format", list(LogFormat))
def test_credentials_are_hidden_in_exceptions_causes_and_groups(format: LogFormat) -> None:
    written = Written()
    logs.configure("INFO", format, written.stream)

    def fail() -> None:
        secret = "hunter2"  # a local variable: no pretty traceback may show it
        try:
            raise ConnectionError(f"no postgresql://app:{secret}@db")
        except ConnectionError as error:
            raise ExceptionGroup("both", [ValueError(f"password={secret}"), RuntimeError("dull")]) from error

    try:
        try:
            fail()
        except ExceptionGroup as error:
            log.error("failed", exc_info=error)
            logging.getLogger("quart.app").exception("failed")
        assert "hunter2" not in written.text().replace('secret = "hunter2"', "")
        assert written.text().count("ConnectionError: no postgresql://app:***@db") == 2
        assert "RuntimeError: dull" in written.text()
        assert "test_logs.py" in written.text()
    finally:
        structlog.reset_defaults()


# What could take a line, or the process, along --------------------------------------------------------


def test_a_repr_that_fails_a_strange_number_and_broken_text_do_no_harm(written: Written) -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    endless: list[Any] = []
    endless.append(endless)
    log.info("odd", broken=Broken(), big=2**80, text="\ud800", by={1: 2, Broken(): 3}, endless=endless, none=None)
    line = written.line()
    assert line["big"] == 2**80
    assert "Broken" in line["broken"]
    assert line["none"] is None


def test_a_hostile_text_costs_no_more_than_its_length() -> None:
    for piece in ("a-", "token", "eyJ-", "a://b:", "token='", "://a:", "bearer ", "x=", "postgres://"):
        began = time.perf_counter()
        redact_text(piece * (100_000 // len(piece)))
        assert time.perf_counter() - began < 5, piece


class Disk(io.StringIO):
    """A stream that takes nothing while it is full."""

    is_full = False

    def write(self, text: str) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def unwritable(way: str) -> TextIO:
    if way == "disk is full":
        return open("/dev/full", "w")  # noqa: PTH123 - its end is part of the test
    if way == "stream is closed":
        stream = io.StringIO()
        stream.close()
        return stream
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


@pytest.mark.parametrize("way", ["disk is full", "nobody reads the pipe", "stream is closed"])
def test_a_line_that_cannot_be_written_stops_nobody(
    way: str, restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = unwritable(way)
    logs.configure("INFO", LogFormat.JSON, stream)
    for _ in range(1_000):  # more than Python keeps of them
        log.error("ours", text="x" * 100)
        logging.getLogger("quart.app").error("theirs")
    with contextlib.suppress(OSError):
        stream.close()
    log.error("ours")
    assert capsys.readouterr().err == ""  # `logging` complains there of what it cannot write


def test_how_many_lines_could_not_be_written_is_said_once(restored: None) -> None:
    disk = Disk()
    logs.configure("INFO", LogFormat.JSON, disk)
    log.info("before")
    disk.is_full = True
    log.info("lost")
    logging.getLogger("quart.app").info("lost")
    disk.is_full = False
    log.info("after")
    log.info("later")

    lines = [json.loads(line) for line in disk.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["before", "after", "log_could_not_be_written", "later"]
    assert (lines[2]["level"], lines[2]["lines"]) == ("warning", 2)
    assert list(lines[2])[:3] == ["timestamp", "level", "event"]


class Unheard(Server):
    """Its log goes to /dev/full, of which nobody may read: it has no end."""

    def log(self) -> str:
        return "(on a full disk)"


def test_the_server_goes_on_when_its_log_is_on_a_full_disk(database: str) -> None:
    server = Unheard(database, Path("/dev/full"))
    try:
        server.start()
        began = time.monotonic()
        while time.monotonic() < began + 2.5:  # the hot lane writes a line a second about what it answered
            answer = httpx.get(f"{server.url}/api/v1/drops/0190a3c4-0000-7000-8000-00000000000a")
            assert answer.json()["error"]["code"] == "DROP_NOT_FOUND"
            time.sleep(0.1)
    finally:
        code = server.stop()
    assert code == 0


def test_the_console_format_is_for_eyes_and_goes_to_stderr() -> None:
    program = (
        "import structlog; from api import logs; logs.configure('INFO', logs.LogFormat.CONSOLE);"
        "structlog.get_logger().info('started', port=4000, password='hunter2')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "started" in done.stderr
    assert "port=4000" in done.stderr
    assert "password=***" in done.stderr
    assert "\x1b" not in done.stderr  # no colours where nobody sees them
