"""The `holdfast` command: serve, migrate, seed, audit, check-config.

What an operator can cause and mend ends as one sentence on stderr, never as a traceback. Exit codes: 0 done, 1 refused
or failed, 2 called wrongly; `audit` says 1 when an invariant is broken, and 2 when it could not look.

Each command imports what it needs itself: `--help` should not wait for a web framework.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final, TextIO

import psycopg
import structlog
import trio

from api import logs
from api.settings import Settings, SettingsError, examine, load
from engine.ledger import LedgerFault
from persistence import embedded
from persistence.installation import EmbeddedServerError

if TYPE_CHECKING:
    from persistence.audit import Result

DONE: Final = 0
FAILED: Final = 1
AUDIT_FAILED: Final = 2
INTERRUPTED: Final = 130  # what shells say of a program that Ctrl-C ended

CONNECT_S: Final = 5.0


class Refusal(Exception):
    """The command will not do that; its text is the sentence for the operator."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    asked = _parser().parse_args(arguments)
    failed = AUDIT_FAILED if asked.command == "audit" else FAILED
    logs.configure("WARNING", logs.LogFormat.CONSOLE)
    try:
        code: int = asked.run(asked)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain once more while it closes stdout.
        _discard(sys.stdout)
        return failed
    except KeyboardInterrupt:
        return INTERRUPTED
    except SettingsError as error:
        for problem in error.problems:
            _complain(problem)
        return failed
    except BaseException as error:
        sentence = _sentence_for(error)
        if sentence is None:
            if not isinstance(error, Exception):
                raise
            structlog.get_logger().critical("bug", command=asked.command, exc_info=error)
            sentence = f"This is a mistake in Holdfast, not yours: {type(error).__name__}"
        _complain(logs.redact_text(" ".join(sentence.split())))
        return failed
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            # Python keeps the last lines of a log that cannot be written, tries once more while it closes stderr, and
            # makes the exit code 120 when that fails, of whatever was done.
            _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Let what is written there go nowhere from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="holdfast",
        description="An inventory engine for high-traffic drops. Settings come from the environment and from .env.",
    )
    parser.add_argument("--version", action="version", version=f"holdfast {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    serve = commands.add_parser("serve", help="serve until SIGTERM or Ctrl-C")
    serve.add_argument("--host", help="listen on this address instead of HOST")
    serve.add_argument("--port", help="listen on this port instead of PORT; 0 takes any free one")
    serve.add_argument("--certfile", help="serve HTTPS with this certificate instead of TLS_CERTFILE")
    serve.add_argument("--keyfile", help="the certificate's key, instead of TLS_KEYFILE")
    serve.set_defaults(run=_serve)

    migrate = commands.add_parser("migrate", help="bring the schema up to date, or back")
    migrate.add_argument(
        "--down",
        metavar="REVISION",
        help='go back to this revision; "base" removes every table. The data in what is removed is lost',
    )
    migrate.set_defaults(run=_migrate)

    seed = commands.add_parser("seed", help="empty the database, and fill it with sample data")
    way = seed.add_mutually_exclusive_group()
    way.add_argument(
        "--reset",
        action="store_true",
        help="empty the tables first, in development only; the default, but for a DATABASE_URL with anything in it",
    )
    way.add_argument("--append", action="store_true", help="leave what is there, and add a sample to it")
    seed.set_defaults(run=_seed)

    audit = commands.add_parser("audit", help="check every invariant on the database, beside a running server too")
    audit.add_argument("--json", action="store_true", help="print the findings as JSON")
    audit.set_defaults(run=_audit)

    check = commands.add_parser("check-config", help="show the settings in effect, and what is wrong with them")
    check.set_defaults(run=_check_config)
    return parser


def _version() -> str:
    try:
        return version("holdfast")
    except PackageNotFoundError:
        return "(not installed)"


# Commands ---------------------------------------------------------------------------------------------


def _serve(asked: argparse.Namespace) -> int:
    given = {"HOST": asked.host, "PORT": asked.port, "TLS_CERTFILE": asked.certfile, "TLS_KEYFILE": asked.keyfile}
    settings = load({**os.environ, **{name: value for name, value in given.items() if value is not None}})
    logs.configure(settings.log_level, settings.log_format)
    from api import serve

    try:
        return serve.main(settings)
    except serve.OPERATOR_ERRORS as error:
        raise Refusal(str(error)) from error


def _migrate(asked: argparse.Namespace) -> int:
    from persistence import migrate, schema

    with _database(load()) as dsn:
        before = schema.current(dsn)
        if asked.down is None:
            migrate.upgrade(dsn)
        else:
            trio.run(_without_an_engine, dsn, partial(migrate.downgrade, dsn, asked.down))
        after = schema.current(dsn)
    if before == after:
        print(f"schema {after or '(none)'}: nothing to do")
    else:
        print(f"schema {before or '(none)'} -> {after or '(none)'}")
    return DONE


async def _without_an_engine(dsn: str, change: Callable[[], None]) -> None:
    """Tables must not change under an engine: it is refused where one runs, and none starts meanwhile."""
    from persistence.startup import EngineLock

    lock = EngineLock(dsn, connect_timeout_s=CONNECT_S)
    await lock.acquire()
    try:
        await trio.to_thread.run_sync(change)
    finally:
        lock.release()


def _seed(asked: argparse.Namespace) -> int:
    from persistence import migrate
    from persistence.seed import seed

    settings = load()
    if settings.is_production and not asked.append:
        raise Refusal(
            "seed --reset deletes everything in the database, so it works with APP_ENV=development only;"
            " seed --append adds sample data and deletes nothing"
        )
    with _database(settings) as dsn:
        if not settings.is_production:
            trio.run(_without_an_engine, dsn, partial(migrate.upgrade, dsn))
        # A shell that does not say APP_ENV is of development, whatever the database in its .env is.
        may_delete = asked.reset or settings.database_url is None
        counts = trio.run(partial(seed, dsn, reset=not asked.append, now=datetime.now(UTC), may_delete=may_delete))
    for table, count in counts.items():
        print(f"{table:<18}{count:>6}")
    return DONE


def _audit(asked: argparse.Namespace) -> int:
    from persistence import audit, schema

    with _database(load()) as dsn:
        schema.require(schema.current(dsn))
        results = audit.run(dsn)
    if asked.json:
        print(json.dumps([_finding(result) for result in results], indent=2))
    else:
        _print_findings(results)
    return DONE if all(result.holds for result in results) else FAILED


def _finding(result: "Result") -> dict[str, object]:
    check = result.check
    rows = [{name: _plain(value) for name, value in row.items()} for row in result.rows]
    return {
        "invariant": check.invariant,
        "name": check.name,
        "title": check.title,
        "holds": result.holds,
        "violations": result.count,
        "rows": rows,
    }


def _plain(value: object) -> object:
    """A column's value in JSON's types."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _print_findings(results: "Sequence[Result]") -> None:
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width: wide enough that no line of a log is broken.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    table = Table("invariant", "what", "violations", "result")
    table.columns[2].justify = "right"
    for result in results:
        style = "" if result.holds else "bold red"
        verdict = "holds" if result.holds else "BROKEN"
        table.add_row(result.check.invariant, result.check.title, str(result.count), verdict, style=style)
    console.print(table)
    for result in results:
        if not result.holds:
            console.print(f"\n{result.check.invariant} {result.check.name}, {len(result.rows)} of {result.count}:")
            for row in result.rows:
                console.print(
                    "  " + ", ".join(f"{name}={_plain(value)}" for name, value in row.items()), soft_wrap=True
                )
    broken = sum(not result.holds for result in results)
    console.print(f"\n{len(results)} checks, {broken} broken" if broken else f"{len(results)} checks, all hold")


def _check_config(asked: argparse.Namespace) -> int:
    outlook = examine()
    for row in outlook.rows:
        print(f"{row.name:<26}{row.value}  ({row.source})")
    for name in outlook.unknown:
        print(f"{name:<26}is no setting of Holdfast")
    for problem in outlook.problems:
        _complain(problem)
    return FAILED if outlook.problems else DONE


# What they share --------------------------------------------------------------------------------------


@contextmanager
def _database(settings: Settings) -> Iterator[str]:
    """DSN of the database: the operator's own, that of a server which is running already, or of one for this block."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    server = embedded.find_running(settings.data_dir)
    embedded.forget_pg_variables()
    if server is not None:
        yield server.dsn
        return
    with embedded.running(settings.data_dir) as started:
        yield started.dsn


def _complain(sentence: str) -> None:
    print(f"holdfast: {sentence}{'' if sentence.endswith('.') else '.'}", file=sys.stderr)


def _sentence_for(error: BaseException) -> str | None:
    """What an operator can make of the error, or None: then it is ours."""
    from alembic.util import CommandError
    from sqlalchemy.exc import DBAPIError

    from persistence.schema import SchemaOutdated
    from persistence.seed import WouldDelete
    from persistence.startup import StartRefused

    match error:
        case BaseExceptionGroup(exceptions=parts):
            return next((told for part in parts if (told := _sentence_for(part))), None)
        case Refusal() | EmbeddedServerError() | SchemaOutdated() | StartRefused() | WouldDelete():
            return str(error)
        case CommandError():
            return f"The migration was refused: {error}"
        case psycopg.errors.LockNotAvailable():
            return "Somebody else uses a table: a dump, an audit, an open transaction. Try again when that is over"
        case DBAPIError(orig=psycopg.Error() as cause):
            return _sentence_for(cause)
        case psycopg.Error():
            return f"The database cannot be used: {error.diag.message_primary or _first_line(error)}"
        case LedgerFault():
            return f"The database cannot be used: {_first_line(error)}"
        case OSError():
            return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return None


def _first_line(error: BaseException) -> str:
    """libpq adds hints on further lines."""
    text = str(error).strip() or type(error).__name__
    return re.split(r"\n", text, maxsplit=1)[0]


if __name__ == "__main__":
    sys.exit(main())
