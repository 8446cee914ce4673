-- Who this store is, in one row. See identity.py.
CREATE TABLE identity (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    -- A copy of the database has the same.
    store uuid NOT NULL,
    -- The bus whose workers commit here, its key prefix, and its life in Redis.
    bus uuid,
    prefix text,
    life text,
    -- All that the log had before this moment (ms, by the clock of Redis) is in the store.
    reached_ms bigint
);

INSERT INTO identity (store) VALUES (gen_random_uuid());
