"""The promises between processes: each agent and worker has its own process, on both stores, and is killed or paused.

Agents get their orders line by line (agent_process.py); workers run under Dramatiq's own command line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import mnemobus
from mnemobus import Settings
from mnemobus.memory import new_id
from servers import AgentProcess, Workers, alive, eventually

StartAgent = Callable[..., AgentProcess]
StartWorkers = Callable[..., Workers]


@pytest.fixture
def settings(settings: Settings, database_url: str) -> Settings:
    """On both stores."""
    return settings.model_copy(update={"database_url": database_url})


def said(text: str, room: str = "r1", **fields: Any) -> dict[str, Any]:
    return {"id": new_id(), "table": "messages", "room": room, "content": {"text": text}, **fields}


def texts(answer: dict[str, Any]) -> list[str]:
    return [memory["content"]["text"] for memory in answer["items"]]


async def recent(agent: AgentProcess, room: str = "r1") -> dict[str, Any]:
    return dict(await agent.do("recent", table="messages", room=room, limit=100))


async def from_its_own_copy(agent: AgentProcess, room: str = "r1") -> list[str]:
    """What an agent has in its own process of a room."""

    async def local() -> dict[str, Any] | None:
        answer = await recent(agent, room)
        return answer if answer["source"] == "local" else None

    return texts(await eventually(local))


async def test_g5_an_agent_drops_its_copy_when_another_process_writes(
    settings: Settings, workers: StartWorkers, agent: StartAgent
) -> None:
    # Given two agents and two workers, each a process, and a copy in both agents
    workers(settings)
    alice, bob = agent(settings), agent(settings)
    memory = said("old")
    await alice.do("write", memory=memory, durability="committed")
    assert await from_its_own_copy(alice) == await from_its_own_copy(bob) == ["old"]

    # When one of them changes it
    await alice.do("update", id=memory["id"], content={"text": "new"})
    await alice.do("committed")

    # Then both see it, the other within the bound at the latest
    assert texts(await recent(alice)) == ["new"]

    async def sees_it() -> bool:
        return texts(await recent(bob)) == ["new"]

    await eventually(sees_it, timeout=settings.max_staleness)
    found = await bob.do("get", id=memory["id"])
    assert found["content"] == {"text": "new"}
    assert (await bob.do("stats"))["drops"] >= 1


async def test_g6_a_token_is_handed_from_process_to_process(
    settings: Settings, workers: StartWorkers, agent: StartAgent
) -> None:
    workers(settings)
    alice, bob = agent(settings), agent(settings)
    for n in range(20):
        # Given that bob holds what was there before, and alice writes
        await from_its_own_copy(bob)
        await alice.do("write", memory=said(str(n)))
        # When she hands him her token
        await bob.do("observe", token=await alice.do("token"))
        # Then his very next answer has it
        assert str(n) in texts(await recent(bob))


async def test_g1_nothing_is_lost_or_doubled_when_workers_and_agents_are_killed(
    settings: Settings, workers: StartWorkers, agent: StartAgent
) -> None:
    # Given two worker pools, two writers and a reader that has a copy of each room
    pools = [workers(settings), workers(settings)]
    alice, bob, carol = agent(settings), agent(settings), agent(settings)
    rooms = [f"room-{n}" for n in range(6)]
    acknowledged: dict[str, list[str]] = {room: [] for room in rooms}

    async def write(writer: AgentProcess, name: str, batches: int) -> None:
        for batch in range(batches):
            room = rooms[batch % len(rooms)]
            memories = [said(f"{name} {batch} {n}", room) for n in range(10)]
            receipts = await writer.do("write_many", memories=memories)
            acknowledged[room] += [id for id, _ in receipts]
            await recent(carol, room)

    # When they write, and meanwhile one worker process is killed, then all of the pool that it was of
    writing = asyncio.gather(write(alice, "alice", 30), write(bob, "bob", 30))
    await eventually(lambda: sum(map(len, acknowledged.values())) > 100, timeout=30)
    pools[0].kill_one()
    await eventually(lambda: sum(map(len, acknowledged.values())) > 200, timeout=30)
    pools[0].kill()
    await writing

    # And a writer right after its last acknowledgement
    last = said("last words", rooms[0])
    await alice.do("write", memory=last)
    acknowledged[rooms[0]].append(last["id"])
    alice.kill()

    # Then the store gets every acknowledged write, once, and the agents agree with it
    async with mnemobus.connect(**{**settings.model_dump(), "own_write_timeout": 0}) as fresh:
        for room, ids in acknowledged.items():

            async def complete(room: str = room, ids: list[str] = ids) -> bool:
                page = await fresh.recent("messages", room=room, limit=1000)
                return sorted(m.id for m in page) == sorted(ids)

            await eventually(complete, timeout=20)
            there = await fresh.recent("messages", room=room, limit=100)

            async def agrees(room: str = room, there: mnemobus.Memories = there) -> bool:
                answers = [await recent(reader, room) for reader in (bob, carol)]
                return all([m["id"] for m in a["items"]] == [m.id for m in there] for a in answers)

            await eventually(agrees, timeout=settings.max_staleness + 1)

        async def all_applied() -> bool:
            return (await fresh.health()).backlog == 0

        await eventually(all_applied)


async def test_g5_an_agent_that_was_paused_does_not_serve_what_it_slept_through(
    settings: Settings, workers: StartWorkers, agent: StartAgent
) -> None:
    # Given an agent with a copy, that is paused as by a debugger or a closed lid
    workers(settings)
    alice, bob = agent(settings), agent(settings)
    await alice.do("write", memory=said("before"), durability="committed")
    assert await from_its_own_copy(bob) == ["before"]
    bob.pause()
    # When a write is committed, and its copy grows too old to be vouched for
    await alice.do("write", memory=said("meanwhile"), durability="committed")
    await asyncio.sleep(settings.max_staleness)
    # Then the first thing that it says when it goes on is not the old copy
    asking = asyncio.create_task(recent(bob))
    await asyncio.sleep(0)
    bob.resume()
    assert texts(await asking) == ["meanwhile", "before"]


async def test_g1_a_graceful_stop_amid_writes_loses_nothing_and_leaves_no_process(
    settings: Settings, workers: StartWorkers, agent: StartAgent
) -> None:
    # Given a pool at work
    pool = workers(settings)
    alice = agent(settings)
    pids = [pool.master, *pool.pids]
    assert len(pids) == 3
    # When it is asked to stop while writes come in
    stopping = asyncio.create_task(asyncio.to_thread(pool.stop))
    writes = 0
    while not stopping.done():
        await alice.do("write_many", memories=[said(str(n)) for n in range(50)])
        writes += 50
    # Then it does, and its processes are gone
    assert await stopping == 0
    await eventually(lambda: not any(map(alive, pids)))
    # And the next pool finds all that it left
    workers(settings, processes=1)
    await alice.do("committed", timeout=20)
    assert await alice.do("count", table="messages", room="r1") == writes
