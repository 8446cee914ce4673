-- Who this store is, in one row. See identity.py.
CREATE TABLE identity (
    one INTEGER PRIMARY KEY DEFAULT 1 CHECK (one = 1),
    -- A UUID in hex. A copy of the file has the same.
    store TEXT NOT NULL,
    -- The bus whose workers commit here, its key prefix, and its life in Redis.
    bus TEXT,
    prefix TEXT,
    life TEXT,
    -- All that the log had before this moment (ms, by the clock of Redis) is in the store.
    reached_ms INTEGER
);

INSERT INTO identity (store) VALUES (lower(hex(randomblob(16))));
