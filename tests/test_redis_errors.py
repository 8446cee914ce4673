"""What errors of Redis mean, as every server says it: directly, and in a script (before Redis 7 in other words)."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import redis.exceptions

from mnemobus import Settings
from mnemobus.connection.link import Link, ThreadedLink
from mnemobus.connection.server_errors import PASSING, REPLACED, code_of, is_away, meaning
from servers import RedisServer, eventually, free_port, redis_binaries, wait_until


@pytest.fixture(params=list(redis_binaries()))
def server(request: pytest.FixtureRequest, own_redis: Callable[..., RedisServer]) -> RedisServer:
    return own_redis(binary=request.param)


def settings_of(settings: Settings, server: RedisServer) -> Settings:
    return settings.model_copy(update={"redis_url": server.url, "log_partitions": 1})


def config(server: RedisServer, name: str, value: object) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.config_set(name, value)


def demote(server: RedisServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("REPLICAOF", "127.0.0.1", free_port())


def fail_to_save(server: RedisServer) -> None:
    (server.folder / "dump.rdb").mkdir()
    with redis.Redis.from_url(server.url) as client:
        client.config_set("save", "3600 1000000")
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")


CONDITIONS: dict[str, Callable[[RedisServer], None]] = {
    "READONLY": demote,
    "NOREPLICAS": lambda server: config(server, "min-replicas-to-write", 1),
    "OOM": lambda server: config(server, "maxmemory", 1),
    "MISCONF": fail_to_save,
}


@pytest.mark.parametrize("code", CONDITIONS)
async def test_the_same_code_however_it_is_said(server: RedisServer, settings: Settings, code: str) -> None:
    # Given connections of an agent and of a worker, open before the condition comes
    settings = settings_of(settings, server)
    link, threaded = Link(settings), ThreadedLink(settings, 4)
    keys = link.keys
    try:
        await link.command("PING")
        publish = (
            "publish",
            [keys.log(0), keys.producers(0), keys.meter(0), keys.heads(0)],
            ["p", 1, 9, "d", "e", keys.shape.name, 1, 7, "1,1", 2, "a", "b"],
        )
        threaded.client.ping()
        CONDITIONS[code](server)
        # If a command is refused, or one in a script, then the code is known, from either of them
        for ask in (lambda: link.command("SET", "x", "y"), lambda: link.run(*publish)):
            with pytest.raises(redis.exceptions.RedisError) as refused:
                await ask()
            assert code_of(refused.value) == code or "is a replica" in str(refused.value)
        for run in (lambda: threaded.client.set("x", "y"), lambda: threaded.run(*publish)):
            with pytest.raises(redis.exceptions.RedisError) as refused:
                run()
            assert code_of(refused.value) == code or "is a replica" in str(refused.value)
        # And so is what it means
        assert is_away(refused.value) == (code != "OOM")
        assert meaning(refused.value)
    finally:
        server.kill()
        await link.close()
        threaded.close()


async def test_groups_that_are_there_and_that_are_not(server: RedisServer, settings: Settings) -> None:
    link = Link(settings_of(settings, server))
    key = link.keys.log(0)
    with pytest.raises(redis.ResponseError) as missing:
        await link.command("XREADGROUP", "GROUP", "g", "c", "STREAMS", key, ">")
    with pytest.raises(redis.ResponseError) as no_stream:
        await link.command("XGROUP", "SETID", key, "g", "0")
    await link.run("group", [key], ["g"])
    with pytest.raises(redis.ResponseError) as there:
        await link.run("group", [key], ["g"])
    assert [code_of(error.value) for error in (missing, no_stream, there)] == [
        "NOGROUP",
        "NOGROUP",
        "BUSYGROUP",
    ]
    await link.close()


def test_a_right_that_is_missing_in_a_script(server: RedisServer, settings: Settings) -> None:
    link = ThreadedLink(settings_of(settings, server), 2)
    for rules, command in (
        (("&*", "-xadd"), "'XADD', KEYS[1], '*', 'a', 'b'"),
        (("resetchannels",), "'PUBLISH', 'c', 'd'"),
    ):
        link.client.execute_command("ACL", "SETUSER", "u", "reset", "on", ">pw", "~*", "+@all", *rules)
        with (
            redis.Redis(port=server.port, username="u", password="pw") as user,
            pytest.raises(redis.ResponseError) as refused,
        ):
            user.eval(f"return redis.call({command})", 1, "x")
        assert code_of(refused.value) == "NOPERM", refused.value
    link.close()


def test_a_reader_that_waits_while_its_server_becomes_a_replica(
    server: RedisServer, settings: Settings
) -> None:
    link = ThreadedLink(settings_of(settings, server), 2)
    link.run("group", ["s"], ["g"])
    heard: list[Exception] = []

    def read() -> None:
        try:
            link.client.execute_command("XREADGROUP", "GROUP", "g", "c", "BLOCK", 900, "STREAMS", "s", ">")
        except redis.RedisError as error:
            heard.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    with redis.Redis.from_url(server.url) as client:
        wait_until(lambda: client.info("clients")["blocked_clients"] == 1)
        demote(server)
    reader.join()
    # redis-py replaces the connection at once, and what comes of that is raised
    assert len(heard) == 1 and is_away(heard[0])
    assert [code_of(error) for error in (heard[0].__context__, heard[0]) if code_of(error)] == ["UNBLOCKED"]
    link.close()


async def test_a_connection_whose_server_became_a_replica_is_given_up_with_all_others(
    server: RedisServer, settings: Settings
) -> None:
    # Given idle connections of both pools
    link = Link(settings_of(settings, server))
    given_up: list[Exception] = []
    link.on_given_up.append(given_up.append)
    held = [await pool.take() for pool in (link.pool, link.pool, link.probe)]
    for wire, pool in zip(held, (link.pool, link.pool, link.probe), strict=True):
        pool.give_back(wire)
    in_use = await link.pool.take()
    # If their server becomes a replica, and one of them hears of it
    demote(server)
    with pytest.raises(redis.exceptions.ReadOnlyError):
        await link.command("SET", "x", "y", pool=link.probe)
    # Then all are cut, once; one in use, when it is given back; and no new one is made to a replica
    assert [code_of(error) for error in given_up] == ["READONLY"]
    link.pool.give_back(in_use)
    await eventually(lambda: not any(wire.open for wire in held))
    assert link.pool.size == link.probe.size == 0
    with pytest.raises(redis.ConnectionError, match="is a replica"):
        await link.command("PING")
    # And once it is the master again, all is well
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("REPLICAOF", "NO", "ONE")
    assert await link.command("PING") == b"PONG"
    await link.close()


def test_a_worker_s_connection_is_replaced_too(server: RedisServer, settings: Settings) -> None:
    link = ThreadedLink(settings_of(settings, server), 1)
    link.client.set("x", "y")
    demote(server)
    for _ in range(2):
        with pytest.raises(redis.ConnectionError, match="is a replica"):
            link.client.set("x", "y")
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("REPLICAOF", "NO", "ONE")
    assert link.client.set("x", "y")
    link.close()


def test_what_is_no_error_of_redis_has_no_code() -> None:
    assert code_of(ValueError("READONLY You can't write")) == code_of("READONLY") == code_of(None) == ""
    # Nor do words count that merely look like one
    assert code_of(redis.ResponseError("WRONGTYPE of a key named -READONLY ")) == "WRONGTYPE"
    assert code_of(redis.ConnectionError("Connection closed by server.")) == ""
    assert REPLACED < PASSING


@pytest.mark.parametrize("text", ["MOVED 1 127.0.0.1:7000", "MOVED 3999 ?", "ASK nonsense"])
async def test_an_answer_of_a_cluster_is_one_however_it_is_made(text: str, settings: Settings) -> None:
    link = Link(settings)
    wire = await link.pool.take()
    error = wire._refused(text)
    assert code_of(error) == text.partition(" ")[0]
    assert not wire.open  # it is not used again
    link.pool.drop(wire)
    await link.close()
