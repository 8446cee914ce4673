CREATE TABLE memories (
    id BLOB PRIMARY KEY NOT NULL,  -- a UUID's 16 bytes
    created_us INTEGER NOT NULL,
    tbl TEXT NOT NULL,
    room TEXT NOT NULL,
    agent TEXT,
    entity TEXT,
    world TEXT,
    -- The registers (store/merge.py): blobs of 16 bytes, or none for never. They come before what is large,
    -- so that reading them stays within a row's first page.
    put_version BLOB NOT NULL,
    content_version BLOB NOT NULL,
    metadata_version BLOB NOT NULL,
    embedding_version BLOB NOT NULL,
    deleted_version BLOB NOT NULL,
    live INTEGER NOT NULL GENERATED ALWAYS AS (put_version > deleted_version) VIRTUAL,
    -- Not there, but holding the value of an update whose put may still arrive.
    pending INTEGER NOT NULL GENERATED ALWAYS AS (
        put_version <= deleted_version
        AND max(content_version, metadata_version, embedding_version) > deleted_version
    ) VIRTUAL,
    content TEXT,
    metadata TEXT,
    embedding BLOB
);

-- Listings, read backwards for newest first.
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
    tbl TEXT NOT NULL,
    room TEXT NOT NULL,
    version BLOB NOT NULL,
    PRIMARY KEY (tbl, room)
) WITHOUT ROWID;

-- The length of a table's embeddings, which its first one fixes.
CREATE TABLE tables (
    tbl TEXT PRIMARY KEY NOT NULL,
    embedding_length INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE migrations (
    number INTEGER PRIMARY KEY,
    applied_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
