"""A process's connections to PostgreSQL: how many, for how long, and in which state.

*Precedence.* A writer is promised that workers commit what is in the log, so agents must never take the last
connection. An agent opens one when a query needs it and closes it after a second without use. Whenever it opens one it
looks at how many are taken, of the server's, of the database's and of the role's: above three quarters of any of the
three it gives its own back at once, and tries again until `MNEMOBUS_DATABASE_TIMEOUT`. What is left is for the workers.
Above a half, connections of agents live for a second only, so that agents take turns. A worker keeps what it has.

*State.* A connection sets its time limits once, and statements that come again and again are prepared: both belong to
the server's process behind it. Behind a pooler that lends such a process for one transaction (PgBouncer in transaction
mode, and what hosters call a pooled address) nothing may be left in it and nothing be expected there. Whether there is
a pooler is told by one comparison, in the round trip that a new connection needs anyway: the number of the process
that the login named is not that of the process that answers, for the pooler makes up a number of its own. Then nothing
is prepared, and each transaction says by itself what it needs (:meth:`Database.begin`).

What roles and databases set for themselves (ALTER ROLE ... SET) is overruled where a promise rests on it: isolation,
time limits, and `synchronous_commit = off`, unless it is asked for (`MNEMOBUS_COMMIT`).

Errors of the driver pass through as they are.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import select
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple

import psycopg
from psycopg import AsyncConnection, Connection, errors
from psycopg.abc import AdaptContext
from psycopg.pq import ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGresult

from ...errors import StoreUnavailable

IDLE = 1.0
"""Seconds without use after which an agent closes a connection."""
LIFE = 30.0
"""Seconds after which an agent replaces a connection: others may wait for one."""
SCARCE_IDLE, SCARCE_LIFE = 0.1, 1.0
"""The same, if more than half of all were taken when it was opened."""
WORKER_IDLE = 600.0
WORKER_LIFE = 3600.0

_SCARCE, _CROWDED = 1 / 2, 3 / 4
_RETRY, _TURN = (0.05, 0.2), 0.25
"""Seconds between two tries to get a connection; and that an agent waits which has just given up a scarce one."""

BEGIN = b"BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
_BEGIN_READING = b"BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY"

_NO_PLACE = re.compile(
    "too many clients|too many connections|connection slots are reserved|no more connections allowed",
    re.IGNORECASE,
)

_PREPARED = (errors.InvalidSqlStatementName, errors.DuplicatePreparedStatement)
"""What a statement meets that was prepared in another process of the server."""


def _set(local: str) -> str:
    """What a session or a transaction needs, whatever the role or the database sets."""
    return f"""
        set_config('statement_timeout', %(timeout)s, {local}),
        set_config('lock_timeout', '0', {local}),
        set_config('idle_in_transaction_session_timeout', %(idle)s, {local}),
        CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
            THEN set_config('transaction_timeout', '0', {local}) END,
        CASE WHEN %(relaxed)s THEN set_config('synchronous_commit', 'off', {local})
            WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', {local}) END
    """


_TRANSACTION = f"SELECT {_set('true')}".encode()

# A worker that is paused within a transaction would hold up all others; the server ends it.
_SESSION = f"""
    SELECT direct, CASE WHEN direct THEN (SELECT row(
        {_set("false")},
        set_config('default_transaction_isolation', 'read committed', false),
        CASE WHEN current_setting('idle_session_timeout', true) IS NOT NULL
            THEN set_config('idle_session_timeout', '0', false) END
    )::text) END
    FROM (SELECT pg_backend_pid() = %(pid)s AS direct OFFSET 0) AS link
""".encode()

# Those of background processes have no role, and don't count.
_TAKEN = b"""
    SELECT
        count(*),
        current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
            - coalesce(current_setting('reserved_connections', true)::int, 0),
        count(*) FILTER (WHERE a.usesysid = r.oid), min(r.rolconnlimit),
        count(*) FILTER (WHERE a.datid = d.oid), min(d.datconnlimit)
    FROM pg_stat_get_activity(NULL) AS a, pg_roles AS r, pg_database AS d
    WHERE a.datid IS NOT NULL AND a.usesysid IS NOT NULL
        AND r.rolname = session_user AND d.datname = current_database()
"""


class Prepared(NamedTuple):
    """A statement that a connection prepares once: its name there, with $1 and so on for parameters of these types."""

    name: bytes
    query: bytes
    types: tuple[int, ...]


def at_once(link: Session, calls: Sequence[tuple[Prepared, Sequence[bytes | None]]]) -> list[PGresult]:
    """Run these in a transaction of their own, in one round trip; their parameters are in the binary format.

    psycopg's cursors and pipelines do the same with three times as much time of the processor, and more waits than
    round trips: a batch of one would spend most of its time there.
    """
    if not link.prepared:
        for statement, _ in calls:
            _checked(link.pgconn.prepare(statement.name, statement.query, statement.types))
        link.prepared = True
    try:
        results = _exchange(link, calls)
    except BaseException:
        finish(link)  # something of it is still under way
        raise
    for result in results:
        _checked(result)
    return results


def _exchange(link: Session, calls: Sequence[tuple[Prepared, Sequence[bytes | None]]]) -> list[PGresult]:
    pgconn = link.pgconn
    pgconn.enter_pipeline_mode()
    for statement, parameters in calls:
        pgconn.send_query_prepared(statement.name, parameters, [Format.BINARY] * len(parameters))
    pgconn.pipeline_sync()
    ready = select.poll()
    ready.register(pgconn.socket, select.POLLIN | select.POLLOUT)
    while pgconn.flush():
        ready.poll()
        pgconn.consume_input()
    ready.modify(pgconn.socket, select.POLLIN)
    results: list[PGresult] = []
    left = len(calls)
    while True:
        while pgconn.is_busy():
            ready.poll()
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:  # the end of a statement
            left -= 1
            if left < 0:
                raise psycopg.OperationalError("the connection is lost")
        elif result.status == ExecStatus.PIPELINE_SYNC:
            break
        else:
            results.append(result)
    pgconn.exit_pipeline_mode()
    return results


def _checked(result: PGresult) -> None:
    if result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
        raise errors.error_from_result(result)


class _Crowded(StoreUnavailable):
    """An agent may take no more of the server's connections."""


class Target(NamedTuple):
    """Where connections lead, and how.

    where    its name, for people
    timeout  seconds: for a statement, and to wait for a connection
    most     connections at once
    """

    where: str
    conninfo: str
    timeout: float
    most: int
    context: AdaptContext


class Session(Connection[Any]):
    """A worker's connection. ``prepared``: whether the statements of `at_once` are."""

    pooled = prepared = relaxed = False
    opened = used = 0.0


class AsyncSession(AsyncConnection[Any]):
    """An agent's connection. ``until``: when it is to be replaced; ``idle``: for how long it may be unused."""

    pooled = relaxed = False
    opened = used = until = idle = 0.0

    @property
    def unused_until(self) -> float:
        return min(self.used + self.idle, self.until)


class Database:
    """Opens connections, and says how a transaction begins on one."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.pooled = False
        """Whether it turned out that there is a pooler that can't be told otherwise."""
        milliseconds = str(round(target.timeout * 1000))
        self._limits = {"timeout": milliseconds, "idle": milliseconds}
        self.relaxed = False
        """Whether connections that are opened from now on need not wait for the server's disk to commit."""

    def connect(self) -> Session:
        link = Session.connect(self.target.conninfo, autocommit=True, context=self.target.context)
        try:
            row = link.execute(_SESSION, self._greeting(link)).fetchone()
            self._know(link, bool(row and row[0]))
        except BaseException:
            finish(link)
            raise
        return link

    async def connect_async(self) -> AsyncSession:
        """For an agent. _Crowded if it has to wait."""
        link = await AsyncSession.connect(self.target.conninfo, autocommit=True, context=self.target.context)
        try:
            cursor = await link.execute(_SESSION, self._greeting(link))
            row = await cursor.fetchone()
            self._know(link, bool(row and row[0]))
            life, link.idle = LIFE, IDLE
            if link.pooled:  # one that pools statements refuses this
                await link.execute(BEGIN)
                await link.execute(b"ROLLBACK")
            else:
                share = await self._taken(link)
                if share > _CROWDED:
                    raise _Crowded(
                        f"{self.target.where}: agents have taken as many connections as they may (three quarters),"
                        " and the rest is kept for workers: raise max_connections (or the limit of the role or of"
                        " the database), lower MNEMOBUS_DATABASE_POOL_MAX, or put a pooler before the server"
                    )
                if share > _SCARCE:
                    life, link.idle = SCARCE_LIFE, SCARCE_IDLE
            link.until = time.monotonic() + life
        except BaseException:
            finish(link)
            raise
        return link

    async def _taken(self, link: AsyncSession) -> float:
        try:
            cursor = await link.execute(_TAKEN)
        except psycopg.ProgrammingError:  # a hosted server on which nobody may look
            return 0.0
        return _share(await cursor.fetchone())

    def _greeting(self, link: Session | AsyncSession) -> dict[str, Any]:
        return {**self._limits, "pid": link.info.backend_pid, "relaxed": self.relaxed}

    def _know(self, link: Session | AsyncSession, direct: bool) -> None:
        link.pooled = self.pooled or not direct
        if link.pooled:
            link.prepare_threshold = None
        link.opened = link.used = time.monotonic()
        link.relaxed = self.relaxed

    def begin(self, link: Session, patience: float = 1.0) -> None:
        """Begin a transaction, whose statements may take ``patience`` times as long as usual; inf for any time."""
        link.execute(BEGIN)
        if link.pooled or patience != 1.0:
            self.limit(link, patience)

    def limit(self, link: Session, patience: float) -> None:
        """The same for a transaction that has begun."""
        timeout = 0 if patience == math.inf else round(self.target.timeout * patience * 1000)
        link.execute(_TRANSACTION, {**self._limits, "timeout": str(timeout), "relaxed": link.relaxed})

    async def read(self, link: AsyncSession, query: bytes, parameters: Any) -> list[tuple[Any, ...]]:
        """The rows of one query, in one round trip."""
        async with link.cursor(binary=True) as cursor:
            if not link.pooled:
                await cursor.execute(query, parameters)
            elif psycopg.AsyncPipeline.is_supported():
                async with link.pipeline():
                    await self._read_within(link, cursor, query, parameters)
                    await link.execute(b"COMMIT")
            else:
                await self._read_within(link, cursor, query, parameters)
                rows = await cursor.fetchall()
                await link.execute(b"COMMIT")
                return rows
            return await cursor.fetchall()

    async def _read_within(self, link: AsyncSession, cursor: Any, query: bytes, parameters: Any) -> None:
        await link.execute(_BEGIN_READING)
        await link.execute(_TRANSACTION, {**self._limits, "relaxed": False})
        await cursor.execute(query, parameters)

    def busy(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"{self.target.where}: all {self.target.most} connections (MNEMOBUS_DATABASE_POOL_MAX) were busy"
            f" for {self.target.timeout:g} s"
        )

    def closed(self) -> StoreUnavailable:
        return StoreUnavailable(f"{self.target.where}: the store is closed")

    def worn(self, link: Session | AsyncSession, error: psycopg.Error) -> bool:
        """Whether this error is one of the connection, and another one may do better. Then it is closed."""
        if isinstance(error, _PREPARED):
            self.pooled = True
        # What was prepared before a table changed is refused as not supported.
        if isinstance(error, (*_PREPARED, errors.FeatureNotSupported)):
            finish(link)
        return link.closed


def _share(row: tuple[int, ...] | None) -> float:
    """How much of what may be taken is taken, where it is most."""
    pairs = zip(row[::2], row[1::2], strict=True) if row else ()
    # A limit of three or less can't be shared out: it is left to the process that needs it first.
    return max((taken / limit for taken, limit in pairs if limit > 3), default=0.0)


def no_place(error: Exception) -> bool:
    """Whether a connection was refused because there are too many: there is one again once others are closed."""
    return isinstance(error, _Crowded) or (
        isinstance(error, psycopg.OperationalError) and bool(_NO_PLACE.search(str(error)))
    )


def finish(link: Session | AsyncSession) -> None:
    """Close a connection at once, even if a statement is running."""
    link.pgconn.finish()


def _fit(link: Session | AsyncSession, server: Database) -> bool:
    """Whether a connection that comes back can be used again."""
    return (
        not link.closed
        and link.pgconn.transaction_status == TransactionStatus.IDLE
        and (link.pooled or not server.pooled)
        and link.relaxed == server.relaxed
    )


class Connections:
    """A worker process's connections. Safe for threads."""

    def __init__(self, server: Database) -> None:
        self._server = server
        self._places = threading.BoundedSemaphore(server.target.most)
        self._lock = threading.Lock()
        self._idle: list[Session] = []
        self.is_closed = False

    @contextmanager
    def one(self) -> Iterator[Session]:
        """A connection, for as long as this lasts. Then it is kept for others, or closed if it is of no use."""
        if not self._places.acquire(timeout=self._server.target.timeout):
            raise self._server.busy()
        try:
            link = self._take() or self._server.connect()
            try:
                yield link
            finally:
                self._give_back(link)
        finally:
            self._places.release()

    def _take(self) -> Session | None:
        with self._lock:
            if self.is_closed:
                raise self._server.closed()
            return self._idle.pop() if self._idle else None

    def _give_back(self, link: Session) -> None:
        now = link.used = time.monotonic()
        gone = []
        with self._lock:
            if not self.is_closed and now < link.opened + WORKER_LIFE and _fit(link, self._server):
                self._idle.append(link)
            else:
                gone.append(link)
            while self._idle and self._idle[0].used + WORKER_IDLE < now:
                gone.append(self._idle.pop(0))
        for each in gone:
            finish(each)

    def drain(self) -> None:
        """Close all idle connections: one as old as they are was dead."""
        with self._lock:
            gone, self._idle = self._idle, []
        for link in gone:
            finish(link)

    def close(self) -> None:
        with self._lock:
            self.is_closed = True
        self.drain()


class AsyncConnections:
    """An agent's connections, within one event loop. Cancelling any call leaves them usable."""

    def __init__(self, server: Database) -> None:
        self._server = server
        self._places = asyncio.Semaphore(server.target.most)
        self._idle: list[AsyncSession] = []
        self._sweep: asyncio.TimerHandle | None = None
        self._sweep_at = 0.0
        self._others_first = 0.0
        """Until when others that wait for a connection come first."""
        self.is_closed = False

    @asynccontextmanager
    async def one(self) -> AsyncIterator[AsyncSession]:
        """As for :class:`Connections`. Where the server has no place, it is asked again until the timeout."""
        if self._places.locked():
            try:
                async with asyncio.timeout(self._server.target.timeout):
                    await self._places.acquire()
            except TimeoutError:
                raise self._server.busy() from None
        else:
            await self._places.acquire()
        try:
            link = await self._take()
            try:
                yield link
            finally:
                self._give_back(link)
        finally:
            self._places.release()

    async def _take(self) -> AsyncSession:
        deadline = time.monotonic() + self._server.target.timeout
        while True:
            self._check_open()
            if self._idle:
                return self._idle.pop()
            if (wait := self._others_first - time.monotonic()) > 0:
                await asyncio.sleep(wait)
                continue
            try:
                link = await self._server.connect_async()
            except (psycopg.OperationalError, _Crowded) as error:
                if not no_place(error) or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(random.uniform(*_RETRY))
                continue
            try:
                self._check_open()  # it may have been closed meanwhile
            except StoreUnavailable:
                finish(link)
                raise
            return link

    def _check_open(self) -> None:
        if self.is_closed:
            raise self._server.closed()

    def _give_back(self, link: AsyncSession) -> None:
        link.used = time.monotonic()
        if self.is_closed or link.used > link.until or not _fit(link, self._server):
            finish(link)
            if link.idle == SCARCE_IDLE:
                self._others_first = link.used + _TURN
            return
        self._idle.append(link)
        self._look_at(link.unused_until)

    def _look_at(self, moment: float) -> None:
        """See to it that unused connections are looked for at this moment, or before."""
        if self._sweep is not None:
            if self._sweep_at <= moment:
                return
            self._sweep.cancel()
        self._sweep_at = moment
        delay = max(moment - time.monotonic(), 0.01)
        self._sweep = asyncio.get_running_loop().call_later(delay, self._close_unused)

    def _close_unused(self) -> None:
        """Close what was not used lately; look again as long as anything is left."""
        self._sweep = None
        now = time.monotonic()
        kept = []
        for link in self._idle:
            if now < link.unused_until:
                kept.append(link)
            else:
                finish(link)
        self._idle = kept
        if kept:
            self._look_at(min(link.unused_until for link in kept))

    def drain(self) -> None:
        """Close all idle connections: one as old as they are was dead."""
        for link in self._idle:
            finish(link)
        self._idle = []

    def close(self) -> None:
        self.is_closed = True
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        self.drain()
