"""What single steps cost Redis, in CPU and bytes: the unit costs of docs/scaling.md. There are no targets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import redis.asyncio

from mnemobus import connect
from mnemobus.feed.subscription import Feed

from ..measure import Result
from ..world import World, message, stored

Step = Callable[[], Awaitable[int]]
"""Does a step some times; returns how often."""


class Redis:
    """CPU and bytes of the server, as it reports them."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client

    async def _now(self) -> tuple[float, int, int]:
        info = await self._client.info("all")
        cpu = float(info["used_cpu_user"]) + float(info["used_cpu_sys"])
        return cpu, int(info["total_net_input_bytes"]), int(info["total_net_output_bytes"])

    async def costs(self, step: Step) -> tuple[float, float, float]:
        """Microseconds of CPU, bytes in and bytes out that a step takes."""
        await step()
        before = await self._now()
        times = await step()
        after = await self._now()
        cpu, received, sent = (b - a for a, b in zip(before, after, strict=True))
        return cpu / times * 1e6, received / times, sent / times


async def run(world: World) -> list[Result]:
    cpu = Result("units", "Redis's CPU for a single step", "us")
    net = Result("units", "bytes to and from Redis for a single step", "bytes")
    many = world.some(2_000, 300)
    settings = world.settings(max_backlog=10**7, heartbeat=30.0, max_staleness=60.0, retention=3600)
    async with (
        connect(**settings.model_dump()) as writer,
        connect(**settings.model_dump()) as bus,
        redis.asyncio.Redis.from_url(world.redis_url, max_connections=200) as client,
    ):
        memories = [message(f"room-{n % 100}", n) for n in range(many)]

        async def write() -> int:
            for memory in memories:
                await writer.write(memory)
            return many

        async def write_many() -> int:
            for first in range(0, many, 100):
                await writer.write_many(memories[first : first + 100])
            return many

        async def beat() -> int:
            for _ in range(many // 10):
                await bus._feed.heartbeat.verify()
            return many // 10

        async def hit() -> int:
            for memory in memories:
                bus._local.drop(f"id:{memory.id}")
                await bus.get(memory.id)
            return many

        server = Redis(client)
        found = {
            "a write, alone in its call": await server.costs(write),
            "a write, 100 in a call": await server.costs(write_many),
            "a heartbeat, no partition": await server.costs(beat),
        }
        for count in (0, 10, 100):
            found[f"a fan-out, {count} listeners"] = await _fan_out(
                server, client, bus._feed, count, many // 10
            )
        for number in range(settings.feed_partitions):
            await bus._feed.join(number, 1.0)
        found["a heartbeat, 64 partitions"] = await server.costs(beat)
        with world.workers(settings):
            await stored(writer, memories)
        found["a read that L2 answers"] = await server.costs(hit)
    for name, (time, received, sent) in found.items():
        cpu.samples[name] = [time]
        net.samples[f"{name}, in"] = [received]
        net.samples[f"{name}, out"] = [sent]
    cpu.notes.append("what INFO says before and after, so one round; no workers run meanwhile")
    return [cpu, net]


async def _fan_out(
    server: Redis, client: redis.asyncio.Redis, feed: Feed, listeners: int, times: int
) -> tuple[float, float, float]:
    """The cost of one feed message with this many listeners: the stream, the channel, a bucket to drop."""
    keys = feed._link.keys
    key, bucket = keys.feed(0), keys.bucket(feed._link.epoch, "room:messages:room-1")
    payload = b'{"p":0,"e":"000000000000","v":["1700000000000-0"],"s":["room:messages:room-1"]}'
    heard = []
    for _ in range(listeners):
        subscriber = redis.asyncio.Redis(connection_pool=client.connection_pool).pubsub()
        await subscriber.subscribe(key)
        heard.append(subscriber)

    async def publish() -> int:
        for _ in range(times):
            arguments = [feed._link.epoch, 4096, 4 << 20, "apply", 1, payload, 1, 0]
            await feed._link.run("fanout", [keys.epoch, keys.identity, key, bucket], arguments)
        return times

    try:
        return await server.costs(publish)
    finally:
        for subscriber in heard:
            await subscriber.aclose()
