"""Settings: one typed object, read from the environment and ``.env``, checked before anything starts.

Settings for which agent frameworks already have names keep these (``REDIS_*``; times in milliseconds); all others are
``MNEMOBUS_*`` (times in seconds). env.template documents each.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, unquote, urlsplit

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from .addresses import database_address, redis_address
from .errors import SettingsError

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]

POLICIES = (
    "noeviction",
    "volatile-lru",
    "volatile-lfu",
    "volatile-random",
    "volatile-ttl",
)
"""The eviction policies under which Redis can't drop the log: its keys never expire."""

_NAMESPACE = re.compile(r"(?!pg_|sqlite_)[a-z][a-z0-9_]{0,39}\Z")
_SIZE = re.compile(r"(\d+)\s*(b|kb?|mb?|gb?)?\Z", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "k": 1000, "kb": 1024, "m": 1000**2, "mb": 1024**2, "g": 1000**3, "gb": 1024**3}

_SECRET = re.compile(r"(?i)pass(?!file)|pwd|secret|token")
"""Names of a URL's options that hold secrets."""

TTL_CLASSES = ("short", "medium", "long")


def _redis(name: str, default: Any, **constraints: Any) -> Any:
    return Field(default, validation_alias=AliasChoices(name.lower(), name), **constraints)


def _own(name: str, default: Any, **constraints: Any) -> Any:
    return Field(default, validation_alias=AliasChoices(name.lower(), f"MNEMOBUS_{name}"), **constraints)


class Settings(BaseSettings):
    """All settings. Keywords of :func:`mnemobus.connect` have these names."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8-sig",  # some editors begin a file with a byte order mark
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        case_sensitive=True,
        validate_default=False,
        allow_inf_nan=False,  # an infinite time makes no sense
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read keywords, the environment, and ``.env`` if there is one: looking for each setting in a missing file
        takes time. DATABASE_URL comes last, because it may be meant for another program."""
        sources = [init_settings, env_settings]
        theirs = os.environ.get("DATABASE_URL")
        if Path(".env").exists():
            sources.append(dotenv_settings)
            if not theirs and isinstance(dotenv_settings, DotEnvSettingsSource):
                theirs = dotenv_settings.env_vars.get("DATABASE_URL")
        if theirs and theirs.strip():
            sources.append(InitSettingsSource(settings_cls, {"database_url": _Theirs(theirs)}))
        return tuple(sources)

    @model_validator(mode="before")
    @classmethod
    def _tidy(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Remove what files add: space and quotes around a value, and empty values."""
        return {name: value for name, each in given.items() if (value := _tidied(name, each)) != ""}

    # Redis
    redis_url: str = _redis("REDIS_URL", "redis://127.0.0.1:6379/0", repr=False)
    redis_password: str | None = _redis("REDIS_PASSWORD", None, repr=False)
    redis_db: int | None = _redis("REDIS_DB", None, ge=0)
    redis_key_prefix: str = _redis("REDIS_KEY_PREFIX", "mnemobus", pattern=r"^[A-Za-z0-9_.:\-]{1,64}$")
    redis_max_memory: str | None = _redis("REDIS_MAX_MEMORY", None)
    redis_eviction_policy: str | None = _redis("REDIS_EVICTION_POLICY", None)
    redis_pool_min: int = _redis("REDIS_POOL_MIN", 1, ge=0)
    redis_pool_max: int = _redis("REDIS_POOL_MAX", 16, ge=1)
    redis_acquire_timeout: Positive = _redis("REDIS_ACQUIRE_TIMEOUT", 5_000)
    redis_create_timeout: Positive = _redis("REDIS_CREATE_TIMEOUT", 5_000)
    redis_destroy_timeout: Positive = _redis("REDIS_DESTROY_TIMEOUT", 2_000)
    redis_idle_timeout: Positive = _redis("REDIS_IDLE_TIMEOUT", 60_000)
    redis_reap_interval: Positive = _redis("REDIS_REAP_INTERVAL", 1_000)
    redis_create_retry_interval: Positive = _redis("REDIS_CREATE_RETRY_INTERVAL", 200)
    redis_protocol: int = _own("REDIS_PROTOCOL", 3, ge=2, le=3)
    redis_timeout: Positive = _own("REDIS_TIMEOUT", 2.0)

    # The store
    database_url: str = _own("DATABASE_URL", "sqlite:///.mnemobus/memories.db", repr=False)
    database_namespace: str = _own("DATABASE_NAMESPACE", "mnemobus")
    database_pool_max: Count = _own("DATABASE_POOL_MAX", 8)
    database_timeout: Positive = _own("DATABASE_TIMEOUT", 5.0)
    data_dir: Path = _own("DATA_DIR", Path(".mnemobus"))

    # The log
    log_partitions: int = _own("LOG_PARTITIONS", 4, ge=1, le=1024)
    durability: Literal["logged", "synced", "committed"] = _own("DURABILITY", "logged")
    write_timeout: Positive = _own("WRITE_TIMEOUT", 10.0)
    max_memory_bytes: Count = _own("MAX_MEMORY_BYTES", 1 << 20)
    max_backlog: Count = _own("MAX_BACKLOG", 1_000_000)
    retention: float = _own("RETENTION", 86_400.0, ge=0)

    # The outbox
    outbox: str = _own("OUTBOX", "auto", min_length=1)
    outbox_max_bytes: Count = _own("OUTBOX_MAX_BYTES", 64 << 20)

    # The workers
    batch_size: int = _own("BATCH_SIZE", 1_000, ge=1, le=10_000)
    batch_bytes: Count = _own("BATCH_BYTES", 16 << 20)
    claim_idle: float = _own("CLAIM_IDLE", 5.0, ge=0.1)
    commit: Literal["full", "relaxed"] = _own("COMMIT", "full")
    worker_processes: Count = _own("WORKER_PROCESSES", 2)
    worker_threads: Count = _own("WORKER_THREADS", 2)

    dead_letter_bytes: Count = _own("DEAD_LETTER_BYTES", 64 << 20)

    # The feed and the caches
    feed_partitions: int = _own("FEED_PARTITIONS", 64, ge=1, le=4096)
    feed_length: int = _own("FEED_LENGTH", 4_096, ge=1)
    heartbeat: Positive = _own("HEARTBEAT", 1.0)
    max_staleness: Positive = _own("MAX_STALENESS", 2.0)
    own_write_timeout: float = _own("OWN_WRITE_TIMEOUT", 1.0, ge=0)
    lease: Positive = _own("LEASE", 2.0)
    local_max_entries: int = _own("LOCAL_MAX_ENTRIES", 100_000, ge=0)
    local_max_bytes: int = _own("LOCAL_MAX_BYTES", 256 << 20, ge=0)
    ttl_short: Positive = _own("TTL_SHORT", 300.0)
    ttl_medium: Positive = _own("TTL_MEDIUM", 3_600.0)
    ttl_long: Positive = _own("TTL_LONG", 86_400.0)
    table_ttl: Annotated[dict[str, str | float], NoDecode] = _own(
        "TABLE_TTL", {"messages": "short", "facts": "medium"}
    )
    live: str = _own("LIVE", "all", min_length=1)
    live_window: int = _own("LIVE_WINDOW", 64, ge=1, le=1_000)
    live_window_bytes: Count = _own("LIVE_WINDOW_BYTES", 256 << 10)
    shadow_reads: float = _own("SHADOW_READS", 0.001, ge=0, le=1)

    @field_validator("redis_url")
    @classmethod
    def _redis_url(cls, value: str) -> str:
        return redis_address(value)

    @field_validator("database_url")
    @classmethod
    def _database_url(cls, value: str) -> str:
        return database_address(value)

    @field_validator("data_dir")
    @classmethod
    def _data_dir(cls, value: Path) -> Path:
        return _at_home(value)

    @field_validator("outbox")
    @classmethod
    def _outbox(cls, value: str) -> str:
        return str(_at_home(Path(value))) if value.startswith("~") else value

    @field_validator("database_namespace")
    @classmethod
    def _namespace(cls, value: str) -> str:
        if not _NAMESPACE.match(value):
            raise ValueError(
                "must be a lower-case letter and up to 39 more letters, digits and _, and not begin with pg_ or"
                " sqlite_: the database keeps these for itself"
            )
        return value

    @field_validator("redis_eviction_policy")
    @classmethod
    def _policy(cls, value: str | None) -> str | None:
        if value is not None and value not in POLICIES:
            raise ValueError(f"must be one of {', '.join(POLICIES)}: any other lets Redis drop the log")
        return value

    @field_validator("redis_max_memory")
    @classmethod
    def _max_memory(cls, value: str | None) -> str | None:
        if value is not None and not _SIZE.match(value):
            raise ValueError("must be a size as Redis has them: 100mb, 2gb, or 0 for no limit")
        return value

    @field_validator("table_ttl", mode="before")
    @classmethod
    def _table_ttl(cls, value: Any) -> Any:
        """``messages=short, facts=900``: a class, or seconds."""
        if not isinstance(value, str):
            return value
        out: dict[str, str | float] = {}
        for part in filter(None, (p.strip() for p in value.split(","))):
            table, equals, ttl = (p.strip() for p in part.partition("="))
            if not equals or not table:
                raise ValueError(f"{part!r} is not of the form table=short|medium|long|seconds")
            out[table] = ttl
        return out

    @field_validator("table_ttl")
    @classmethod
    def _ttl_values(cls, value: dict[str, str | float]) -> dict[str, str | float]:
        for table, ttl in value.items():
            if ttl in TTL_CLASSES:
                continue
            try:
                value[table] = float(ttl)
            except ValueError:
                raise ValueError(f"{table}={ttl} is neither short, medium, long nor seconds") from None
            if not 0 < float(ttl) < 1e9:
                raise ValueError(f"{table}={ttl}: seconds must be above 0")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.max_staleness <= self.heartbeat:
            raise ValueError(
                f"MNEMOBUS_MAX_STALENESS ({self.max_staleness:g} s) must exceed MNEMOBUS_HEARTBEAT"
                f" ({self.heartbeat:g} s), or no local copy could ever be served"
            )
        if self.redis_pool_min > self.redis_pool_max:
            raise ValueError(
                f"REDIS_POOL_MIN ({self.redis_pool_min}) must not exceed"
                f" REDIS_POOL_MAX ({self.redis_pool_max})"
            )
        return self

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """The settings of this process; keywords override the environment, and that overrides ``.env``.

        Raises SettingsError that names the variable.
        """
        unknown = overrides.keys() - cls.model_fields.keys()
        if unknown:
            raise SettingsError(
                f"{sorted(unknown)[0]} is not a setting; see env.template for those there are"
            )
        try:
            return cls(**{name: value for name, value in overrides.items() if not _is_unset(value)})
        except ValidationError as error:
            raise SettingsError("; ".join(_explain(item) for item in error.errors())) from None
        except (OSError, UnicodeError) as error:
            raise SettingsError(f".env can't be read as text in UTF-8: {error}") from None

    def ttl(self, table: str) -> float:
        """The longest time, in seconds, for which a copy of a query on this table is kept."""
        ttl = self.table_ttl.get(table, "long")
        if isinstance(ttl, float):
            return ttl
        return {"short": self.ttl_short, "medium": self.ttl_medium, "long": self.ttl_long}[str(ttl)]

    def is_live(self, table: str) -> bool:
        """Whether scopes of a table may be held live."""
        named = [part.strip() for part in self.live.split(",")]
        return f"-{table}" not in named and ("all" in named or table in named)

    def max_memory(self) -> int | None:
        """REDIS_MAX_MEMORY in bytes, or None if it isn't set."""
        if self.redis_max_memory is None:
            return None
        match = _SIZE.match(self.redis_max_memory)
        assert match
        return int(match[1]) * _UNITS[(match[2] or "").lower()]

    def environment(self) -> dict[str, str]:
        """These settings as environment variables, for a process that needs the same ones."""
        out = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            alias = field.validation_alias
            assert isinstance(alias, AliasChoices)
            if value is not None:
                if isinstance(value, dict):
                    value = ",".join(f"{k}={v}" for k, v in value.items())
                out[str(alias.choices[1])] = str(value)
        return out


class _Theirs(str):
    """The value of DATABASE_URL, which may be meant for another program."""

    __slots__ = ()


def _is_unset(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _tidied(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    tidy = value.strip()
    if len(tidy) > 1 and tidy[0] == tidy[-1] and tidy[0] in "\"'":
        tidy = tidy[1:-1].strip()
    if tidy and "password" in name:  # may begin or end with any of these
        tidy = value.strip("\r\n")
    return type(value)(tidy)


def _at_home(path: Path) -> Path:
    """The path, with ``~`` replaced by the home directory."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("~ names no home directory that is known here; write the whole path") from None


def _explain(item: Any) -> str:
    location = item["loc"]
    message = item["msg"].removeprefix("Value error, ")
    if not location:
        return str(message)
    name = str(location[0])
    field = Settings.model_fields.get(name.lower()) or Settings.model_fields.get(
        name.removeprefix("MNEMOBUS_").lower()
    )
    if field is not None and isinstance(field.validation_alias, AliasChoices):
        name = str(field.validation_alias.choices[1])
    value = item.get("input")
    if isinstance(value, _Theirs):
        return (
            f"DATABASE_URL: {message}. If this address is another program's: it is read only where the same name with"
            " MNEMOBUS_ in front is not set, so set that one"
        )
    shown = "" if name in ("REDIS_PASSWORD", "MNEMOBUS_DATABASE_URL", "REDIS_URL") else f" (it is {value!r})"
    return f"{name}: {message}{shown}"


def hide_password(url: str) -> str:
    """The URL with ``***`` in place of its secrets: for logs and messages. If it can't tell them apart, it hides
    more."""
    if url.startswith("sqlite:"):
        return url
    try:
        parts = urlsplit(url)
        user, password, _ = parts.username, parts.password, parts.port
    except ValueError:
        parts = None
    if parts is None or "@" in parts.path + parts.fragment:
        # The URL is malformed: a password may have a / or # in it. The address comes last.
        scheme, _, rest = url.partition("://")
        return f"{scheme}://***{'@' + rest.rpartition('@')[2].partition('?')[0] if '@' in rest else ''}"
    # The visible rest stays as it was written: joining the parts again would remove slashes.
    if password is not None:
        host = parts.netloc.rpartition("@")[2]
        url = url.replace(parts.netloc, f"{quote(user or '')}:***@{host}", 1)
    options = "&".join(_hide_option(option) for option in parts.query.split("&"))
    return url.replace(f"?{parts.query}", f"?{options}", 1) if parts.query else url


def _hide_option(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"{name}=***" if value and _SECRET.search(unquote(name)) else f"{name}{equals}{value}"
