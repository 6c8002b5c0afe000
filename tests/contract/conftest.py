"""Real servers for the contract, each with a database of its own; started when the first test asks for one.

- `shop`: development, holds of 60 s; every test of it runs under both base paths
- `hasty`: the same with holds of 2 s
- `strict`: production, behind a proxy that sets X-User-Id, one page allowed to call
- `tokens`: AUTH_MODE=jwt
- `certificate`: a file with a certificate for 127.0.0.1 and its key, for servers that speak TLS
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from persistence.embedded import EmbeddedServer
from tests.conftest import _new_database
from tests.contract.shop import PATIENCE_S, Shop
from tests.server import Server, serving

JWT_SECRET = "a secret of at least thirty-two bytes"
PAGE = "https://shop.example"


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    """One client for all: its connections are kept alive, so an answer that spoils its connection is noticed."""
    with httpx.Client(timeout=PATIENCE_S) as http:
        yield http


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(params=["/api/v1", "/api"])
def base(request: pytest.FixtureRequest) -> str:
    base: str = request.param
    return base


@pytest.fixture(scope="session")
def shop_server(server: EmbeddedServer, template: str, logs: Path) -> Iterator[Server]:
    with _new_database(server, template) as dsn, serving(dsn, logs / "shop.log") as running:
        yield running


@pytest.fixture
def shop(shop_server: Server, base: str, http: httpx.Client) -> Shop:
    return Shop(shop_server, base, http)


@pytest.fixture(scope="session")
def hasty_server(server: EmbeddedServer, template: str, logs: Path) -> Iterator[Server]:
    with (
        _new_database(server, template) as dsn,
        serving(dsn, logs / "hasty.log", RESERVATION_TTL_SECONDS="2") as running,
    ):
        yield running


@pytest.fixture
def hasty(hasty_server: Server, http: httpx.Client) -> Shop:
    return Shop(hasty_server, "/api/v1", http)


@pytest.fixture(scope="session")
def strict_server(server: EmbeddedServer, template: str, logs: Path) -> Iterator[Server]:
    with (
        _new_database(server, template) as dsn,
        serving(
            dsn, logs / "strict.log", APP_ENV="production", AUTH_HEADER_TRUSTED="true", CORS_ORIGINS=PAGE
        ) as running,
    ):
        yield running


@pytest.fixture
def strict(strict_server: Server, base: str, http: httpx.Client) -> Shop:
    return Shop(strict_server, base, http)


@pytest.fixture
def known_user(strict_server: Server) -> str:
    """Id of a user whom the production server has."""
    with psycopg.connect(strict_server.dsn, autocommit=True) as connection:
        row = connection.execute(
            "INSERT INTO users (id, username, created_at)"
            " VALUES (gen_random_uuid(), 'known_' || left(md5(random()::text), 12), now()) RETURNING id::text"
        ).fetchone()
    assert row is not None
    user_id: str = row[0]
    return user_id


@pytest.fixture(scope="session")
def tokens_server(server: EmbeddedServer, template: str, logs: Path) -> Iterator[Server]:
    with (
        _new_database(server, template) as dsn,
        serving(dsn, logs / "tokens.log", APP_ENV="production", AUTH_MODE="jwt", JWT_SECRET=JWT_SECRET) as running,
    ):
        yield running


@pytest.fixture
def tokens(tokens_server: Server, base: str, http: httpx.Client) -> Shop:
    return Shop(tokens_server, base, http)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-signed, so that it is its own authority."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl command to make a certificate with")
    pem = tmp_path_factory.mktemp("tls") / "server.pem"
    command = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [openssl, *command.split(), "-keyout", pem, "-out", pem.with_suffix(".crt")], check=True, capture_output=True
    )
    with pem.open("ab") as file:
        file.write(pem.with_suffix(".crt").read_bytes())
    return pem
