-- Names are compared as bytes: equality is all that is asked of them, and no change of the system's
-- locale can then spoil an index.
CREATE TABLE memories (
    id uuid PRIMARY KEY,
    created_us bigint NOT NULL,
    -- Two facts that follow from the registers. They are columns because an update that changes a column
    -- of an index's condition has to write to every index of the table: a second put changes put_version,
    -- but not live.
    live boolean NOT NULL GENERATED ALWAYS AS (put_version > deleted_version) STORED,
    -- Not there, but holding the value of an update whose put may still arrive.
    pending boolean NOT NULL GENERATED ALWAYS AS (
        put_version <= deleted_version
        AND greatest(content_version, metadata_version, embedding_version) > deleted_version
    ) STORED,
    tbl text COLLATE "C" NOT NULL,
    room text COLLATE "C" NOT NULL,
    agent text COLLATE "C",
    entity text COLLATE "C",
    world text COLLATE "C",
    -- json, not jsonb: what comes back is byte for byte what was written, and \u0000 is allowed.
    content json,
    metadata json,
    embedding bytea,
    -- The registers (store/merge.py): 16 bytes each, or none for never.
    put_version bytea NOT NULL,
    content_version bytea NOT NULL,
    metadata_version bytea NOT NULL,
    embedding_version bytea NOT NULL,
    deleted_version bytea NOT NULL
);

-- Floats don't compress; trying costs time on every write.
ALTER TABLE memories ALTER COLUMN embedding SET STORAGE EXTERNAL;

-- Listings, read backwards for newest first. Rising keys keep appends at the end of each room's stretch.
CREATE INDEX memories_room ON memories (tbl, room, created_us, id) WHERE live;
CREATE INDEX memories_agent ON memories (tbl, agent, created_us, id) WHERE live AND agent IS NOT NULL;
CREATE INDEX memories_entity ON memories (tbl, entity, created_us, id) WHERE live AND entity IS NOT NULL;
CREATE INDEX memories_world ON memories (tbl, world, created_us, id) WHERE live AND world IS NOT NULL;

-- What deleting a room has to find besides the live rows: what an earlier delivery of the same deletion put
-- an end to, and values to erase. In ordinary operation a row is in neither.
CREATE INDEX memories_dead ON memories (tbl, room, deleted_version) WHERE NOT live;
CREATE INDEX memories_pending ON memories (tbl, room) WHERE pending;

-- The last deletion of each room: what is older and arrives later stays dead.
CREATE TABLE room_tombstones (
    tbl text COLLATE "C" NOT NULL,
    room text COLLATE "C" NOT NULL,
    version bytea NOT NULL,
    PRIMARY KEY (tbl, room)
);

-- The length of a table's embeddings, which its first one fixes.
CREATE TABLE tables (
    tbl text COLLATE "C" PRIMARY KEY,
    embedding_length integer NOT NULL
);

CREATE TABLE migrations (
    number integer PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);
