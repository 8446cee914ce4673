"""Addresses as people paste them: each works, or is refused with a right hint, and no secret is shown."""

from __future__ import annotations

import logging
from pathlib import Path
from urllib.parse import quote

import pytest
import redis.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemobus import Settings, SettingsError
from mnemobus.addresses import database_address, redis_address

# Redis


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("REDIS://h:1/2", "redis://h:1/2"),
        ("valkey://h", "redis://h"),
        ("valkeys://h", "rediss://h"),
        ("redis+ssl://h", "rediss://h"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        ("redis://h?db=2&client_name=a%20b", "redis://h?db=2&client_name=a+b"),
        ("redis://h/0?family=0&maxRetriesPerRequest=null", "redis://h/0"),
        ("rediss://h?ssl_cert_reqs=CERT_NONE&tls=true", "rediss://h?ssl_cert_reqs=none"),
        ("redis://h?ssl=false", "redis://h"),
    ],
)
def test_a_redis_address_that_works(given: str, used: str) -> None:
    assert redis_address(given) == used
    # It is handed on to other processes, who see the same
    assert redis_address(used) == used
    options = redis.asyncio.connection.parse_url(used)
    made = options.pop("connection_class", redis.asyncio.Connection)
    made(**options)  # redis-py knows every option that is left


def test_a_password_with_an_at_sign_is_understood() -> None:
    options = redis.asyncio.connection.parse_url(redis_address("redis://:p@ss@h:1"))
    assert (options["password"], options["host"], options["port"]) == ("p@ss", "h", 1)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("h:6379", "must begin with redis://, rediss:// or unix://"),
        (
            "redis+sentinel://h/mymaster",
            "redis+sentinel:// is not supported: name the server that takes writes",
        ),
        ("redis-cluster://h", "is not supported"),
        ("redis://h1:1,h2:2", "One server is named, not several"),
        ("redis://[::1/0", "the port must be a number"),
        (
            "redis://:hun/ter2@h",
            "in a password, characters such as @ / : ? # % and spaces must be percent-encoded",
        ),
        ("redis://u:12/hunter2@h/0", "must be percent-encoded"),
        ("redis://:hunter#2@h:1/0", "must be percent-encoded"),
        ("redis://:1?hunter@h:1/0", "must be percent-encoded"),
        ("redis://h?tls=true", "?tls= contradicts the scheme: rediss:// is TLS, redis:// is not"),
        ("rediss://h?ssl=0", "?ssl= contradicts the scheme"),
        (
            "redis://h?ssl_cert_reqs=none",
            "?ssl_cert_reqs= is for TLS: write rediss://, or leave the option out",
        ),
        ("rediss://h?ssl_cert_reqs=sometimes", "?ssl_cert_reqs= must be required, optional or none"),
        ("rediss://h?ssl_ca_certs=/no/such/file", "?ssl_ca_certs= names a file that is not there"),
        ("rediss://h?ssl_check_hostname=perhaps", "?ssl_check_hostname= must be true or false"),
        ("rediss://h?ssl_min_version=TLSv1_2", "?ssl_min_version= must be a number"),
        ("rediss://h?ssl_cert_req=none", "?ssl_cert_req= is not an option that mnemobus knows; leave it out"),
        ("redis://h?db=x", "?db= must be a database's number"),
        ("unix://run/redis.sock", "unix:// needs the whole path of a socket"),
        ("unix://", "unix:// needs the whole path of a socket"),
    ],
)
def test_a_redis_address_that_does_not_says_why(given: str, hint: str) -> None:
    with pytest.raises(ValueError) as caught:
        redis_address(given)
    assert hint in str(caught.value)
    assert "hunter" not in str(caught.value) and "ter2" not in str(caught.value)


# Databases


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("sqlite:///x.db", "sqlite:///x.db"),
        ("SQLite:////abs/x.db", "sqlite:////abs/x.db"),
        ("sqlite+aiosqlite:///x.db", "sqlite:///x.db"),
        ("postgres://u:p@h/d", "postgresql://u:p@h/d"),
        ("POSTGRESQL://u:p@h/d", "postgresql://u:p@h/d"),
        ("postgresql+psycopg://u:p@h/d", "postgresql://u:p@h/d"),
        ("postgresql+asyncpg://u:p@h/d?ssl=require", "postgresql://u:p@h/d?sslmode=require"),
        ("postgres://u:p@h/d?ssl=true&sslmode=verify-full", "postgresql://u:p@h/d?sslmode=verify-full"),
        ("postgres://u:p@h/d?sslmode=verify-full&ssl=true", "postgresql://u:p@h/d?sslmode=verify-full"),
        ("postgres://u:p@h/d?pgbouncer=true&connection_limit=1", "postgresql://u:p@h/d"),
        ("postgres://u:p@h/d?schema=public&sslmode=require", "postgresql://u:p@h/d?sslmode=require"),
        ("postgresql://u:p@/w@h:1,[::1]:2/d", "postgresql://u:p%40%2Fw@h:1,[::1]:2/d"),
        (
            "postgresql:///d?host=/run&options=-c%20a%3Db+c",
            "postgresql:///d?host=%2Frun&options=-c%20a%3Db%2Bc",
        ),
    ],
)
def test_a_database_address_that_works(given: str, used: str) -> None:
    assert database_address(given) == used
    assert database_address(used) == used


FORMS = "must be sqlite:///path/to/file.db or postgresql://user:password@host/database"


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("mysql://u:hunter2@h/d", f"{FORMS}; mysql can't hold the memories"),
        ("mysql+pymysql://u:hunter2@h/d", "mysql can't hold the memories"),
        ("mongodb+srv://u:hunter2@h/d", "mongodb can't hold the memories"),
        ("prisma+nonsense://x", FORMS),
        ("memories.db", FORMS),
        ("sqlite://memories.db", "three slashes, and four before an absolute path"),
        ("sqlite:///", FORMS),
        ("sqlite:///:memory:", "a database in memory can't be shared by agents and workers; name a file"),
        ("sqlite:///file::memory:?cache=shared", "a database in memory can't be shared"),
        ("sqlite:///x?mode=memory", "a database in memory can't be shared"),
        ("file::memory:", "a database in memory can't be shared"),
        ("sqlite:///file:x.db", "write the path itself, without file:"),
        ("sqlite:///x.db?timeout=20&cache=shared", "?timeout=, ?cache=: options of SQLite are not taken"),
        ("sqlite:///~nobody-of-this-name/x.db", "~ names no home directory that is known here"),
        ("postgresql://u:p@h:port/d", "is not of the form postgresql://user:password@host:port/database"),
        ("postgresql://u:hunter2%@h/d", "has a % that is not followed by two hexadecimal digits"),
        ("postgresql://h/d?sslmod=require", "?sslmod= is not an option of PostgreSQL; leave it out"),
        ("postgresql://h/d?sslmode=on", "?sslmode= must be one of disable, allow, prefer, require"),
        ("postgresql://h/d?ssl=perhaps", "?ssl= must be one of disable"),
    ],
)
def test_a_database_address_that_does_not_says_why(given: str, hint: str) -> None:
    with pytest.raises(ValueError) as caught:
        database_address(given)
    assert hint in str(caught.value)
    assert "hunter" not in str(caught.value)


def test_a_home_directory_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/amara")
    found = Settings.load(database_url="sqlite:///~/m.db", data_dir="~/data", outbox="~/outbox.db")
    assert found.database_url == "sqlite:////amara/m.db"
    assert (found.data_dir, found.outbox) == (Path("/amara/data"), "/amara/outbox.db")


def test_an_option_that_is_left_out_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        redis_address("redis://h?socket_timeout=5")
        database_address("postgresql://h/d?schema=public")
    assert "REDIS_URL: the option socket_timeout is ignored: MNEMOBUS_REDIS_TIMEOUT sets that" in caplog.text
    assert "the option schema is another tool's, and is ignored" in caplog.text


@settings(deadline=None)  # the first one imports psycopg
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_password_reaches_postgresql_as_it_is_once_it_is_encoded(password: str) -> None:
    psycopg = pytest.importorskip("psycopg")
    url = database_address(f"postgresql+asyncpg://amara:{quote(password, safe='')}@h:5/d?sslmode=require")
    found = psycopg.conninfo.conninfo_to_dict(url)
    assert found == {
        "user": "amara",
        "password": password,
        "host": "h",
        "port": "5",
        "dbname": "d",
        "sslmode": "require",
    }


@settings(deadline=None)
@given(st.sampled_from(["redis://", "rediss://", "postgresql://", "sqlite:///", "mysql://", ""]), st.text())
def test_whatever_is_pasted_gives_an_address_or_a_settings_error(scheme: str, rest: str) -> None:
    for name in ("redis_url", "database_url"):
        try:
            Settings.load(**{name: scheme + rest})
        except SettingsError as error:
            assert str(error).startswith(("REDIS_URL: ", "MNEMOBUS_DATABASE_URL: "))
