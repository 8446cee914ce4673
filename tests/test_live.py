"""Scopes that are held live: a write is there as soon as the log has it, in every agent that holds what it touches (G9)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import mnemobus
from mnemobus import Memory, Settings
from servers import eventually

Connect = Callable[..., mnemobus.Bus]


def said(text: str, room: str = "r1", **fields: object) -> Memory:
    return Memory(table="messages", room=room, content={"text": text}, **fields)  # type: ignore[arg-type]


async def texts(bus: mnemobus.Bus, room: str = "r1", limit: int = 20) -> list[str]:
    return [m.content["text"] for m in await bus.recent("messages", room=room, limit=limit)]


async def hold(bus: mnemobus.Bus, room: str = "r1") -> None:
    """Read a room until it is held live."""

    async def held() -> bool:
        await bus.recent("messages", room=room)
        bus._local.drop(f"room:messages:{room}")
        return len(bus._live) > 0

    await eventually(held)


async def test_g6_g9_a_write_is_in_the_writers_own_window_at_once_though_no_worker_runs(
    settings: Settings, connect: Connect
) -> None:
    async with connect() as alice:
        await hold(alice)
        for n in range(5):
            await alice.write(said(str(n)))
            found = await alice.recent("messages", room="r1")
            assert [m.content["text"] for m in found] == [str(k) for k in range(n, -1, -1)]
            assert found.source == "local"
            assert not found.stale


async def test_g9_another_agent_has_it_without_waiting_for_the_commit(
    settings: Settings, connect: Connect
) -> None:
    async with connect() as alice, connect() as bob:
        await hold(bob)
        memory = said("one")
        await alice.write(memory)

        async def seen() -> bool:
            return await texts(bob) == ["one"]

        await eventually(seen)
        await alice.update(memory.id, content={"text": "two"})

        async def changed() -> bool:
            return await texts(bob) == ["two"]

        await eventually(changed)
        await alice.delete(memory.id)

        async def gone() -> bool:
            return await texts(bob) == []

        await eventually(gone)
