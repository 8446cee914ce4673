"""Warm reads: of results that Redis has, and this process does not."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

from mnemobus import Memories, connect
from mnemobus.cache.query import GET_FIELD, field_of
from mnemobus.store import Query

from ..floors.reads import Hash
from ..inside import TABLE, all_of, fill, forget_locally, fresh, rooms_of, scopes_of
from ..measure import OURS, Result, interleave, per_call
from ..world import World, message

ROOMS = 50
PER_ROOM = 20
HGET = "a bare HGET of the same bytes"


async def run(world: World) -> list[Result]:
    get = Result("warm", "read of one memory that Redis has (L2)", "us")
    recent = Result("warm", f"read of a room's newest {PER_ROOM} that Redis has (L2)", "us")
    memories = [message(f"room-{n % ROOMS}", n) for n in range(ROOMS * PER_ROOM)]
    settings = world.settings()
    fill(settings, memories)
    ids = [memory.id for memory in memories[:: world.some(2, 5)]]
    rooms = [f"room-{n}" for n in range(ROOMS)]
    async with connect(**settings.model_dump()) as bus:
        bare = Hash()
        await bare.open(world.redis_url)

        async def newest(room: str) -> Memories:
            return await bus.recent(TABLE, room=room, limit=PER_ROOM)

        async def ours(what: Sequence[str], scopes: Sequence[str], read: object) -> float:
            await fresh(bus)
            forget_locally(bus, scopes)
            before = bus.stats().hits_shared
            took = await per_call(read, what)  # type: ignore[arg-type]
            if bus.stats().hits_shared - before != len(what):
                raise RuntimeError("some of the reads that Redis was to answer were answered elsewhere")
            return took

        def key(scope: str) -> str:
            return bus._link.keys.bucket(bus._link.epoch, scope)

        def hget(field: bytes) -> object:
            def read(key: str) -> Awaitable[bytes | None]:
                return bare.get(key, field)

            return read

        await all_of(bus.get(id) for id in ids)
        await all_of(newest(room) for room in rooms)
        rounds = world.rounds(25, 4)
        one, many = b"q:" + GET_FIELD, b"q:" + field_of("recent", Query(TABLE, "any"), PER_ROOM)
        id_scopes, room_scopes = scopes_of(ids), rooms_of(rooms)
        id_keys, room_keys = [key(s) for s in id_scopes], [key(s) for s in room_scopes]
        for keys, field in ((id_keys, one), (room_keys, many)):
            for k in keys:
                assert await bare.get(k, field), k
        get.samples = await interleave(
            {
                OURS: lambda: ours(ids, id_scopes, bus.get),
                HGET: lambda: per_call(hget(one), id_keys),  # type: ignore[arg-type]
            },
            rounds,
        )
        recent.samples = await interleave(
            {
                OURS: lambda: ours(rooms, room_scopes, newest),
                HGET: lambda: per_call(hget(many), room_keys),  # type: ignore[arg-type]
            },
            rounds,
        )
        await bare.close()
    for result in (get, recent):
        result.at_most(1.5, HGET)
        result.notes.append(
            "ours also decides that there is no lease to take, and leaves a copy in the process; the bare one gives"
            " the bytes to nobody"
        )
    return [get, recent]
