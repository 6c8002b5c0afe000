"""Every setting and limit: name, default, unit and reason in one table, validated once, before anything starts.

`load` is the only reader of settings, from the environment and `.env`; everybody else is handed a `Settings`. All that
is wrong is said at once. README's table and `.env.example` are tested against `SETTINGS`.
"""

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import psycopg
from dotenv.parser import parse_stream
from psycopg.conninfo import conninfo_to_dict

from api.logs import REDACTED, LogFormat, redact_text
from engine.registry import Limits

DOTENV: Final = Path(".env")
JWT_SECRET_BYTES_MIN: Final = 32  # HMAC-SHA256: a key shorter than its output weakens it (RFC 7518, 3.2)


class AppEnv(StrEnum):
    DEVELOPMENT = "development"
    PRODUCTION = "production"


class AuthMode(StrEnum):
    HEADER = "header"
    JWT = "jwt"


class SettingsError(Exception):
    """The settings cannot be used. `problems` are sentences, one for each thing that is wrong."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings in effect. Field names are those of `SETTINGS`, lower case; units stand in their names."""

    app_env: AppEnv
    database_url: str | None
    data_dir: Path
    host: str
    port: int
    cors_origins: tuple[str, ...]
    auth_mode: AuthMode
    auth_header_trusted: bool
    jwt_secret: str | None
    jwt_issuer: str | None
    jwt_audience: str | None
    log_level: str
    log_format: LogFormat
    reservation_ttl_seconds: int
    idempotency_keep_hours: int
    in_flight_max: int
    mailbox_max: int
    part_max: int
    batch_max: int
    body_max_bytes: int
    connections_max: int
    tls_certfile: Path | None
    tls_keyfile: Path | None
    pool_size: int
    answer_timeout_ms: int
    commit_stall_ms: int
    commit_timeout_ms: int
    shutdown_timeout_ms: int
    allow_clock_skew: bool
    allow_unsafe_durability: bool
    ignored: tuple[str, ...]
    """Names that were given, are accepted for the sake of earlier systems, and have no effect."""

    @property
    def is_production(self) -> bool:
        return self.app_env is AppEnv.PRODUCTION

    @property
    def hold_ms(self) -> int:
        """How long a hold lasts."""
        return self.reservation_ttl_seconds * 1000

    @property
    def limits(self) -> Limits:
        """The engine's share of the limits."""
        return Limits(
            in_flight_max=self.in_flight_max,
            mailbox_max=self.mailbox_max,
            part_max=self.part_max,
            batch_max=self.batch_max,
            stall_s=self.commit_stall_ms / 1000,
            answer_s=self.answer_timeout_ms / 1000,
        )

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of this origin (an `Origin` header) may call us from a browser."""
        return "*" in self.cors_origins or origin in self.cors_origins

    def allows_page(self, origin: str | None, host: str) -> bool:
        """Whether a socket may be opened: by no page, by one of our own (`Host` names us), or by an allowed one."""
        return origin is None or urlsplit(origin).netloc == host or self.allows_origin(origin)

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{row.name}={row.value}' for row in shown(self))})"


class Setting(msgspec.Struct, frozen=True):
    """One setting, as the documentation shows it and as `load` reads it.

    `default` is text as in the environment, None where there is none; `documented_default` says it in words where
    it depends on something else. `parse` raises ValueError; `allowed` is what it takes, as the end of a sentence.
    """

    name: str
    default: str | None
    unit: str
    reason: str
    allowed: str
    parse: Callable[[str], Any]
    is_secret: bool = False
    has_effect: bool = True
    default_in_words: str | None = None

    @property
    def field(self) -> str:
        return self.name.lower().removeprefix("holdfast_")

    @property
    def documented_default(self) -> str:
        return self.default_in_words or self.default or "none"


class Row(msgspec.Struct, frozen=True):
    """One line of `holdfast check-config`: a setting, its value without secrets, and where that comes from."""

    name: str
    value: str
    source: str


# Parsing ----------------------------------------------------------------------------------------------


def _whole(least: int, most: int) -> tuple[str, Callable[[str], int]]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise ValueError
        return int(text)

    return f"a whole number from {least} to {most}", parse


def _one_of(*choices: str) -> tuple[str, Callable[[str], str]]:
    def parse(text: str) -> str:
        for choice in choices:
            if choice.casefold() == text.casefold():
                return choice
        raise ValueError

    return f"one of {', '.join(choices)}", parse


def _yes_or_no(text: str) -> bool:
    word = text.casefold()
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise ValueError


def _database_url(text: str) -> str:
    if not text.startswith(("postgresql://", "postgres://")):
        raise ValueError
    try:
        named = conninfo_to_dict(text)
    except psycopg.Error as error:
        # Only this one of libpq's messages is sure to quote no part of a password.
        unknown = re.search(r'invalid URI query parameter: "(\w+)"', str(error))
        raise ValueError(f"PostgreSQL knows no parameter {unknown[1]}" if unknown else "") from error
    for port in str(named.get("port") or "5432").split(","):
        if not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise ValueError("its port must be a number from 1 to 65535")
    return text


def _host(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        # A dotted number that is no address would be taken for a name and looked up.
        is_name = re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*\.?", text) and len(text) <= 253
        if not is_name or re.fullmatch(r"[0-9.]+", text):
            raise ValueError from None
        return text


def _origins(text: str) -> tuple[str, ...]:
    origins = [_origin(part.strip()) for part in text.split(",") if part.strip()]
    if "*" in origins and len(origins) > 1:
        raise ValueError("* stands alone")
    return tuple(dict.fromkeys(origins))


def _origin(text: str) -> str:
    """An origin exactly as browsers write it: lower case, without the scheme's own port."""
    if text == "*":
        return text
    if not re.fullmatch(r"https?://([a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", text, re.IGNORECASE):
        raise ValueError(f'"{redact_text(text)}" is none')
    parts = urlsplit(text.lower())
    try:
        port = parts.port
        if parts.netloc.startswith("["):
            ipaddress.IPv6Address(parts.hostname or "")
    except ValueError as error:
        raise ValueError(f'"{text}" is none') from error
    host = f"[{parts.hostname}]" if parts.netloc.startswith("[") else parts.hostname
    own_port = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" + ("" if port in (None, own_port) else f":{port}")


def _jwt_secret(text: str) -> str:
    if len(text.encode()) < JWT_SECRET_BYTES_MIN:
        raise ValueError(f"it has {len(text.encode())}")
    return text


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("there is no user of this name, or no home directory") from None


def _text(text: str) -> str:
    return text


YES_OR_NO: Final = ("true or false", _yes_or_no)
TEXT: Final = ("any text", _text)

# The table --------------------------------------------------------------------------------------------


def _setting(
    name: str,
    default: str | None,
    unit: str,
    kind: tuple[str, Callable[[str], Any]],
    reason: str,
    *,
    is_secret: bool = False,
    has_effect: bool = True,
    in_words: str | None = None,
) -> Setting:
    return Setting(name, default, unit, reason, *kind, is_secret, has_effect, in_words)


_ENGINE: Final = Limits()
_ORIGINS: Final = "a comma-separated list of origins, such as https://shop.example, or * in development"

SETTINGS: Final[tuple[Setting, ...]] = (
    _setting(
        "APP_ENV", "development", "", _one_of(*AppEnv),
        "`production` knows no made-up users, no internal routes, no `*` for CORS, no unguarded header for identity.",
    ),
    _setting(
        "DATABASE_URL", None, "URL",
        ("a PostgreSQL URL: postgresql://user:password@host:5432/database", _database_url),
        "The PostgreSQL that holds the truth. Without it one is started in the data directory, and kept between runs.",
        is_secret=True, in_words="none: an embedded PostgreSQL",
    ),
    _setting(
        "HOLDFAST_DATA_DIR", ".holdfast", "path", ("a directory", _path),
        "Where the embedded PostgreSQL keeps its data and its log.",
    ),
    _setting(
        "HOST", "127.0.0.1", "", ("an IP address or a host name", _host),
        "The address to listen on. Nobody else can reach the default; 0.0.0.0 or :: let the network in.",
    ),
    _setting(
        "PORT", "4000", "", _whole(0, 65535),
        "The port to listen on, for HTTP and every socket alike. 0 takes any free one.",
    ),
    _setting(
        "CORS_ORIGINS", None, "origins", (_ORIGINS, _origins),
        "Pages of these origins may call the API and open live feeds from a browser; its own page always may.",
        in_words="`*` in development, none in production",
    ),
    _setting(
        "AUTH_MODE", "header", "", _one_of(*AuthMode),
        "Who the caller is: `header` believes `X-User-Id`, `jwt` wants a signed bearer token.",
    ),
    _setting(
        "AUTH_HEADER_TRUSTED", "false", "", YES_OR_NO,
        "Says that a proxy in front sets `X-User-Id` itself and drops what clients send. Without it production refuses"
        " to start with `AUTH_MODE=header`. A proxy that knows people by cookies must serve HTTPS, or make them"
        " `SameSite`: on plain HTTP no browser says that another site's page is asking.",
    ),
    _setting(
        "JWT_SECRET", None, "bytes", (f"at least {JWT_SECRET_BYTES_MIN} bytes", _jwt_secret),
        f"Key of the tokens (HS256), {JWT_SECRET_BYTES_MIN} bytes or more; needed with `AUTH_MODE=jwt`. The issuer's"
        " clock and ours may be 2 s apart: `exp`, `nbf` and `iat` are taken with so much leeway.",
        is_secret=True,
    ),
    _setting("JWT_ISSUER", None, "", TEXT, "When set, tokens of any other issuer (`iss`) are refused."),
    _setting("JWT_AUDIENCE", None, "", TEXT, "When set, tokens for any other audience (`aud`) are refused."),
    _setting(
        "LOG_LEVEL", "INFO", "", _one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
        "The least important lines that are written.",
    ),
    _setting(
        "LOG_FORMAT", None, "", _one_of(*LogFormat),
        "`console` is for eyes, `json` for machines.",
        in_words="`console` in development, `json` in production",
    ),
    _setting(
        "RESERVATION_TTL_SECONDS", "60", "s", _whole(1, 86_400),
        "How long a hold lasts, to the millisecond: long enough to pay, short enough that units come back in time.",
    ),
    _setting(
        "IDEMPOTENCY_KEEP_HOURS", "24", "h", _whole(24, 8_760),
        "How long an `Idempotency-Key` and its answer are kept. Clients are promised 24 h.",
    ),
    _setting(
        "IN_FLIGHT_MAX", str(_ENGINE.in_flight_max), "commands", _whole(1, 1_000_000),
        "Commands asked and not answered yet, over all drops; more get 503 at once. It bounds memory and waiting: the"
        " engine does several times this in a second.",
    ),
    _setting(
        "MAILBOX_MAX", str(_ENGINE.mailbox_max), "commands", _whole(1, 1_000_000),
        "Of these, waiting for one drop: one stormy drop leaves room for the others.",
    ),
    _setting(
        "PART_MAX", str(_ENGINE.part_max), "events", _whole(1, 100_000),
        "What one drop adds to one batch, so that several drops share it. At most `BATCH_MAX`.",
    ),
    _setting(
        "BATCH_MAX", str(_ENGINE.batch_max), "events", _whole(1, 100_000),
        "Events of one commit. More make it longer, and everybody in it waits longer, for little more throughput.",
    ),
    _setting(
        "BODY_MAX_BYTES", "16384", "bytes", _whole(1_024, 1_048_576),
        "Largest body of a request; more is 413. No request of the API needs a tenth of it.",
    ),
    _setting(
        "CONNECTIONS_MAX", "20000", "connections", _whole(1, 1_000_000),
        "Connections of clients that are open at once; one more gets 503, with TLS nothing, and is closed. Each costs"
        " a descriptor and, idle, about 2 KiB.",
    ),
    _setting(
        "TLS_CERTFILE", None, "path",
        ("a PEM file with a certificate and its chain", _path),
        "Serve HTTPS and HTTP/2 with this certificate, not plain HTTP. Behind a proxy that ends TLS leave it out: then"
        " the port has its fast lane.",
    ),
    _setting(
        "TLS_KEYFILE", None, "path", ("a PEM file with a private key", _path),
        "The key of `TLS_CERTFILE`, if it is not in that file.",
    ),
    _setting(
        "POOL_SIZE", "10", "connections", _whole(1, 200),
        "Connections to PostgreSQL for reads, beside the one that writes. The writer never waits for a reader.",
    ),
    _setting(
        "ANSWER_TIMEOUT_MS", "5000", "ms", _whole(100, 60_000),
        "Longest wait for an outcome; then the caller gets 503 OUTCOME_UNKNOWN and may retry with the same key.",
    ),
    _setting(
        "COMMIT_STALL_MS", "900", "ms", _whole(10, 60_000),
        "A commit without an answer for so long counts as an outage: nobody else is kept waiting for it. Below 1 s, so"
        " that it is told from an ordinary slow disk and `/readyz` says so within a second.",
    ),
    _setting(
        "COMMIT_TIMEOUT_MS", "5000", "ms", _whole(100, 60_000),
        "A commit without an answer for so long is given up: its connection is cut and its outcome looked up.",
    ),
    _setting(
        "SHUTDOWN_TIMEOUT_MS", "4000", "ms", _whole(100, 600_000),
        "On SIGTERM, how long requests that were taken may take to be answered. Orchestrators kill after 10 s or more.",
    ),
    _setting(
        "ALLOW_CLOCK_SKEW", "false", "", YES_OR_NO,
        "Starts although the database server's clock and ours are more than 2 s apart. Deadlines are the engine's own"
        " instants, so clients would see them early or late.",
    ),
    _setting(
        "ALLOW_UNSAFE_DURABILITY", "false", "", YES_OR_NO,
        "Starts on a PostgreSQL with `fsync`, `full_page_writes` or `synchronous_commit` off. Acknowledged reservations"
        " are lost in a crash: for tests and throw-away data.",
    ),
    _setting(
        "EXPIRY_POLL_MS", None, "ms", TEXT,
        "Of the earlier systems; accepted without effect. Deadlines are exact, not polled.",
        has_effect=False, in_words="no effect",
    ),
)  # fmt: skip

# Reading ----------------------------------------------------------------------------------------------


class Outlook(msgspec.Struct, frozen=True):
    """What `examine` found: the settings, None where something is wrong with them; and what there is to show."""

    settings: Settings | None
    rows: tuple[Row, ...]
    problems: tuple[str, ...]
    unknown: tuple[str, ...]
    """Names in `.env` that are no settings: other programs' in most cases, misspelt ones in some."""


def load(environ: Mapping[str, str] | None = None, dotenv: Path | None = DOTENV) -> Settings:
    """The settings in effect: `environ` (the process's own) over the file `dotenv`, if it exists, over the defaults.

    An empty value counts as none. Neither source is changed.

    Raises:
        SettingsError: and it lists everything that is wrong, not only the first.
    """
    outlook = examine(environ, dotenv)
    if outlook.settings is None:
        raise SettingsError(outlook.problems)
    return outlook.settings


def examine(environ: Mapping[str, str] | None = None, dotenv: Path | None = DOTENV) -> Outlook:
    """`load` for people: raises nothing, and says where each value comes from."""
    environ = os.environ if environ is None else environ
    problems: list[str] = []
    from_file = _read_dotenv(dotenv, problems)
    values: dict[str, Any] = {"ignored": ()}
    sources: dict[str, str] = {}
    shown_anyway: dict[str, str] = {}
    for setting in SETTINGS:
        text, source = _given(setting, environ, from_file, dotenv)
        sources[setting.name] = source
        if not setting.has_effect:
            if text is not None:
                values["ignored"] += (setting.name,)
            continue
        try:
            values[setting.field] = None if text is None else setting.parse(text)
        except ValueError as error:
            shown_text = _quoted(setting, text or "")
            shown_anyway[setting.name] = f"{shown_text} (wrong)"
            problems.append(_sentence(setting, shown_text, str(error)))
    _settle_dependent(values)
    problems += _contradictions(values)
    settings = None if problems else Settings(**values)
    rows = tuple(
        Row(
            setting.name,
            shown_anyway.get(setting.name) or _display(setting, values.get(setting.field)),
            sources[setting.name],
        )
        for setting in SETTINGS
        if setting.has_effect
    )
    unknown = tuple(sorted(from_file.keys() - {setting.name for setting in SETTINGS}))
    return Outlook(settings, rows, tuple(problems), unknown)


def shown(settings: Settings) -> list[Row]:
    """Every setting in effect, secrets redacted, in the order of the table."""
    return [
        Row(setting.name, _display(setting, getattr(settings, setting.field)), "")
        for setting in SETTINGS
        if setting.has_effect
    ]


def _read_dotenv(path: Path | None, problems: list[str]) -> dict[str, str]:
    """The file's assignments, taken literally: a `$` in a password is a `$`."""
    if path is None or not path.is_file():
        return {}
    values: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            for binding in parse_stream(file):
                if binding.error:
                    # The line may be half a secret: its number says enough.
                    problems.append(f"{path}, line {binding.original.line}: this is no assignment NAME=value.")
                elif binding.key is not None and binding.value is not None:
                    values[binding.key] = binding.value
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror}.")
    except UnicodeDecodeError:
        problems.append(f"{path} cannot be read: it is not UTF-8 text.")
    return values


def _given(
    setting: Setting, environ: Mapping[str, str], from_file: Mapping[str, str], dotenv: Path | None
) -> tuple[str | None, str]:
    for source, name in ((environ, "environment"), (from_file, str(dotenv))):
        text = source.get(setting.name, "")
        if text.strip():
            # Blanks around a value are an accident, except in a secret, where they may be meant.
            return (text if setting.is_secret and setting.name != "DATABASE_URL" else text.strip()), name
    return setting.default, "default"


def _settle_dependent(values: dict[str, Any]) -> None:
    """Give the settings whose default depends on another one theirs, and plain words their type."""
    if "app_env" in values:
        values["app_env"] = app_env = AppEnv(values["app_env"])
        is_production = app_env is AppEnv.PRODUCTION
        if "cors_origins" in values and values["cors_origins"] is None:
            values["cors_origins"] = () if is_production else ("*",)
        if "log_format" in values and values["log_format"] is None:
            values["log_format"] = LogFormat.JSON if is_production else LogFormat.CONSOLE
    if values.get("log_format") is not None:
        values["log_format"] = LogFormat(values["log_format"])
    if "auth_mode" in values:
        values["auth_mode"] = AuthMode(values["auth_mode"])


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """What is wrong between settings that are right by themselves; those that are not have been complained about."""
    problems = []
    is_production = values.get("app_env") is AppEnv.PRODUCTION
    if is_production and "*" in (values.get("cors_origins") or ()):
        problems.append("CORS_ORIGINS is *: in production it must name each origin, or be left out.")
    if is_production and values.get("auth_mode") is AuthMode.HEADER and values.get("auth_header_trusted") is False:
        problems.append(
            "AUTH_MODE is header, and APP_ENV is production: anybody could act as anybody. Use AUTH_MODE=jwt, or set"
            " AUTH_HEADER_TRUSTED=true if a proxy in front sets X-User-Id itself and drops what clients send."
        )
    if values.get("auth_mode") is AuthMode.JWT and "jwt_secret" in values and values["jwt_secret"] is None:
        problems.append(f"JWT_SECRET is missing: AUTH_MODE=jwt needs one of at least {JWT_SECRET_BYTES_MIN} bytes.")
    if values.get("tls_keyfile") is not None and values.get("tls_certfile", "") is None:
        problems.append("TLS_CERTFILE is missing: TLS_KEYFILE is of no use without it.")
    for small, large in (
        ("PART_MAX", "BATCH_MAX"),
        ("COMMIT_STALL_MS", "COMMIT_TIMEOUT_MS"),
        ("COMMIT_STALL_MS", "ANSWER_TIMEOUT_MS"),
    ):
        less, more = values.get(small.lower()), values.get(large.lower())
        if less is not None and more is not None and less > more:
            problems.append(f"{small} is {less}: it must not be more than {large}, which is {more}.")
    return problems


def _sentence(setting: Setting, shown_text: str, detail: str) -> str:
    unit = f" ({setting.unit})" if setting.unit in ("s", "h", "ms", "bytes") and not setting.is_secret else ""
    return f"{setting.name} is {shown_text}: it must be {setting.allowed}{unit}" + (f"; {detail}." if detail else ".")


def _quoted(setting: Setting, text: str) -> str:
    if setting.is_secret:
        # A URL that cannot be parsed cannot be redacted with certainty either.
        return REDACTED
    return f'"{redact_text(text if len(text) <= 100 else text[:100] + "…")}"'


def _display(setting: Setting, value: Any) -> str:
    if value is None or value == ():
        return "none"
    if setting.name == "DATABASE_URL":
        return redact_text(str(value))
    if setting.is_secret:
        return REDACTED
    if isinstance(value, tuple):
        return ", ".join(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
