"""A server of PostgreSQL: its address, and what its errors mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ...errors import MnemobusError, Rejected, SchemaError, SettingsError, StoreTooSlow, StoreUnavailable
from ...settings import Settings
from .. import Identity
from ..layout import Names
from .arrays import ADAPTERS
from .connections import Database, Target
from .statements import PostgresStatements

_TOO_MUCH = {
    "25P03",  # idle in a transaction for too long: this process was paused, or the pipeline was
    "25P04",  # transaction_timeout
    "53200",  # out of memory, or of places for locks
    "53400",  # beyond a configured limit, as of temporary files
    "55P03",  # a lock was not free in time
    "57014",  # statement_timeout, or somebody cancelled it
}
"""Less at once may do where so much did not."""

_ADVICE = {
    "25006": "it takes no writes. Is it a standby? MNEMOBUS_DATABASE_URL must lead to the primary",
    "53100": "its disk is full",
}

_POOLER_SAYS = {
    "statement pooling mode": "a pooler in statement mode has no transactions. Set pool_mode to transaction or session",
    "unsupported startup parameter": "the pooler does not take this option of MNEMOBUS_DATABASE_URL: remove it, or"
    " add it to ignore_startup_parameters of the pooler",
}


class PostgresServer(Database):
    """How to reach a server, and what its errors mean."""

    def __init__(self, settings: Settings) -> None:
        try:
            given = conninfo_to_dict(settings.database_url)
            ports = str(given.get("port") or "").split(",")
            if "@" in str(given.get("dbname")) or not all(port.isdigit() for port in ports if port):
                raise psycopg.ProgrammingError
        except psycopg.ProgrammingError:
            # Its message may quote what it took for something else than a password.
            raise SettingsError(
                "MNEMOBUS_DATABASE_URL is not of the form postgresql://user:password@host:port/database;"
                " in a password, characters such as @ / : % and spaces must be percent-encoded"
            ) from None
        self.namespace = settings.database_namespace
        self.names = Names(f'"{self.namespace}".')
        self.sql = PostgresStatements(self.names)
        timeout = settings.database_timeout
        host = given.get("host") or given.get("hostaddr") or "local socket"
        port = given.get("port")
        self.where = f"PostgreSQL {host}{f':{port}' if port else ''}/{given.get('dbname') or ''}"
        ours: dict[str, Any] = {
            "application_name": "mnemobus",
            "client_encoding": "utf8",
            "connect_timeout": max(1, round(timeout)),
            # A link that died without a word is found out while the call waits for it.
            "tcp_user_timeout": round(timeout * 1000),
            "keepalives_idle": max(1, round(timeout)),
        }
        conninfo = make_conninfo(settings.database_url, **{k: v for k, v in ours.items() if k not in given})
        super().__init__(Target(self.where, conninfo, timeout, settings.database_pool_max, ADAPTERS))

    def error(self, error: BaseException) -> MnemobusError:
        """What an error of the driver means: is the data to blame, its amount, the schema, or the server?"""
        if isinstance(error, MnemobusError):
            return error
        words = " ".join(str(error).split())
        if not isinstance(error, psycopg.Error):
            return Rejected(f"{self.where} refuses this data: {words}")
        for sign, advice in _POOLER_SAYS.items():
            if sign in words:
                return SettingsError(f"{self.where}: {words}: {advice}")
        state = error.sqlstate
        # 22: the value; 23: a constraint; 54: beyond a limit, as JSON that nests too deep for the server.
        # Without a state, the driver itself could not encode it.
        if isinstance(error, psycopg.DataError) if state is None else state[:2] in ("22", "23", "54"):
            return Rejected(f"{self.where} refuses this data: {words}")
        if state in _TOO_MUCH:
            return StoreTooSlow(f"{self.where}: {words}")
        # 42: a table, a column or the right to use one is missing, or not as it should be; 3F: a schema is.
        if state is not None and state[:2] in ("42", "3F"):
            return SchemaError(f"{self.where}: {words}{self._advice(state)}")
        advice = _ADVICE.get(state or "", "")
        return StoreUnavailable(f"{self.where}: {words}{advice and ': '}{advice}")

    def _advice(self, state: str | None) -> str:
        if state != _NOT_ALLOWED:
            return ". Were mnemobus's tables removed? Restore the database from a backup"
        return (
            f". Agents need: GRANT USAGE ON SCHEMA {self.namespace} TO (role); GRANT SELECT ON ALL TABLES IN SCHEMA"
            f" {self.namespace} TO (role). Workers are best the owner of the schema and of what is in it"
        )

    def identity_of(self, row: Sequence[Any], place: str, history: str) -> Identity:
        """Who the store is, from the row of its table."""
        found, bus, prefix, life, reached = row
        return Identity(
            found.replace("-", ""),
            bus and bus.replace("-", ""),
            prefix,
            life,
            reached,
            place,
            history,
            self.where,
        )


_NOT_ALLOWED = "42501"
