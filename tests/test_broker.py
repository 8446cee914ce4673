"""The broker: how batches of the log come to workers, stay theirs, come back, and what upkeep removes.

Here the test plays the worker: it takes batches from consumers, and confirms them or not. test_workers.py tests the
whole pool.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import dramatiq
import pytest
from dramatiq.errors import QueueNotFound
from redis.exceptions import ResponseError

from chaos.clocks import WallClock
from mnemobus import Settings
from mnemobus.connection.link import ThreadedLink
from mnemobus.keys import APPLY_GROUP, Dimensions, Version
from mnemobus.log.append import publish_call
from mnemobus.log.events import PUT, Event
from mnemobus.memory import new_id
from mnemobus_workers.broker import (
    ALONE_AFTER,
    DEAD_AFTER,
    Batch,
    BatchProxy,
    Stopping,
    StreamBroker,
    StreamConsumer,
)
from mnemobus_workers.fanout import FanOut, Part
from mnemobus_workers.pool import make_broker
from mnemobus_workers.upkeep import Upkeep
from servers import RedisServer, wait_until

CLAIM_IDLE = 0.3
BROKER = importlib.import_module(
    "mnemobus_workers.broker"
)  # the package's attribute of that name is the broker
FANOUT = importlib.import_module("mnemobus_workers.fanout")
UPKEEP = importlib.import_module("mnemobus_workers.upkeep")


@dataclass
class Worker:
    """One worker process's view of the log, and of its first partition where nothing else is said."""

    broker: StreamBroker
    consumer: StreamConsumer

    @property
    def everyone(self) -> FanOut:
        return FanOut(self.broker.settings, self.link)

    @property
    def link(self) -> ThreadedLink:
        return self.broker.link

    def take(self, timeout: float = 10) -> BatchProxy:
        proxy: BatchProxy = wait_until(lambda: next(self.consumer), timeout, what="a batch to be delivered")
        return proxy

    def gets_nothing(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if next(self.consumer) is not None:
                return False
        return True

    def confirm(self, proxy: BatchProxy) -> list[bytes]:
        """As a worker does once a batch is committed; nobody is told. IDs of its events."""
        self.everyone.confirm(self.link.epoch, [], proxy.batch.ids())
        self.consumer.ack(proxy)
        return ids_of(proxy.batch)

    def tidy(self) -> None:
        Upkeep(self.broker, None).tidy()  # type: ignore[arg-type]

    def call(self, *command: Any) -> Any:
        return self.link.command(*command)

    @property
    def log(self) -> str:
        return self.link.keys.log(0)

    def publish(self, *texts: str, partition: int = 0) -> list[bytes]:
        """Events in the log, as a bus puts them there; their IDs."""
        self.call("PING")  # to be connected is to know how the log is laid out
        of_room = self.link.keys.log_partition
        room = next(room for n in count() if of_room(room := f"r{n}") == partition)
        events = [event(text, room).fields() for text in texts]
        ids, _ = self.link.run(
            "publish", *publish_call(self.link, partition, secrets.token_hex(8), 1, events)
        )
        return list(ids)

    def pending(self, partition: int = 0) -> dict[bytes, tuple[str, int, int]]:
        """Of each pending entry: whose it is, for how many ms it has been idle, how often it was delivered."""
        reply = self.call("XPENDING", self.link.keys.log(partition), APPLY_GROUP, "-", "+", 1000)
        return {id: (consumer.decode(), idle, deliveries) for id, consumer, idle, deliveries in reply}

    def forsake(self, *ids: bytes, deliveries: int = 1, partition: int = 0) -> None:
        """As if nobody had renewed these entries for long, after so many deliveries."""
        for id in ids:
            log, owner = self.link.keys.log(partition), self.pending(partition)[id][0]
            claim = ("XCLAIM", log, APPLY_GROUP, owner, 0, id)
            self.call(*claim, "IDLE", 86_400_000, "RETRYCOUNT", deliveries, "JUSTID")

    def backlog(self, partition: int = 0) -> int:
        added, applied = self.call("HMGET", self.link.keys.meter(partition), "added", "applied")
        return int(added or 0) - int(applied or 0)

    def ids(self) -> list[bytes]:
        """What is in the log."""
        return [id for id, _ in self.call("XRANGE", self.log, "-", "+")]


def event(text: str, room: str = "r1") -> Event:
    content = b'{"text":"%s"}' % text.encode()
    return Event(PUT, Dimensions("messages", room), new_id(), content, b"{}", created_us=1)


def ids_of(batch: Batch) -> list[bytes]:
    return [id for id, _ in batch.entries]


def texts(batch: Batch) -> list[str]:
    """The texts of a batch's events."""
    found = [dict(zip(fields[::2], fields[1::2], strict=True))[b"content"] for _, fields in batch.entries]
    return [content.decode().split('"')[3] for content in found]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"log_partitions": 1, "claim_idle": CLAIM_IDLE})


@pytest.fixture
def worker() -> Iterator[Callable[..., Worker]]:
    """Starts workers; each has a name of its own in the consumer group, as processes have."""
    started: list[StreamBroker] = []

    def start(settings: Settings, timeout: int = 50, **overrides: Any) -> Worker:
        broker = make_broker(settings.model_copy(update=overrides))
        started.append(broker)
        return Worker(broker, broker.consume("log", timeout=timeout))

    yield start
    for broker in started:
        broker.close()


StartWorker = Callable[..., Worker]


# What Dramatiq sees


def test_importing_the_workers_connects_to_nothing(tmp_path: Any) -> None:
    # Given addresses at which somebody would notice
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        port = listener.getsockname()[1]
        urls = {
            "REDIS_URL": f"redis://127.0.0.1:{port}",
            "MNEMOBUS_DATABASE_URL": f"postgresql://127.0.0.1:{port}/x",
        }
        # When the workers' module is imported
        code = "import mnemobus_workers; print(sorted(mnemobus_workers.broker.queues))"
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=os.environ | urls, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        # Then there is a broker with a queue for the log, and nobody was called
        assert done.stdout.split() == ["['log']"], done.stderr
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert list(tmp_path.iterdir()) == []


def test_nothing_can_be_enqueued(settings: Settings) -> None:
    broker = make_broker(settings)
    with pytest.raises(
        TypeError, match="this broker delivers mnemobus's log and nothing else: write through a bus instead"
    ):
        broker.enqueue(dramatiq.Message("log", "apply", (), {}, {}))


def test_a_queue_that_is_not_the_log_is_not_found(settings: Settings) -> None:
    broker = make_broker(settings)
    for name in ("log-0", "default"):
        with pytest.raises(QueueNotFound, match=name):
            broker.consume(name)


# Batches


def test_what_has_gathered_comes_as_one_batch(each_server: Settings, worker: StartWorker) -> None:
    # Given a worker that waits
    me = worker(each_server)
    assert next(me.consumer) is None
    # When one event comes, it is a batch
    me.publish("0")
    batch = me.take().batch
    assert texts(batch) == ["0"]
    [id] = ids_of(batch)
    assert repr(batch) == f"<1 events of log partition 0 ({id.decode()} to {id.decode()})>"
    # When more come meanwhile, they are the next one
    ids = me.publish("1", "2", "3")
    proxy = me.take()
    assert texts(proxy.batch) == ["1", "2", "3"]
    assert ids_of(proxy.batch) == ids
    assert proxy.batch.hopeless is None


def test_a_confirmed_batch_is_done_with(each_server: Settings, worker: StartWorker) -> None:
    me = worker(each_server)
    me.publish("0", "1")
    first = me.take()
    me.publish("2")
    second = me.take()
    assert me.backlog() == 3
    assert len(me.pending()) == 3
    me.confirm(first)
    assert me.backlog() == 1
    assert list(me.pending()) == ids_of(second.batch)
    # To confirm it again, as another worker that had it too would, changes nothing
    me.confirm(first)
    assert me.backlog() == 1
    me.confirm(second)
    assert me.backlog() == 0
    assert me.pending() == {}
    assert next(me.consumer) is None
    assert me.call("HGET", me.link.keys.meter(0), "batches") == b"2"


def test_mnemobus_batch_size_is_how_many_events_a_batch_has_at_most(
    settings: Settings, worker: StartWorker
) -> None:
    me = worker(settings, batch_size=10)
    me.publish(*map(str, range(25)))
    sizes = []
    for _ in range(3):
        proxy = me.take()
        sizes.append(len(proxy.batch.entries))
        me.confirm(proxy)
    assert sizes == [10, 10, 5]


def test_mnemobus_batch_bytes_is_how_large_a_batch_is_at_most(
    settings: Settings, worker: StartWorker
) -> None:
    # Given events of 2 kB, and batches of 10 kB
    me = worker(settings, batch_bytes=10_000)
    me.publish(*("x" * 1_900 for _ in range(40)))
    sizes = []
    while sum(sizes) < 40:
        proxy = me.take()
        sizes.append(len(proxy.batch.entries))
        me.confirm(proxy)
    # Then batches grow, as it becomes known how large events are, and not beyond that
    assert 4 <= max(sizes) <= 5
    assert sizes[0] == 1


def test_a_process_holds_two_batches_at_most(settings: Settings, worker: StartWorker) -> None:
    me = worker(settings, batch_size=1)
    me.publish("0", "1", "2")
    first, _ = me.take(), me.take()
    assert me.gets_nothing(0.2)
    assert len(me.pending()) == 2
    # When one is done with, the next comes; a consumer that waits for room hears of it at once
    threading.Timer(0.1, me.confirm, [first]).start()
    patient = me.broker.consume("log", timeout=10_000)
    began = time.monotonic()
    third = wait_until(lambda: next(patient))
    assert texts(third.batch) == ["2"]
    assert time.monotonic() - began < 5


# Whose a batch is


def test_g1_a_dead_workers_batch_is_claimed_by_another(each_server: Settings, worker: StartWorker) -> None:
    dead, heir = worker(each_server), worker(each_server)
    # Given a worker that dies with a batch in its hands
    ids = dead.publish("0", "1", "2")
    assert ids_of(dead.take().batch) == ids
    dead.forsake(*ids)
    # Then another gets the same events
    proxy = heir.take()
    assert texts(proxy.batch) == ["0", "1", "2"]
    assert {(owner, n) for owner, _, n in heir.pending().values()} == {(heir.broker.consumer_name, 2)}
    heir.confirm(proxy)
    assert heir.backlog() == 0


def test_mnemobus_claim_idle_is_how_long_a_dead_workers_batch_waits(
    settings: Settings, worker: StartWorker
) -> None:
    dead, heir, patient = worker(settings), worker(settings), worker(settings, claim_idle=60)
    dead.publish("0")
    began = time.monotonic()
    dead.take()
    heir.take()
    assert time.monotonic() - began >= CLAIM_IDLE
    # while one that is set to wait longer does so
    assert patient.gets_nothing(2 * CLAIM_IDLE)


def test_g1_a_batch_that_is_renewed_is_nobody_elses(settings: Settings, worker: StartWorker) -> None:
    slow, other = worker(settings, timeout=10), worker(settings, timeout=10)
    slow.publish("0", "1")
    proxy = slow.take()
    # Given a worker that is slow, and renews what it holds
    deadline = time.monotonic() + 3 * CLAIM_IDLE
    while time.monotonic() < deadline:
        slow.broker.renew()
        assert next(other.consumer) is None
    # Then it is still its own, delivered once
    assert {(owner, n) for owner, _, n in slow.pending().values()} == {(slow.broker.consumer_name, 1)}
    slow.confirm(proxy)
    assert slow.backlog() == 0


# Several log partitions


@pytest.fixture
def three(each_server: Settings) -> Settings:
    return each_server.model_copy(update={"log_partitions": 3})


def test_what_has_gathered_in_all_log_partitions_comes_as_one_batch(
    three: Settings, worker: StartWorker
) -> None:
    me = worker(three)
    # Given events in two of three partitions
    first, second = me.publish("0", "1"), me.publish("2", partition=2)
    # Then they are one batch, and one call confirms it
    proxy = me.take()
    assert proxy.batch.ids() == {0: first, 2: second}
    assert sorted(texts(proxy.batch)) == ["0", "1", "2"]
    assert {me.backlog(p) for p in range(3)} == {0, 1, 2}
    me.confirm(proxy)
    assert [me.backlog(p) for p in range(3)] == [0, 0, 0]
    assert [me.pending(p) for p in range(3)] == [{}, {}, {}]


def test_mnemobus_batch_size_is_for_all_log_partitions_together(three: Settings, worker: StartWorker) -> None:
    me = worker(three, batch_size=9)
    # Given two partitions that are busy, and one that is quiet
    for partition in (0, 1):
        me.publish(*map(str, range(15)), partition=partition)
    sizes = []
    while sum(map(sum, sizes)) < 30:
        proxy = me.take()
        sizes.append([len(ids) for ids in proxy.batch.ids().values()])
        me.confirm(proxy)
    # Then what the quiet one leaves goes to the others
    assert sizes == [[4, 4], [4, 4], [4, 4], [3, 3]]
    # and one that is busy alone has all of it
    me.publish(*map(str, range(15)), partition=2)
    assert [len(me.confirm(me.take())) for _ in range(2)] == [9, 6]


def test_g1_what_a_dead_worker_left_in_several_log_partitions_is_claimed_together(
    three: Settings, worker: StartWorker
) -> None:
    dead, heir = worker(three), worker(three)
    first, second = dead.publish("0"), dead.publish("1", "2", partition=1)
    dead.take()
    dead.forsake(*first)
    dead.forsake(*second, partition=1)
    proxy = heir.take()
    assert proxy.batch.ids() == {0: first, 1: second}
    # and what it hands back is anybody's
    heir.consumer.requeue([proxy])
    assert all(n == 1 for p in (0, 1) for _, _, n in heir.pending(p).values())
    assert heir.take().batch.ids() == {0: first, 1: second}


@pytest.mark.parametrize("trouble", ["wrong type", "gone"])
def test_a_log_partition_that_cannot_be_read_does_not_stop_the_others(
    three: Settings, worker: StartWorker, caplog: Any, trouble: str
) -> None:
    me = worker(three)
    me.publish("0", partition=1)
    me.confirm(me.take())
    # Given a partition in whose place somebody put something else, or nothing, with a batch in a worker's hands
    me.publish("1")
    me.publish("2", partition=1)
    held = me.take()
    me.call("DEL", me.log)
    if trouble == "wrong type":
        me.call("SET", me.log, "x")
    # Then the others go on: what is held is confirmed there, and what comes is delivered
    me.confirm(held)
    assert me.backlog(1) == 0
    more = me.publish("3", partition=1)
    proxy = me.take()
    assert proxy.batch.ids() == {1: more}
    me.confirm(proxy)
    if trouble == "wrong type":
        assert "log partition 0 can't be read, the others go on" in caplog.text
        assert f"{me.log} holds something else than a log" in caplog.text
        assert me.broker.state.report(0, 1, "").waits_for == "log partition 0"
        me.call("DEL", me.log)
    # and once that is mended, it is read again
    again = me.publish("4")
    assert me.take().batch.ids() == {0: again}
    assert me.broker.state.report(0, 1, "").waits_for == ""


def test_a_worker_of_the_version_before_shares_the_log(three: Settings, worker: StartWorker) -> None:
    me = worker(three)
    # Given a worker that reads each partition by itself, and confirms it by itself
    me.consumer._make_group(0)
    me.publish("0", "1")
    other = ("XREADGROUP", "GROUP", APPLY_GROUP, "older", "COUNT", 1, "STREAMS", me.log, ">")
    [[_, [[taken, _]]]] = me.call(*other).items() if three.redis_protocol == 3 else me.call(*other)
    # Then each gets what the other has not
    proxy = me.take()
    assert taken not in ids_of(proxy.batch)
    me.confirm(proxy)
    assert list(me.pending()) == [taken]
    me.call("XACK", me.log, APPLY_GROUP, taken)
    me.call("HINCRBY", me.link.keys.meter(0), "applied", 1)
    assert me.backlog() == 0


def test_g4_a_batch_is_confirmed_in_the_epoch_whose_buckets_are_dropped_or_not_at_all(
    each_server: Settings, worker: StartWorker
) -> None:
    me = worker(each_server)
    me.publish("0")
    proxy = me.take()
    known = me.link.epoch
    feed = me.link.keys.feed(0)
    # When another epoch has begun that this process has not met
    me.call("HSET", me.link.keys.epoch, "epoch", "another")
    message = Part(
        0, [Event(PUT, Dimensions("messages", "r1"), new_id(), b"{}", b"{}", version=Version(1, 1))]
    )
    assert not me.everyone.confirm(known, [message], proxy.batch.ids())
    # Then nothing is said and nothing confirmed, and it knows better now
    assert me.link.epoch == "another"
    assert len(me.pending()) == 1
    assert me.call("KEYS", feed.replace("f0", "f*")) == []
    assert me.everyone.confirm("another", [message], proxy.batch.ids())
    assert me.pending() == {}


def test_g5_nothing_is_confirmed_that_not_everyone_was_told(
    settings: Settings, worker: StartWorker, monkeypatch: Any
) -> None:
    # Given a batch that takes several calls, of which the first goes wrong
    monkeypatch.setattr(FANOUT, "SCOPES_PER_CALL", 1)
    me = worker(settings)
    me.publish("0")
    proxy = me.take()
    scopes = [Dimensions("messages", f"r{n}") for n in range(8)]
    part = Part(
        0, [Event(PUT, each, new_id(), b"{}", b"{}", version=Version(1, n)) for n, each in enumerate(scopes)]
    )
    wrong = me.link.keys.feed(me.link.keys.feed_partition("room:messages:r0"))
    me.call("SET", wrong, "no feed")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        me.everyone.confirm(me.link.epoch, [part], proxy.batch.ids())
    # Then it is not confirmed before that is mended
    assert len(me.pending()) == 1
    me.call("DEL", wrong)
    assert me.everyone.confirm(me.link.epoch, [part], proxy.batch.ids())
    assert me.pending() == {}


# Whose a batch is while Redis's clock is set


@pytest.fixture
def clocked(own_redis: Callable[..., RedisServer], wall_clock: WallClock, settings: Settings) -> Settings:
    """A Redis whose wall clock can be set."""
    server = own_redis("--stream-node-max-entries", "1", environment=wall_clock.environment)
    return settings.model_copy(update={"redis_url": server.url})


def test_g1_a_dead_workers_batch_is_claimed_though_redis_clock_was_set_back(
    clocked: Settings, wall_clock: WallClock, worker: StartWorker, caplog: Any
) -> None:
    # Given two workers with a batch each, and one with a batch that it failed to apply
    dead, live, failing = worker(clocked), worker(clocked), worker(clocked)
    lost = dead.publish("0", "1")
    assert ids_of(dead.take().batch) == lost
    kept = live.publish("2")
    held = live.take()
    failed = live.publish("3")
    failing.consumer.nack(failing.take())
    # When Redis's clock is set back by an hour, and one of them dies
    now = live.link.client.time()[0]
    wall_clock.set_ahead(-3600)
    assert now - live.link.client.time()[0] > 3000
    heir = worker(clocked, timeout=10)
    began = time.monotonic()
    got: list[bytes] = []
    while len(got) < 3 and time.monotonic() - began < 60:
        live.broker.renew()
        proxy = next(heir.consumer)
        if proxy is not None:
            heir.confirm(proxy)
            got += ids_of(proxy.batch)
            assert time.monotonic() - began >= CLAIM_IDLE
    # Then another gets what nobody works on, once it was idle for claim_idle by that one's own clock
    assert sorted(got) == [*lost, *failed]
    assert "Redis's clock was set back: 2 events" in caplog.text
    # and what a live worker renews stays its own
    until = time.monotonic() + 3 * CLAIM_IDLE
    while time.monotonic() < until:
        live.broker.renew()
        assert next(heir.consumer) is None
    assert {id: (owner, n) for id, (owner, _, n) in live.pending().items()} == {
        kept[0]: (live.broker.consumer_name, 1)
    }
    live.confirm(held)
    assert live.backlog() == 0


def test_g1_redis_clock_set_forward_costs_one_delivery_at_most(
    clocked: Settings, wall_clock: WallClock, worker: StartWorker
) -> None:
    # Given a worker with a batch, and another one
    slow, other = worker(clocked), worker(clocked, timeout=10)
    ids = slow.publish("0", "1")
    held = slow.take()
    # When Redis's clock is set forward by two days, then the batch looks idle, and is claimed once
    wall_clock.set_ahead(2 * 86_400)
    claimed = other.take()
    assert ids_of(claimed.batch) == ids
    # and from then on it is its new owner's, who renews it
    until = time.monotonic() + 3 * CLAIM_IDLE
    while time.monotonic() < until:
        other.broker.renew()
        assert next(slow.consumer) is None
    assert {(owner, n) for owner, _, n in other.pending().values()} == {(other.broker.consumer_name, 2)}
    # Whoever is done first, the events are counted once
    slow.confirm(held)
    other.confirm(claimed)
    assert other.backlog() == 0
    # and the log is trimmed as far as it was applied, and no further
    more = slow.publish("2")
    slow.tidy()
    assert slow.ids() == [ids[1], *more]


def test_the_log_is_trimmed_though_redis_clock_was_ahead_once(
    clocked: Settings, wall_clock: WallClock, worker: StartWorker
) -> None:
    # Given a log that was written while Redis's clock was a year ahead, and applied
    wall_clock.set_ahead(365 * 86_400)
    me = worker(clocked, retention=1.0)
    me.publish("0", "1")
    me.confirm(me.take())
    wall_clock.set_ahead(0)
    upkeep = Upkeep(me.broker, None)  # type: ignore[arg-type]
    upkeep.tidy()
    assert len(me.ids()) == 2
    # Then it goes after the time of retention, by the worker's own clock, instead of in a year
    began = time.monotonic()

    def trimmed() -> bool:
        upkeep.tidy()
        return len(me.ids()) < 2

    wait_until(trimmed, 10)
    assert time.monotonic() - began > 0.9
    [kept] = me.ids()
    # and so do events of the new time, but not before they are applied
    more = me.publish("2")
    wait_until(lambda: upkeep.tidy() or upkeep._delivered[0].old == kept, 10)
    upkeep.tidy()
    assert me.ids()[-1:] == more


def test_a_producer_is_not_forgotten_because_redis_clock_was_set_forward(
    clocked: Settings, wall_clock: WallClock, worker: StartWorker, monkeypatch: Any
) -> None:
    me = worker(clocked)
    me.publish("0")
    key = me.link.keys.producers(0)
    # Given a clock that jumps ahead by a month, as where a machine gets its time only after it has started
    wall_clock.set_ahead(30 * 86_400)
    upkeep = Upkeep(me.broker, None)  # type: ignore[arg-type]
    upkeep.tidy()
    upkeep.tidy()
    # Then what the producer said last is still known: a call that it repeats is not done again
    assert me.call("HLEN", key) == 1
    # until it was seen unchanged for an hour
    monkeypatch.setattr(UPKEEP, "PRODUCER_WATCHED", 0.0)
    upkeep.tidy()
    assert me.call("HLEN", key) == 0


def test_to_renew_is_no_delivery(each_server: Settings, worker: StartWorker) -> None:
    me = worker(each_server)
    ids = me.publish("0", "1")
    me.take()
    me.forsake(*ids, deliveries=7)
    me.broker.renew()
    assert all(idle < 5_000 and n == 7 for _, idle, n in me.pending().values())


def test_a_worker_that_was_paused_takes_nothing_back(settings: Settings, worker: StartWorker) -> None:
    # Given a worker that was paused for so long that others have claimed its batch
    paused, other = worker(settings), worker(settings, batch_size=1)
    ids = paused.publish("0", "1")
    late = paused.take()
    paused.forsake(*ids)
    first, second = other.take(), other.take()
    # When it goes on, and renews what it takes for its own, or hands it back
    paused.broker.renew()
    paused.broker.hand_back(late.batch, begun=False)
    # Then the events stay with the other
    assert {owner for owner, _, _ in other.pending().values()} == {other.broker.consumer_name}
    assert all(idle < 5_000 and n == 2 for _, idle, n in other.pending().values())
    # and they are counted once, no matter which worker confirms them first
    other.confirm(first)
    paused.confirm(late)
    other.confirm(second)
    assert other.backlog() == 0


def test_a_failed_batch_stays_pending_and_comes_back(
    each_server: Settings, worker: StartWorker, caplog: Any
) -> None:
    me = worker(each_server)
    me.publish("0", "1")
    proxy = me.take()
    # When applying it raises: Dramatiq stuffs the error into the message, and refuses it
    proxy.stuff_exception(ZeroDivisionError())
    assert proxy.failed
    me.consumer.nack(proxy)
    assert "was not applied; it stays pending and will be claimed again" in caplog.text
    # Then the same worker, or any other, gets it again
    assert list(me.pending()) == ids_of(proxy.batch)
    me.forsake(*ids_of(proxy.batch))
    again = me.take()
    assert ids_of(again.batch) == ids_of(proxy.batch)
    me.confirm(again)
    assert me.backlog() == 0


def test_what_is_handed_back_is_claimed_at_once_and_was_never_delivered(
    each_server: Settings, worker: StartWorker
) -> None:
    # Given workers that wait long before they claim
    settings = each_server.model_copy(update={"claim_idle": 60})
    me, other = worker(settings), worker(settings)
    ids = me.publish("0", "1")
    proxy = me.take()
    assert other.gets_nothing(0.1)
    # When one shuts down before it began with a batch
    me.consumer.requeue([proxy])
    assert {n for _, _, n in me.pending().values()} == {0}
    # Then the other gets it with its next look at what was left
    other.consumer._claim_next = 0
    assert ids_of(next(other.consumer).batch) == ids  # type: ignore[union-attr]
    assert {(owner, n) for owner, _, n in me.pending().values()} == {(other.broker.consumer_name, 1)}
    assert me.broker.held.batches() == []


def test_what_waits_for_the_store_at_shutdown_is_handed_back_too(
    settings: Settings, worker: StartWorker
) -> None:
    me, other = worker(settings, claim_idle=60), worker(settings, claim_idle=60)
    ids = me.publish("0")
    proxy = me.take()
    proxy.stuff_exception(Stopping("the store was not to be had"))
    me.consumer.nack(proxy)
    assert ids_of(other.take().batch) == ids
    assert [n for _, _, n in other.pending().values()] == [1]


def test_what_is_begun_and_given_up_counts_as_delivered(settings: Settings, worker: StartWorker) -> None:
    me = worker(settings)
    me.publish("0")
    me.broker.hand_back(me.take().batch, begun=True)
    assert [n for _, _, n in me.pending().values()] == [1]


def test_an_event_that_was_delivered_again_and_again_comes_alone_and_then_as_hopeless(
    each_server: Settings, worker: StartWorker
) -> None:
    dead, me = worker(each_server), worker(each_server)
    ids = dead.publish("0", "1", "2", "3")
    dead.take()

    # Given events of which one was often delivered, one so often that it is given up, and two others were not
    dead.forsake(ids[0], deliveries=1)
    dead.forsake(ids[1], deliveries=ALONE_AFTER)
    dead.forsake(ids[2], deliveries=DEAD_AFTER)
    dead.forsake(ids[3], deliveries=ALONE_AFTER - 1)
    # Then the two come together, and each of the others by itself
    batches = []
    for _ in range(3):
        batches.append(me.take().batch)
        me.confirm(BatchProxy(batches[-1]))
    assert [texts(batch) for batch in batches] == [["0", "3"], ["1"], ["2"]]
    assert [batch.hopeless for batch in batches] == [
        None,
        None,
        "delivered 20 times, and no worker got as far as confirming it",
    ]


# Redis in trouble


def test_a_log_that_is_gone_is_made_anew_and_read_from_its_beginning(
    each_server: Settings, worker: StartWorker, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    me = worker(each_server)
    me.publish("0")
    held = me.take()
    # When all of it disappears, and something is written before a worker looks
    me.call("DEL", me.log, me.link.keys.meter(0), me.link.keys.producers(0))
    me.call(
        "HSET", me.link.keys.meter(0), "open", me.link.keys.shape.name
    )  # as the next one that connects does
    me.publish("1", "2")
    # Then that is delivered
    proxy = me.take()
    assert texts(proxy.batch) == ["1", "2"]
    assert caplog.text.count("log partition 0: made the consumer group 'apply'") == 2
    # and what was held can be renewed, confirmed or handed back to no effect
    me.broker.renew()
    me.consumer.requeue([held])
    me.confirm(held)
    me.confirm(proxy)
    assert me.backlog() == 0


def test_two_workers_that_make_the_group_at_once_are_no_error(
    settings: Settings, worker: StartWorker, caplog: Any
) -> None:
    first, second = worker(settings), worker(settings)
    first.consumer._make_group(0)
    second.consumer._make_group(0)
    assert "log partition" not in caplog.text
    first.publish("0")
    second.take()


def test_a_blocked_read_ends_before_its_socket_times_out(
    settings: Settings, worker: StartWorker, caplog: Any
) -> None:
    # Given sockets that time out sooner than Dramatiq lets a consumer wait
    me = worker(settings, timeout=5000, redis_timeout=1, claim_idle=60)
    for _ in range(2):
        assert next(me.consumer) is None
    assert "can't be read" not in caplog.text


def test_a_redis_that_is_away_is_waited_for(
    own_redis: Callable[..., RedisServer], settings: Settings, worker: StartWorker, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    server = own_redis()
    me = worker(settings, redis_url=server.url)
    me.publish("0")
    me.confirm(me.take())
    server.stop()
    for _ in range(3):
        assert next(me.consumer) is None
    assert caplog.text.count("the log can't be read, trying until it can: ") == 1
    server.start()
    me.publish("1")
    assert texts(me.take().batch) == ["1"]
    assert "the log: Redis is back" in caplog.text


def test_g1_a_batch_whose_delivery_was_lost_on_the_way_comes_again(
    own_redis: Callable[..., RedisServer], settings: Settings, worker: StartWorker
) -> None:
    # Given a Redis that hangs just when a worker asks it for events
    server = own_redis()
    me = worker(settings, redis_url=server.url, redis_timeout=0.3, claim_idle=60)
    me.publish("0")
    me.confirm(me.take())
    [id] = me.publish("1")
    server.pause()
    assert next(me.consumer) is None
    # When it goes on, it delivers to a connection that is closed
    server.resume()
    wait_until(lambda: me.pending())
    # Then the worker claims it, as it would a dead worker's
    me.forsake(id)
    me.consumer._claim_next = 0
    assert texts(me.take().batch) == ["1"]
    assert [n for _, _, n in me.pending().values()] == [2]


# Events that somebody deletes


def test_deleted_events_are_confirmed_and_the_backlog_comes_to_nothing(
    each_server: Settings, worker: StartWorker, caplog: Any
) -> None:
    dead, me = worker(each_server), worker(each_server)
    # Given a batch of a dead worker, of which somebody deletes an event
    ids = dead.publish("0", "1", "2")
    dead.take()
    dead.forsake(*ids)
    dead.call("XDEL", dead.log, ids[1])
    # Then who claims it gets the others, and says what happened
    proxy = me.take()
    assert texts(proxy.batch) == ["0", "2"]
    assert f"event {ids[1].decode()} was deleted from the log before it was applied" in caplog.text
    assert list(me.pending()) == [ids[0], ids[2]]
    me.confirm(proxy)
    assert me.pending() == {}
    # and upkeep sees that nothing is left, however the server counted
    me.tidy()
    assert me.backlog() == 0


@pytest.mark.parametrize("delivered", [True, False])
def test_the_meter_is_set_right_when_nothing_is_left(
    each_server: Settings, worker: StartWorker, caplog: Any, delivered: bool
) -> None:
    me = worker(each_server)
    # Given events of which one is deleted, while a worker applies it or before it was delivered
    ids = me.publish("0", "1", "2")
    if delivered:
        proxy = me.take()
        me.call("XDEL", me.log, ids[1])
        me.broker.renew()
        me.tidy()
        assert me.backlog() == 3
    else:
        me.call("XDEL", me.log, ids[1])
        me.tidy()
        assert me.backlog() == 3
        proxy = me.take()
    me.confirm(proxy)
    assert me.backlog() in ([0, 1] if delivered else [1])  # it depends on the version of Redis
    left = me.backlog()
    # When more is on its way, the meter is left alone
    me.publish("3")
    me.tidy()
    assert me.backlog() == left + 1
    me.confirm(me.take())
    # Then, with nothing on its way, it is set right
    me.tidy()
    assert me.backlog() == 0
    if left:
        assert "log partition 0: the backlog was off by 1; somebody else deleted events" in caplog.text


def test_a_log_that_was_deleted_has_no_backlog(settings: Settings, worker: StartWorker) -> None:
    me = worker(settings)
    me.publish("0", "1")
    me.call("DEL", me.log)
    me.tidy()
    assert me.backlog() == 0


# Trimming

HOUR = 3_600_000


@pytest.fixture
def exact(own_redis: Callable[..., RedisServer], settings: Settings) -> Settings:
    """A Redis that trims entry by entry; others remove some hundred at a time."""
    server = own_redis("--stream-node-max-entries", "1")
    return settings.model_copy(update={"redis_url": server.url, "retention": 0})


def add(worker: Worker, *ids: str) -> list[bytes]:
    """Entries with these IDs."""
    for id in ids:
        worker.call("XADD", worker.log, id, "op", "x")
    return [id.encode() for id in ids]


def deliver(worker: Worker, group: str, confirm: list[str] | None = None) -> None:
    """All there is to a group; pending but for those that are confirmed."""
    worker.call("XREADGROUP", "GROUP", group, "c", "COUNT", 1000, "STREAMS", worker.log, ">")
    for id in confirm or []:
        worker.call("XACK", worker.log, group, id)


def test_nothing_that_is_not_applied_is_trimmed(each_server: Settings, worker: StartWorker) -> None:
    # Given a log so long that the server can let go of parts of it, and nothing is kept for replay
    me = worker(each_server, retention=0, batch_size=400)
    ids = me.publish(*map(str, range(1000)))
    me.tidy()
    assert len(me.ids()) == 1000  # there is no group yet, and nobody has applied anything
    first, second = me.take(), me.take()  # the first guess at a batch's size is 256
    # When a later batch is confirmed before an earlier one
    me.confirm(second)
    me.tidy()
    assert me.ids() == ids
    # Then all that is pending, or not delivered, is kept; what is applied goes
    me.confirm(first)
    me.tidy()
    kept = me.ids()
    done = len(ids_of(first.batch) + ids_of(second.batch))
    assert 1000 - done < len(kept) < 1000
    assert kept == ids[-len(kept) :]


def test_trimming_stops_at_what_is_pending_or_not_delivered(exact: Settings, worker: StartWorker) -> None:
    me = worker(exact)
    me.consumer._make_group(0)
    ids = add(me, "1-1", "1-2", "1-3", "1-4")
    # Given a hole: the first and the third are applied
    deliver(me, APPLY_GROUP, confirm=["1-1", "1-3"])
    add(me, "1-5")
    me.tidy()
    assert me.ids() == [*ids[1:], b"1-5"]
    # When the hole is filled, it goes on to the last that was delivered
    me.call("XACK", me.log, APPLY_GROUP, "1-2", "1-4")
    me.tidy()
    assert me.ids() == [b"1-4", b"1-5"]


def test_trimming_waits_for_every_group(exact: Settings, worker: StartWorker) -> None:
    me = worker(exact)
    me.consumer._make_group(0)
    me.call("XGROUP", "CREATE", me.log, "zz-another", "0")
    me.call("XGROUP", "CREATE", me.log, "a-third", "0")
    ids = add(me, "1-1", "1-2", "1-3", "1-4")
    for group in (APPLY_GROUP, "a-third"):
        deliver(me, group, confirm=["1-1", "1-2", "1-3", "1-4"])
    # Given a group that lags, nothing goes
    me.tidy()
    assert me.ids() == ids
    deliver(me, "zz-another", confirm=["1-1", "1-2"])
    me.tidy()
    assert me.ids() == ids[2:]


def test_mnemobus_retention_is_how_long_applied_events_are_kept(exact: Settings, worker: StartWorker) -> None:
    me = worker(exact, retention=3600)
    me.consumer._make_group(0)
    seconds, _ = me.link.client.time()
    now = 1000 * seconds
    ids = add(me, f"{now - 2 * HOUR}-0", f"{now - HOUR - 1000}-0", f"{now - HOUR + 60_000}-0", f"{now}-0")
    deliver(me, APPLY_GROUP, confirm=[id.decode() for id in ids])
    me.tidy()
    assert me.ids() == ids[2:]
    # and with another setting, others
    worker(exact, retention=86_400).tidy()
    assert me.ids() == ids[2:]
    worker(exact, retention=60).tidy()
    assert me.ids() == ids[3:]


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ("5-9", "5-10"),
        ("999-1", "1000-1"),
        ("99-18446744073709551615", "100-0"),
        ("5-9007199254740992", "5-9007199254740993"),
        ("9007199254740-3", "9007199254740-20"),
        ("5-18446744073709551614", "5-18446744073709551615"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_ids_are_compared_as_the_numbers_that_they_are(
    exact: Settings, worker: StartWorker, lower: str, higher: str, first: bool
) -> None:
    assert Version.parse(lower) < Version.parse(higher)
    me = worker(exact)
    me.consumer._make_group(0)
    me.call("XGROUP", "CREATE", me.log, "zz-another", "0")
    ids = add(me, "1-1", "2-1", lower, higher)
    # Given two groups that have applied what comes first; the lower of the last two pends for one of them
    for group, has_lower in ((APPLY_GROUP, first), ("zz-another", not first)):
        deliver(me, group, confirm=["1-1", "2-1", *([lower] if has_lower else [])])
    # Then that one stays
    me.tidy()
    assert me.ids() == ids[2:]


# Tidying


def test_consumers_that_are_long_gone_are_forgotten_unless_they_hold_something(
    each_server: Settings, worker: StartWorker, monkeypatch: Any
) -> None:
    monkeypatch.setattr(UPKEEP, "CONSUMER_IDLE", 0.3)
    me, holder = (worker(each_server, claim_idle=60) for _ in range(2))
    me.consumer._make_group(0)
    me.call("XGROUP", "CREATECONSUMER", me.log, APPLY_GROUP, "gone")
    me.publish("0")
    holder.take()

    def consumers() -> dict[str, int]:
        return {c["name"].decode(): c["idle"] for c in me.link.client.xinfo_consumers(me.log, APPLY_GROUP)}

    assert consumers().keys() == {"gone", holder.broker.consumer_name}
    # When long enough nothing was heard of them
    wait_until(lambda: min(consumers().values()) > 300)
    next(me.consumer)  # who lives asks for events all the time
    me.call("XGROUP", "CREATECONSUMER", me.log, APPLY_GROUP, "young")
    me.tidy()
    # Then the one that holds nothing is gone
    assert "gone" not in consumers()
    assert consumers().keys() >= {"young", holder.broker.consumer_name}
    assert len(me.pending()) == 1


def test_producers_that_are_long_gone_are_forgotten(
    settings: Settings, worker: StartWorker, monkeypatch: Any, caplog: Any
) -> None:
    me = worker(settings)
    key = me.link.keys.producers(0)
    now = 1000 * me.link.client.time()[0]
    week = 7 * 86_400_000
    # Given records of producers, old and young, and some that are none
    records: dict[str, str] = {
        "old": f'{{"seq":1,"t":{now - week - 60_000},"ids":[]}}',
        "young": f'{{"seq":1,"t":{now - week + 60_000},"ids":[]}}',
        "garbage": "\x00",
        "list": "[1]",
        "no time": "{}",
        "text": '{"t":"x"}',
    }
    records |= {f"old-{n}": records["old"] for n in range(1200)}
    me.link.client.hset(key, mapping=records)
    me.publish("0")
    # Then upkeep forgets the old ones, once it has seen that they don't change, and says which make no sense
    upkeep = Upkeep(me.broker, None)  # type: ignore[arg-type]
    upkeep.tidy()
    assert me.call("HLEN", key) == 1207
    monkeypatch.setattr(UPKEEP, "PRODUCER_WATCHED", 0.0)
    upkeep.tidy()
    left = {name.decode() for name in me.call("HKEYS", key)}
    assert len(left) == 6
    assert left > {"young", "garbage", "list", "no time", "text"}
    for name in ("garbage", "list", "no time", "text"):
        assert f"the record of producer b'{name}' in {key} makes no sense" in caplog.text


def test_a_producer_that_published_meanwhile_is_not_forgotten(
    settings: Settings, worker: StartWorker
) -> None:
    me = worker(settings)
    key = me.link.keys.producers(0)
    me.link.client.hset(key, "p", "new record")
    assert me.link.run("forget", [key], ["p", "old record"]) == 0
    assert me.link.client.hget(key, "p") == b"new record"
    assert me.link.run("forget", [key], ["p", "new record"]) == 1


def test_upkeep_renews_and_tidies_until_it_is_stopped(
    settings: Settings, worker: StartWorker, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(UPKEEP, "TIDY_EVERY", 0.05)
    me, other = worker(settings), worker(settings)
    me.publish("0")
    me.take()
    rounds: list[bool] = []

    class Stumbling(Upkeep):
        def tidy(self) -> None:
            rounds.append(True)
            raise ZeroDivisionError if len(rounds) % 2 else TimeoutError("not now")

        def _open_store(self) -> None: ...

    # Given upkeep whose every attempt at tidying fails
    upkeep = Stumbling(me.broker, None)  # type: ignore[arg-type]
    upkeep.start()
    # Then it goes on, and what is held is renewed all the same
    assert other.gets_nothing(4 * CLAIM_IDLE)
    wait_until(lambda: len(rounds) >= 4)
    upkeep.stop()
    assert upkeep.failures >= 2
    assert "tidying the log failed, trying again later: not now" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    # When it is stopped, as by the end of its process, others claim
    other.take()
