"""Log lines: JSON in production, readable in development; both to stderr, one event a line, none with a secret.

Our own code logs through structlog, libraries through `logging`; both come out alike. A request's id stands in each
line that is written on its behalf: bind it with `structlog.contextvars.bound_contextvars(request_id=…)`.

Redaction comes last before the writing, so that it also sees exception texts: a value whose key names a secret is
replaced whole, at any depth, and in every text the credentials that are recognisable as such.

A log that cannot be written (its disk is full, its reader is gone) stops nobody: who has to sell goes on without it.
"""

import json
import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor

REDACTED: Final = "***"

# Deeper than anything that is logged on purpose; past it a value is shown as its (redacted) repr.
_DEPTH_MAX: Final = 8

_SECRET_KEY: Final = re.compile(
    r"passw(or)?d|passphrase|secret|token|authorization|cookie|credential|api_?key|private_?key"
    r"|\bdsn\b|database_?url|\bconninfo\b",
    re.IGNORECASE,
)
# All bounded or anchored, so that a hostile text costs no more than its length.
# user:password@ in any URL, up to the last @ before the host ends: a password may hold an unescaped one.
_URL_CREDENTIALS: Final = re.compile(
    r"(?P<before>[a-z][a-z0-9+.-]{1,30}://[^\s:/?#@'\"]*:)[^\s/?#'\"]*(?=@)", re.IGNORECASE
)
# password=… of libpq and of URL queries, 'token': '…' of a repr, Authorization: … of a header.
_NAMED_SECRET: Final = re.compile(
    r"(?P<before>(?:passw(?:or)?d|passphrase|secret|token|authorization|cookie|api_?key)\w{0,40}['\"]?\s{0,5}[=:]\s{0,5}"
    r"(?:(?:bearer|basic)\s{1,5})?)"
    r"(?:b?'[^']*(?:'|$)|b?\"[^\"]*(?:\"|$)|[^\s'\",;&)}\]]+)",
    re.IGNORECASE,
)
_BEARER: Final = re.compile(r"(?P<before>\bbearer\s{1,5})[\w.~+/=-]{8,}", re.IGNORECASE)
_JWT: Final = re.compile(r"(?<![\w-])eyJ[\w-]{8,}\.[\w-]+\.[\w-]*")

# Libraries that say more at INFO than anybody wants to know: Alembic names its seven plugins at each import.
_QUIET: Final = ("alembic.runtime.plugins",)


class LogFormat(StrEnum):
    CONSOLE = "console"
    JSON = "json"


def configure(level: str, format: LogFormat, stream: TextIO | None = None) -> None:
    """Route every log line of this process to `stream` (stderr), from `level` (DEBUG … CRITICAL) on.

    May be called again; the last call counts.
    """
    stream = stream or sys.stderr
    renderer = _renderer(format, stream)
    lines = _Lines(stream, renderer)
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _stamp,
    ]
    structlog.configure(
        processors=[*common, redact_event, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(_number_of(level)),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, lines)),  # it writes and flushes, no more
        # A logger that was cached would keep the stream and the level of an earlier call.
        cache_logger_on_first_use=False,
    )
    _route_stdlib(level, common, renderer, lines)


def redact_text(text: str) -> str:
    """The text without the credentials that can be told from their surroundings."""
    text = _URL_CREDENTIALS.sub(rf"\g<before>{REDACTED}", text)
    text = _NAMED_SECRET.sub(rf"\g<before>{REDACTED}", text)
    text = _BEARER.sub(rf"\g<before>{REDACTED}", text)
    return _JWT.sub(REDACTED, text)


def redact_event(_logger: object, _method: str, event: EventDict) -> EventDict:
    """A processor: every value of the line, made plain and free of secrets."""
    return {key: _redacted(key, value, _DEPTH_MAX) for key, value in event.items()}


def _redacted(key: object, value: Any, depth: int) -> Any:
    """`value` in JSON's types, free of secrets."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(key, str) and _SECRET_KEY.search(key):
        return REDACTED
    if isinstance(value, int | float):
        return value
    if isinstance(value, str):
        return redact_text(str(value))
    if depth > 0 and isinstance(value, Mapping):
        return {_text(name): _redacted(name, item, depth - 1) for name, item in value.items()}
    if depth > 0 and isinstance(value, list | tuple | set | frozenset):
        return [_redacted(None, item, depth - 1) for item in value]
    return redact_text(_text(value))


def _text(value: object) -> str:
    """What a thing is called in a log line. A repr that fails must not take the line along."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    try:
        return repr(value)
    except Exception as error:  # noqa: BLE001 - whatever a foreign __repr__ does
        return f"<{type(value).__name__} without a repr: {type(error).__name__}>"


def _stamp(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Instant, level and event come first, so that lines can be read from their left edge."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    first = {"timestamp": now, "level": event.pop("level", "info"), "event": event.pop("event", "")}
    return {**first, **event}


def _renderer(format: LogFormat, stream: TextIO) -> Processor:
    if format is LogFormat.JSON:
        return structlog.processors.JSONRenderer(serializer=json.dumps)
    return structlog.dev.ConsoleRenderer(
        colors=stream.isatty(),
        # Plain: the pretty one shows local variables, and with them whatever secret a function was given.
        exception_formatter=structlog.dev.plain_traceback,
        pad_event_to=28,
    )


def _number_of(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


class _Lines:
    """Where lines go. How many could not be written is said once, as soon as one can.

    Some of those may still stand there: Python keeps the last few KiB that a stream did not take, and tries again.
    """

    def __init__(self, stream: TextIO, renderer: Processor) -> None:
        self._stream = stream
        self._renderer = renderer
        self._unwritten = 0

    def write(self, line: str) -> None:
        if not self._is_written(line):
            self._unwritten += 1
        elif self._unwritten:
            event = {"level": "warning", "event": "log_could_not_be_written", "lines": self._unwritten}
            # Not by a logger: this one's lock is held while it writes.
            told = cast(str, self._renderer(None, "warning", _stamp(None, "warning", event)))
            if self._is_written(told + "\n"):
                self._unwritten = 0

    def flush(self) -> None:
        """Each line is flushed already: only then is it known whether it was written."""

    def _is_written(self, line: str) -> bool:
        try:
            self._stream.write(line)
            self._stream.flush()
        except (OSError, ValueError):  # the latter: the stream is closed
            return False
        return True


# Lines of libraries -----------------------------------------------------------------------------------


class _Handler(logging.StreamHandler[_Lines]):
    """The one handler that is ours; `configure` replaces it and leaves those of others (pytest's) alone."""


def _route_stdlib(level: str, common: list[Processor], renderer: Processor, lines: _Lines) -> None:
    handler = _Handler(lines)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), _name_logger, *common],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, redact_event, renderer],
        )
    )
    root = logging.getLogger()
    for old in [one for one in root.handlers if isinstance(one, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(_number_of(level))
    logging.captureWarnings(True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(_number_of(level), logging.WARNING))
    for name in logging.root.manager.loggerDict:
        # Hypercorn and Quart give their loggers handlers of their own; a line must not come out twice or bare.
        if name.split(".")[0] in ("hypercorn", "quart", "alembic"):
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True


def _name_logger(_logger: object, _method: str, event: MutableMapping[str, Any]) -> EventDict:
    record = event.get("_record")
    if isinstance(record, logging.LogRecord):
        event["logger"] = record.name
    for trace_of_another_handler in ("message", "asctime"):
        event.pop(trace_of_another_handler, None)
    return event
