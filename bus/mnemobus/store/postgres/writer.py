"""How workers commit to PostgreSQL: a batch in one round trip if possible, else in a transaction.

A call is repeated if another transaction got in its way, or if its connection was dead."""

from __future__ import annotations

import logging
import math
import random
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg import Connection, errors

from ...errors import SchemaError, StoreError, StoreTooSlow, StoreUnavailable
from ...keys import Dimensions, Version
from ...log.events import Event
from ...settings import Settings
from .. import Applied, Cursor, Deletion, Identity, merge
from ..merge import Delta
from .arrays import INT, Byteas, Int4s, uuids
from .connections import Connections, Session, at_once
from .locks import LOCKS, lock_slot
from .schema import upgrade
from .server import PostgresServer
from .statements import PLACE, columns
from .transaction import PostgresTransaction, transaction_on

T = TypeVar("T")

logger = logging.getLogger("mnemobus.store")


_TRIES = 5
"""How often a call is tried that other transactions got in the way of."""
_AT_ONCE = 64 << 10
"""Bytes of a batch up to which it is sent and committed in one go. A process that is paused amid a larger one would
keep its locks: the server waits for the rest."""
_LOCK_TRIES, _LOCK_PATIENCE = 20, 0.1
"""How often a deletion waits for its rooms' locks, and for how many seconds at first. A transaction
that waits for a lock holds up all that come later; so it gives up in between."""


class _Won(NamedTuple):
    """Which memories a batch changed, and whether that is all that it names."""

    ids: set[str]
    all: bool


class PostgresWriter:
    def __init__(self, settings: Settings) -> None:
        self._server = PostgresServer(settings)
        self._connections: Connections | None = None
        self._prepared = False
        self._preparing = Lock()
        self._expected: str | None = None

    def open(self) -> None:
        if self._connections is None or self._connections.is_closed:
            self._connections = Connections(self._server)
        self._prepare()

    def close(self) -> None:
        if self._connections is not None:
            self._connections.close()

    def apply(self, events: Sequence[Event], *, patience: float = 1.0) -> Applied:
        applied = Applied()
        rest, deletions = merge.part(events)
        if rest or not deletions:
            won = self._apply_at_once(rest) if patience == 1.0 else None
            if won is None or not won.all:
                applied = self._transact(lambda t: merge.apply(t, rest), patience)
            if won is not None:
                applied.won |= won.ids
        for some in deletions:
            tries = 0

            def bury(transaction: PostgresTransaction, some: Sequence[Deletion] = some) -> None:
                nonlocal tries
                tries += 1
                transaction.be_patient(_LOCK_PATIENCE * patience * 2 ** ((tries - 1) // 5))
                merge.bury(transaction, some)

            self._transact(bury, patience)
            applied.add(self._transact(partial(merge.begin_clearing, deletions=some), patience))
        return applied

    def _apply_at_once(self, events: Sequence[Event]) -> _Won | None:
        """Commit a batch in one round trip if nothing has to be looked up for it, as for most. None for others.

        What changed nothing may contradict what is stored. Then merge.apply follows, in another transaction, where
        the other events have no further effect.
        """
        if not events or any(event.embedding for event in events):
            return None
        batch = merge.collapse(events)
        if batch.refused or sum(map(_bytes, batch.deltas)) > _AT_ONCE:
            return None
        self._prepare()
        sql = self._server.sql

        def work(link: Session) -> _Won | None:
            if link.pooled:
                return None
            slots = sorted({lock_slot(delta.dimensions[:2]) for delta in batch.deltas})
            locks = (INT.pack(LOCKS), Int4s.of([INT.pack(slot) for slot in slots]))
            # Another store than that is left as it is.
            expected = None if self._expected is None else bytes.fromhex(self._expected)
            upsert = (*columns(batch.deltas), expected)
            try:
                _, found = at_once(link, ((sql.share_at_once, locks), (sql.at_once, upsert)))
            except errors.ReadOnlySqlTransaction:  # by default, perhaps: merge.apply asks for another
                return None
            ids = {(found.get_value(row, 0) or b"").decode() for row in range(found.ntuples)}
            return _Won(ids, len(ids) == len(batch.deltas))

        return self._run(work)

    def clear(
        self,
        deletion: Deletion,
        after: Cursor = merge.BEGINNING,
        rows: int = merge.STEP,
        *,
        patience: float = 1.0,
    ) -> Cursor | None:
        return self._transact(lambda t: t.clear(deletion, after, rows), patience)

    def ended(self, deletion: Deletion) -> Iterator[list[tuple[str, Dimensions]]]:
        self._prepare()
        try:
            with self._opened().one() as link:
                self._server.begin(link, math.inf)
                try:
                    with link.cursor("ended") as cursor:
                        cursor.execute(self._server.sql.ended, (*deletion.room, Byteas.of(deletion.versions)))
                        while rows := cursor.fetchmany(merge.TOLD):
                            yield [(id, Dimensions(*dimensions)) for id, *dimensions in rows]
                finally:
                    if not link.closed:
                        link.rollback()
        except psycopg.Error as error:
            raise self._server.error(error) from error

    def expect(self, store: str | None) -> None:
        self._expected = store

    def identity(self) -> Identity:
        return self._run(self._identity)

    def _identity(self, connection: Connection[Any]) -> Identity:
        try:
            row = connection.execute(PLACE).fetchone()
        except psycopg.Error as error:
            if connection.closed:
                raise
            logger.debug("can't tell where the store is: %s", error)
            row = None
        place, history = row or ("", "")
        found = connection.execute(self._server.sql.identity).fetchone()
        if found is None:
            raise SchemaError(f"{self._server.where}: the table {self._server.names.identity} is empty")
        return self._server.identity_of(found, place, history)

    def serve(self, bus: str, prefix: str, life: str, *, instead: bool = False) -> None:
        self._do(self._server.sql.serve, (bus, prefix, life, life, bus, instead))

    def reach(self, moment: int, epoch: str = "") -> bool:
        if not epoch:
            self._do(self._server.sql.reach, (moment, moment))
            return True

        def work(link: Session) -> bool:
            with transaction_on(self._server, link) as transaction:
                # What comes before it in the server's log is on disk once this is.
                transaction.run("SET LOCAL synchronous_commit = on", ())
                return bool(transaction.run(self._server.sql.reach_in, (moment, uuid.UUID(epoch))))

        return self._run(work)

    def relax(self, relaxed: bool) -> None:
        before, self._server.relaxed = self._server.relaxed, relaxed
        if before != relaxed and self._connections is not None:
            self._connections.drain()

    def epoch(self, *, begin: bool = False) -> str:
        sql = self._server.sql
        if begin:
            [(there,)] = self._do(b"SELECT to_regclass(%s) IS NOT NULL", (sql.forgetful,))
            if not there:
                try:
                    self._do(sql.make_epoch, ())
                except (
                    StoreError
                ) as error:  # another worker makes it at the same time; if not, the next statement fails
                    logger.debug("%s", error)
            self._do(sql.begin_epoch, (uuid.uuid4(),))
        try:
            found = self._do(sql.epoch, ())
        except SchemaError:  # there is no such table
            return ""
        return str(found[0][0]) if found else ""

    def lacks(self, memories: Mapping[str, Version]) -> list[str]:
        ids = list(memories)
        if not ids:
            return []
        versions = Byteas.of([version.pack() for version in memories.values()])
        has = {id for (id,) in self._do(self._server.sql.has, (uuids(ids), versions))}
        return [id for id in ids if id not in has]

    def _prepare(self) -> None:
        """See to the schema, once: when opened, or later if the server was away then."""
        if self._prepared:
            return
        with self._preparing:
            if not self._prepared:
                try:
                    upgrade(self._server)
                except psycopg.Error as error:
                    raise self._server.error(error) from error
                self._prepared = True

    def _opened(self) -> Connections:
        if self._connections is None:
            raise StoreUnavailable(f"{self._server.where}: the store is not open")
        return self._connections

    def _do(self, query: bytes, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        """One statement that changes nothing else than who the store is, or nothing."""

        def work(link: Session) -> list[tuple[Any, ...]]:
            with transaction_on(self._server, link) as transaction:
                return transaction.run(query, parameters)

        return self._run(work)

    def _transact(self, work: Callable[[PostgresTransaction], T], patience: float) -> T:
        """Do this work in a transaction, in the store that is expected."""
        self._prepare()

        def attempt(link: Session) -> T:
            with transaction_on(self._server, link, patience) as transaction:
                result = work(transaction)
                if self._expected not in (None, transaction.store()):
                    raise StoreUnavailable(f"{self._server.where} is another store than it was")
            return result

        return self._run(attempt)

    def _run(self, work: Callable[[Session], T]) -> T:
        """Do this work on a connection; it may be repeated, as it is if other transactions got in its way."""
        connections = self._opened()
        tries, worn = 1, False
        while True:
            try:
                with connections.one() as link:
                    try:
                        return work(link)
                    except psycopg.Error as error:
                        lost = link.closed
                        if not self._server.worn(link, error) or (worn and not lost):
                            raise
                        if worn:  # this batch may be what kills the server
                            raise StoreTooSlow(str(self._server.error(error))) from error
                        connections.drain()  # the others are as old
                        worn = True
            except (errors.DeadlockDetected, errors.SerializationFailure, errors.LockNotAvailable) as error:
                if tries == (_LOCK_TRIES if isinstance(error, errors.LockNotAvailable) else _TRIES):
                    raise self._server.error(error) from error
                time.sleep(random.uniform(0, 0.01 * 2 ** min(tries, 5)))
                tries += 1
            except psycopg.Error as error:
                meant = self._server.error(error)
                if worn and type(meant) is StoreUnavailable:
                    # The server went away during the batch, and has not come back at once.
                    meant = StoreTooSlow(str(meant))
                raise meant from error
            except (OverflowError, UnicodeError, struct.error) as error:  # while building the columns
                raise self._server.error(error) from error


def _bytes(delta: Delta) -> int:
    return 300 + len(delta.content or b"") + len(delta.metadata or b"")
