"""PostgreSQL: the store of many machines.

What keeps concurrent batches apart, in the order in which every transaction takes it, so that none can deadlock:

1. Advisory locks on slots of rooms: shared to write into a room, exclusive to set its tombstone. A put reads its
   room's tombstone; without the lock a deletion and a put could miss each other, as both commit (G3). A batch that
   touches many rooms has every slot; so the exclusive lock is held for the tombstones only, for a moment, and memories
   are deleted without it (store/merge.py).
2. Rows of `tables` and of `memories`, in the order of their keys.

READ COMMITTED suffices, and is what every transaction asks for: each statement begins after the locks are held and sees
all that was committed before, and what it merges into a row is merged into the row's latest version. A batch goes to
the server as columns, one array each in the binary format: JSON and vectors pass from the log into the table as the
same bytes.

Nobody is kept waiting for a server that is away: a call gets the server's own words at once. A connection that turns
out to be dead is replaced, and the call repeated, once. How connections are kept is in connections.py.
"""

from .reader import PostgresReader
from .writer import PostgresWriter

__all__ = ["PostgresReader", "PostgresWriter"]
