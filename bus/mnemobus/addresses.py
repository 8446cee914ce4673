"""Addresses of servers, as people paste them from a hosting provider's page or from another tool's configuration.

Each is converted to the form that mnemobus uses. An invalid one is a ValueError that says what is wrong and shows no
secret. Options of other tools that change nothing here are ignored with a warning. All other unknown options are
refused: one may be a misspelled option that protects something.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

logger = logging.getLogger("mnemobus.settings")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ENCODE = "in a password, characters such as @ / : ? # % and spaces must be percent-encoded"

# Redis

_REDIS_SCHEMES = {"valkey": "redis", "valkeys": "rediss", "redis+ssl": "rediss", "redis+socket": "unix"}
"""Other names of the schemes."""
_REDIS_OPTIONS = frozenset(("db", "username", "password", "client_name", "socket_keepalive"))
_TLS_OPTIONS = frozenset(
    f"ssl_{name}"
    for name in (
        "keyfile",
        "certfile",
        "cert_reqs",
        "ca_certs",
        "ca_data",
        "ca_path",
        "check_hostname",
        "min_version",
        "ciphers",
        "password",
    )
)
_REDIS_IGNORED = {
    "family": "addresses of both families are tried anyway",
    "protocol": "MNEMOBUS_REDIS_PROTOCOL sets that",
    "socket_timeout": "MNEMOBUS_REDIS_TIMEOUT sets that",
    "socket_connect_timeout": "REDIS_CREATE_TIMEOUT sets that",
    "connecttimeout": "REDIS_CREATE_TIMEOUT sets that",
    "timeout": "MNEMOBUS_REDIS_TIMEOUT sets that",
    "max_connections": "REDIS_POOL_MAX sets that",
    "pool_size": "REDIS_POOL_MAX sets that",
    "decode_responses": "it changes nothing here",
    "encoding": "it changes nothing here",
    "health_check_interval": "connections are checked anyway",
    "retry_on_timeout": "what can be repeated is repeated anyway",
    "maxretriesperrequest": "what can be repeated is repeated anyway",
}
_YES = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


def redis_address(url: str) -> str:
    """The URL of a Redis server, in the form that redis-py expects."""
    scheme, colon, rest = url.partition("://")
    scheme = _REDIS_SCHEMES.get(scheme.lower(), scheme.lower())
    if "sentinel" in scheme or "cluster" in scheme:
        raise ValueError(
            f"{scheme}:// is not supported: name the server that takes writes, as redis://host:6379/0"
        )
    if not colon or scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must begin with redis://, rediss:// or unix://")
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        port = parts.port if scheme != "unix" else None
    except ValueError:
        raise ValueError(
            f"the port must be a number from 1 to 65535. One server is named, not several; {_ENCODE}"
        ) from None
    if port == 0:
        raise ValueError("the port must be a number from 1 to 65535")
    if parts.fragment or "@" in parts.path or ("@" in parts.query and "@" not in parts.netloc):
        raise ValueError(f"is not of the form {scheme}://user:password@host:6379/0; {_ENCODE}")
    if scheme == "unix":
        if parts.hostname or parts.path in ("", "/"):
            raise ValueError("unix:// needs the whole path of a socket, as in unix:///run/redis/redis.sock")
    elif not re.match(r"(/[0-9]*)?\Z", parts.path):
        raise ValueError(f"what follows the address must be a database's number, not {parts.path!r}")
    options = _redis_options(parts.query, tls=scheme == "rediss")
    query = f"?{urlencode(options)}" if options else ""
    return f"{scheme}://{parts.netloc}{parts.path}{query}"


def _redis_options(query: str, *, tls: bool) -> dict[str, str]:
    options: dict[str, str] = {}
    for given, value in parse_qsl(query, keep_blank_values=True):
        name = given.lower()
        if name in ("ssl", "tls"):
            if _YES.get(value.lower(), True) != tls:
                raise ValueError(f"?{given}= contradicts the scheme: rediss:// is TLS, redis:// is not")
        elif name in _TLS_OPTIONS:
            if not tls:
                raise ValueError(f"?{given}= is for TLS: write rediss://, or leave the option out")
            options[name] = _tls_option(name, value)
        elif name == "db":
            if not value.isascii() or not value.isdigit():
                raise ValueError("?db= must be a database's number")
            options[name] = value
        elif name in _REDIS_OPTIONS:
            options[name] = value
        elif name in _REDIS_IGNORED:
            logger.warning("REDIS_URL: the option %s is ignored: %s", given, _REDIS_IGNORED[name])
        else:
            raise ValueError(f"?{_shown(given)}= is not an option that mnemobus knows; leave it out")
    return options


def _tls_option(name: str, value: str) -> str:
    if name == "ssl_cert_reqs":
        value = value.lower().removeprefix("cert_")  # as Python's ssl module names them
        if value not in ("none", "optional", "required"):
            raise ValueError("?ssl_cert_reqs= must be required, optional or none")
    elif name == "ssl_check_hostname" and value.lower() not in _YES:
        raise ValueError("?ssl_check_hostname= must be true or false")
    elif name == "ssl_min_version" and not value.isdigit():
        raise ValueError("?ssl_min_version= must be a number of Python's ssl.TLSVersion, as 771 for TLS 1.2")
    elif name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_ca_path") and not Path(value).exists():
        raise ValueError(f"?{name}= names a file that is not there")
    return value


def _shown(name: str) -> str:
    """The name of an option, for a message. Part of a password that was not encoded may look like a name."""
    return name if re.match(r"[A-Za-z][A-Za-z0-9_.\-]{0,40}\Z", name) else "..."


# Databases

_DATABASE_FORMS = "must be sqlite:///path/to/file.db or postgresql://user:password@host/database"
_IN_MEMORY = "a database in memory can't be shared by agents and workers; name a file, as in sqlite:///.mnemobus/memories.db"
_OTHER_DATABASES = (
    "mysql",
    "mariadb",
    "mssql",
    "oracle",
    "mongodb",
    "mongodb+srv",
    "cockroachdb",
    "redis",
    "libsql",
)

_LIBPQ = _words(
    "application_name channel_binding client_encoding connect_timeout dbname fallback_application_name gssdelegation"
    " gssencmode gsslib host hostaddr keepalives keepalives_count keepalives_idle keepalives_interval krbsrvname"
    " load_balance_hosts max_protocol_version min_protocol_version oauth_client_id oauth_client_secret oauth_issuer"
    " oauth_scope options passfile password port replication require_auth requirepeer requiressl scram_client_key"
    " scram_server_key service servicefile ssl_max_protocol_version ssl_min_protocol_version sslcert sslcertmode"
    " sslcompression sslcrl sslcrldir sslkey sslkeylogfile sslmode sslnegotiation sslpassword sslrootcert sslsni"
    " target_session_attrs tcp_user_timeout user"
)
"""The options of PostgreSQL's own library, up to version 18."""
_POSTGRES_IGNORED = _words(
    "async_fallback binary_parameters charset command_timeout connection_limit max_cached_statement_lifetime"
    " max_cacheable_statement_size max_overflow pgbouncer pool pool_max_conns pool_mode pool_recycle pool_size"
    " pool_timeout prefer_simple_protocol prepared_statement_cache_size preparethreshold prepared_statements schema"
    " serverversion socket_timeout sslaccept statement_cache_mode statement_cache_size supa uselibpqcompat"
)
"""Options of Prisma, SQLAlchemy, asyncpg, JDBC and others that change nothing here."""
_SSLMODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def database_address(url: str) -> str:
    """The URL of a store: ``sqlite:///path``, or ``postgresql://...`` in the form that libpq expects."""
    scheme, colon, rest = url.partition("://")
    dialect, _, driver = scheme.lower().partition("+")
    if url.lower().startswith(("file:", ":memory:")) or "memory" in driver:
        raise ValueError(f"{_DATABASE_FORMS}; {_IN_MEMORY}" if "memory" in url else _DATABASE_FORMS)
    if not colon:
        raise ValueError(_DATABASE_FORMS)
    if dialect == "sqlite":
        return _sqlite_address(rest)
    if dialect in ("postgres", "postgresql"):
        return _postgres_address(rest)
    if scheme.lower() in _OTHER_DATABASES or dialect in _OTHER_DATABASES:
        raise ValueError(f"{_DATABASE_FORMS}; {dialect} can't hold the memories")
    raise ValueError(_DATABASE_FORMS)


def _sqlite_address(rest: str) -> str:
    """What follows the scheme: a slash, and the path."""
    path, question, query = rest.partition("?")
    if ":memory:" in path or "mode=memory" in query:
        raise ValueError(_IN_MEMORY)
    if not path.startswith("/") or path == "/":
        raise ValueError(f"{_DATABASE_FORMS} (three slashes, and four before an absolute path)")
    path = path[1:]
    if path.lower().startswith("file:"):
        raise ValueError(f"{_DATABASE_FORMS}; write the path itself, without file:")
    if question:
        names = ", ".join(f"?{_shown(name)}=" for name, _ in parse_qsl(query, keep_blank_values=True)) or "?"
        raise ValueError(f"{names}: options of SQLite are not taken from the address; leave them out")
    if path.startswith("~"):
        try:
            path = str(Path(path).expanduser())
        except RuntimeError:
            raise ValueError("~ names no home directory that is known here; write the whole path") from None
    return f"sqlite:///{path}"


def _postgres_address(rest: str) -> str:
    """What follows the scheme: ``user:password@host:port,host:port/database?options``."""
    user, at, place = rest.rpartition("@")
    place, _, query = place.partition("?")
    hosts, slash, database = place.partition("/")
    if not all(re.match(r"(\[[^\]]*\]|[^\[\]:]*)(:[0-9]{0,5})?\Z", host) for host in hosts.split(",")) or (
        "#" in place
    ):
        raise ValueError(f"is not of the form postgresql://user:password@host:port/database; {_ENCODE}")
    if re.search(r"%(?![0-9A-Fa-f]{2})", f"{user}{place}{query}"):
        raise ValueError(f"has a % that is not followed by two hexadecimal digits; {_ENCODE}")
    # libpq takes the first @ or / as the end of the password; but only the last @ can be the end.
    name, colon, password = user.partition(":")
    if "/" in user:
        name, password = quote(name, safe="%"), quote(password, safe="%")
    else:
        name, password = name.replace("@", "%40"), password.replace("@", "%40")
    options = _postgres_options(query)
    encoded = f"?{urlencode(options, quote_via=quote)}" if options else ""
    return f"postgresql://{name}{colon}{password}{at}{hosts}{slash}{database}{encoded}"


def _postgres_options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for given, value in parse_qsl(query.replace("+", "%2B"), keep_blank_values=True):
        name = given.lower()
        if name == "ssl":  # asyncpg's, JDBC's and Node's
            switched = _YES.get(value.lower())
            name, value = "sslmode", value if switched is None else "require" if switched else "disable"
            if options.get("sslmode") in _SSLMODES[3:] and value == "require":
                continue
        if name == "sslmode" and value not in _SSLMODES:
            raise ValueError(f"?{given}= must be one of {', '.join(_SSLMODES)}")
        if name in _LIBPQ:
            options[name] = value
        elif name in _POSTGRES_IGNORED:
            logger.warning("the database's address: the option %s is another tool's, and is ignored", given)
        else:
            raise ValueError(f"?{_shown(given)}= is not an option of PostgreSQL; leave it out")
    return options
