"""Settings: defaults, where they come from, what is refused and how it is said, and that the documents keep up."""

import os
import re
from pathlib import Path

import pytest

from api.logs import LogFormat
from api.settings import SETTINGS, AppEnv, AuthMode, Setting, Settings, SettingsError, examine, load, shown
from engine.registry import Limits

ROOT = Path(__file__).parents[2]
SECRET = "0123456789abcdef0123456789abcdef"  # 32 bytes

IN_PRODUCTION = {"APP_ENV": "production", "AUTH_MODE": "jwt", "JWT_SECRET": SECRET}


def given(**environ: str) -> Settings:
    return load(environ, dotenv=None)


def problems(**environ: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as refused:
        load(environ, dotenv=None)
    return refused.value.problems


def problem(**environ: str) -> str:
    (only,) = problems(**environ)
    return only


# Defaults and sources ---------------------------------------------------------------------------------


def test_nothing_given_is_a_development_server_on_an_embedded_database() -> None:
    settings = given()
    assert settings.app_env is AppEnv.DEVELOPMENT
    assert settings.database_url is None
    assert (settings.host, settings.port) == ("127.0.0.1", 4000)
    assert settings.reservation_ttl_seconds == 60
    assert settings.hold_ms == 60_000
    assert settings.auth_mode is AuthMode.HEADER
    assert settings.log_format is LogFormat.CONSOLE
    assert settings.cors_origins == ("*",)
    assert settings.data_dir == Path(".holdfast")
    assert settings.body_max_bytes == 16_384
    assert settings.idempotency_keep_hours == 24
    assert settings.ignored == ()


def test_the_engines_limits_are_its_own_where_none_are_given() -> None:
    assert given().limits == Limits()


def test_the_engines_limits_are_the_ones_that_are_given() -> None:
    limits = given(IN_FLIGHT_MAX="7", MAILBOX_MAX="6", PART_MAX="4", BATCH_MAX="5", COMMIT_STALL_MS="250").limits
    assert limits == Limits(in_flight_max=7, mailbox_max=6, part_max=4, batch_max=5, stall_s=0.25)


def test_production_defaults_are_strict() -> None:
    settings = given(**IN_PRODUCTION)
    assert settings.cors_origins == ()
    assert settings.log_format is LogFormat.JSON


def test_an_empty_value_counts_as_none() -> None:
    assert given(PORT="", DATABASE_URL="  ", LOG_FORMAT="") == given()


def test_blanks_around_a_value_are_no_part_of_it() -> None:
    assert given(PORT=" 4001\n").port == 4001


def test_the_file_is_read_and_the_environment_wins(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text('# a comment\nexport PORT=5000\nHOST="0.0.0.0"\nJWT_ISSUER=costs $5 ${PORT}\n')
    settings = load({"PORT": "6000"}, dotenv=file)
    assert settings.port == 6000
    assert settings.host == "0.0.0.0"
    assert settings.jwt_issuer == "costs $5 ${PORT}"  # literally: a password may hold a $


def test_an_empty_variable_does_not_hide_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("PORT=5000\n")
    assert load({"PORT": ""}, dotenv=file).port == 5000


def test_reading_the_file_leaves_the_environment_alone(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("PORT=5000\nHOLDFAST_TEST_MARK=1\n")
    before = dict(os.environ)
    load(dotenv=file)
    assert dict(os.environ) == before


def test_a_file_that_does_not_exist_is_no_problem(tmp_path: Path) -> None:
    assert load({}, dotenv=tmp_path / ".env") == given()


def test_a_broken_line_of_the_file_is_named_by_its_number_and_not_quoted(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text('PORT=5000\nJWT_SECRET="hunter2 without an end\n')
    with pytest.raises(SettingsError) as refused:
        load({}, dotenv=file)
    (said,) = refused.value.problems
    assert "line 2" in said
    assert "hunter2" not in said


def test_a_file_that_is_no_text_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes(b"PORT=\xff\xfe\n")
    with pytest.raises(SettingsError, match="UTF-8"):
        load({}, dotenv=file)


def test_names_in_the_file_that_are_no_settings_are_pointed_out(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("RESERVATION_TTL_SECOND=5\nPORT=5000\n")
    assert examine({}, dotenv=file).unknown == ("RESERVATION_TTL_SECOND",)


def test_where_a_value_comes_from_is_shown(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("HOST=0.0.0.0\n")
    sources = {row.name: row.source for row in examine({"PORT": "1"}, dotenv=file).rows}
    assert (sources["PORT"], sources["HOST"], sources["LOG_LEVEL"]) == ("environment", str(file), "default")


def test_the_poll_interval_of_the_earlier_systems_is_accepted_and_said_to_be_ignored() -> None:
    assert given(EXPIRY_POLL_MS="whatever").ignored == ("EXPIRY_POLL_MS",)


# What is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("PORT", ("0", "1", "65535"), ("-1", "65536", "4000.0", "http", "0x10", "٤", "9" * 5000)),
        ("RESERVATION_TTL_SECONDS", ("1", "86400"), ("0", "86401", "1.5", "60s", "-60", "NaN")),
        ("IDEMPOTENCY_KEEP_HOURS", ("24", "8760"), ("23", "0")),
        ("BODY_MAX_BYTES", ("1024", "1048576"), ("1023", "1048577")),
        ("LOG_LEVEL", ("debug", "INFO", "Warning", "ERROR", "critical"), ("loud", "10")),
        ("LOG_FORMAT", ("json", "console", "JSON"), ("xml",)),
        ("APP_ENV", ("development",), ("test", "prod")),
        ("AUTH_MODE", ("header",), ("none", "cookie")),
        ("ALLOW_CLOCK_SKEW", ("true", "FALSE", "1", "0", "yes", "no", "on", "off"), ("2", "maybe")),
        (
            "HOST",
            ("localhost", "0.0.0.0", "::", "[::1]", "shop.example", "a-b"),
            ("a b", "http://x", "-a", "1.2.3", "x/y", "a..b"),
        ),
        (
            "DATABASE_URL",
            ("postgres://h/d", "postgresql://u:p@h:5432/d?sslmode=require", "postgresql:///d?host=/run/pg"),
            ("mysql://h/d", "host=h dbname=d", "postgresql://h:0/d", "postgresql://h:x/d", "postgresql+psycopg://h/d"),
        ),
        (
            "CORS_ORIGINS",
            ("*", "http://localhost:5173", "https://a.example, https://b.example", "http://[::1]:3000"),
            (
                *("shop.example", "https://shop.example/", "https://shop.example/path", "ftp://shop.example", "null"),
                *("https://u:p@shop.example", "http://x:99999", "*, http://x", "https://*.shop.example", "http://[zz]"),
            ),
        ),
    ],
)
def test_both_sides_of_each_boundary(name: str, good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    for value in good:
        given(**{name: value})
    for value in bad:
        said = problem(**{name: value})
        assert said.startswith(f"{name} is ")
        assert "must" in said
        assert said.endswith(".")
        assert len(said) < 400


def test_everything_that_is_wrong_is_said_at_once() -> None:
    said = problems(PORT="x", HOST="a b", RESERVATION_TTL_SECONDS="0", AUTH_MODE="jwt")
    assert [sentence.split()[0] for sentence in said] == ["HOST", "PORT", "RESERVATION_TTL_SECONDS", "JWT_SECRET"]


def test_a_sentence_names_the_value_and_what_is_allowed() -> None:
    assert problem(RESERVATION_TTL_SECONDS="0") == (
        'RESERVATION_TTL_SECONDS is "0": it must be a whole number from 1 to 86400 (s).'
    )


def test_a_parameter_that_postgresql_does_not_know_is_named() -> None:
    assert "schema" in problem(DATABASE_URL="postgresql://u:hunter2@h/d?schema=public")


def test_origins_are_kept_as_browsers_write_them() -> None:
    settings = given(CORS_ORIGINS="HTTPS://Shop.Example:443, http://localhost:80,http://localhost:5173")
    assert settings.cors_origins == ("https://shop.example", "http://localhost", "http://localhost:5173")
    assert settings.allows_origin("https://shop.example")
    assert not settings.allows_origin("https://shop.example.evil.example")


def test_any_origin_is_for_development_only() -> None:
    assert given(CORS_ORIGINS="*").allows_origin("https://anywhere.example")
    assert problem(**IN_PRODUCTION, CORS_ORIGINS="*").startswith("CORS_ORIGINS is *: in production")


def test_production_refuses_an_identity_header_that_nobody_guards() -> None:
    assert "AUTH_HEADER_TRUSTED=true" in problem(APP_ENV="production")
    assert given(APP_ENV="production", AUTH_HEADER_TRUSTED="true").auth_mode is AuthMode.HEADER


def test_tokens_need_a_key_of_32_bytes() -> None:
    assert "JWT_SECRET is missing" in problem(AUTH_MODE="jwt")
    assert "it has 31" in problem(AUTH_MODE="jwt", JWT_SECRET=SECRET[1:])
    assert given(AUTH_MODE="jwt", JWT_SECRET=SECRET).jwt_secret == SECRET
    assert given(AUTH_MODE="jwt", JWT_SECRET="ä" * 16).jwt_secret == "ä" * 16  # bytes, not characters


def test_blanks_may_be_part_of_a_secret() -> None:
    assert given(JWT_SECRET=f" {SECRET} ").jwt_secret == f" {SECRET} "


def test_limits_that_contradict_each_other_are_refused() -> None:
    assert "PART_MAX is 9" in problem(PART_MAX="9", BATCH_MAX="8")
    assert given(PART_MAX="8", BATCH_MAX="8").part_max == 8
    assert len(problems(COMMIT_STALL_MS="5001")) == 2


# Secrets ----------------------------------------------------------------------------------------------


def test_no_secret_is_shown() -> None:
    url = "postgresql://app:hunter2@db.example/shop?password=hunter3"
    settings = given(DATABASE_URL=url, JWT_SECRET=SECRET)
    text = repr(settings) + str(settings) + str(shown(settings)) + str(examine({"DATABASE_URL": url}, None).rows)
    assert "hunter" not in text
    assert SECRET not in text
    assert "postgresql://app:***@db.example/shop" in text  # the rest of it is worth seeing


@pytest.mark.parametrize(
    "environ",
    [
        {"JWT_SECRET": "hunter2"},
        {"DATABASE_URL": "mysql://app:hunter2@db/shop"},
        {"DATABASE_URL": "postgresql://app:hunter2@db:port/shop"},
        {"DATABASE_URL": "postgresql://app:hunter2@db/shop?password=hunter2&nonsense=hunter2"},
        {"CORS_ORIGINS": "https://app:hunter2@shop.example"},
    ],
)
def test_a_complaint_quotes_no_secret(environ: dict[str, str]) -> None:
    assert "hunter2" not in problem(**environ)
    assert "hunter2" not in str(examine(environ, None).rows)


# The documents ----------------------------------------------------------------------------------------


def test_every_setting_has_a_field_and_every_field_a_setting() -> None:
    fields = set(Settings.__struct_fields__) - {"ignored"}
    assert {setting.field for setting in SETTINGS if setting.has_effect} == fields


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_readme_has_a_row_for(setting: Setting) -> None:
    rows = re.findall(rf"^\| *`{setting.name}` *\|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 1, f"README's table of settings has {len(rows)} rows for {setting.name}"
    assert setting.documented_default.strip("`") in rows[0]
    assert setting.reason in rows[0]


def test_readme_and_example_name_no_setting_that_does_not_exist() -> None:
    names = {setting.name for setting in SETTINGS}
    assert set(example()) == names
    section = (ROOT / "README.md").read_text()
    in_readme = set(re.findall(r"^\| *`([A-Z][A-Z0-9_]+)` *\|", section, re.MULTILINE))
    assert in_readme <= names | {"PG_BIN", "TMPDIR"}


def test_the_example_shows_each_default_and_every_line_of_it_is_valid() -> None:
    lines = example()
    for setting in SETTINGS:
        if setting.default is not None:
            assert lines[setting.name] == setting.default
    load({**lines, "JWT_SECRET": SECRET}, dotenv=None)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_the_example_says_what_it_is_for(setting: Setting) -> None:
    (above,) = re.findall(rf"((?:^# .*\n)+)^#{setting.name}=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert setting.reason.replace("`", "") in above.removeprefix("# ").replace("\n# ", " ")


def example() -> dict[str, str]:
    text = (ROOT / ".env.example").read_text()
    return dict(re.findall(r"^#([A-Z_]+)=(.*)$", text, re.MULTILINE))
