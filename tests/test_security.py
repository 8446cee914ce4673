"""docs/security.md does what it says: users with what they need and no more, and TLS to both servers."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

import mnemobus
from commands import Command
from mnemobus import Memory, Settings, StoreUnavailable
from mnemobus.keys import Keyspace
from servers import PostgresServer, RedisServer, eventually, free_port, redis_binaries, worker_threads

PAGE = (Path(__file__).parents[1] / "docs" / "security.md").read_text()
ROLES = ("agent", "worker", "operator")


def set_up(client: redis.Redis, prefix: str) -> dict[str, str]:
    """Make the users as the page has them; their passwords. What a server does not know is left out."""
    passwords = {}
    for role, rules in re.findall(r"^ACL SETUSER (\w+) on >\.\.\. (.*)$", PAGE, re.MULTILINE):
        passwords[role] = secrets.token_hex(8)
        words = rules.replace("{mnemobus", "{" + prefix).split()
        if not has_waitaof(client):
            words = [word for word in words if word != "+waitaof"]
        client.execute_command("ACL", "SETUSER", role, "reset", "on", f">{passwords[role]}", *words)
    assert passwords.keys() == set(ROLES)
    client.execute_command("ACL", "LOG", "RESET")
    return passwords


def refused(client: redis.Redis) -> list[tuple[str, str, str]]:
    """What ACL LOG has: who, why, what."""
    log = client.execute_command("ACL", "LOG")
    fields = [
        entry if isinstance(entry, dict) else dict(zip(entry[::2], entry[1::2], strict=True)) for entry in log
    ]
    found = [{_text(k): _text(v) for k, v in entry.items()} for entry in fields]
    return [(entry["username"], entry["reason"], entry["object"]) for entry in found]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("binary", redis_binaries())
async def test_agents_workers_and_operators_need_no_more_than_their_users_may(
    binary: str, own_redis: Callable[..., RedisServer], settings: Settings, command: Callable[..., Command]
) -> None:
    # Given a server with the three users
    server = own_redis(binary=binary)
    with redis.Redis.from_url(server.url) as admin:
        passwords = set_up(admin, settings.redis_key_prefix)

        def as_(role: str, **changes: Any) -> Settings:
            url = f"redis://{role}@127.0.0.1:{server.port}/0"
            given = {"redis_url": url, "redis_password": passwords[role], "shadow_reads": 1.0, **changes}
            return settings.model_copy(update=given)

        async def run(*words: str, role: str = "operator", status: int = 0, **options: Any) -> str:
            done = command(*words, settings=as_(role), **options)
            assert await asyncio.to_thread(lambda: done.status) == status, done.out + done.err
            return done.out

        # When everything is done that each is for
        with worker_threads(as_("worker", retention=0.0)):
            agent = as_("agent").model_dump()
            async with mnemobus.connect(**agent) as alice, mnemobus.connect(**agent) as bob:
                said = Memory(table="messages", room="r1", content={"text": "one"}, embedding=[1.0, 2.0])
                await (await alice.write(said)).committed()
                assert len(await bob.recent("messages", room="r1")) == 1
                await alice.update(said.id, content={"text": "two"})
                await bob.observe(alice.token())
                found = await bob.get(said.id)
                assert found is not None and found.content["text"] == "two"
                others = [Memory(table="messages", room=f"r{n}", content={}) for n in range(20)]
                receipts = await alice.write_many(others)
                await asyncio.gather(*(receipt.committed() for receipt in receipts))
                assert await bob.count("messages", room="r1") == 2
                await alice.delete(others[0].id)
                await (await alice.delete_room("messages", room="r2")).committed()
                if has_waitaof(admin):
                    await alice.write(Memory(table="messages", room="r3", content={}), durability="synced")
                # a write that no worker can apply
                longer = Memory(table="messages", room="r1", content={}, embedding=[1.0, 2.0, 3.0])
                bob._writes._known.store_has("messages", 3)
                with pytest.raises(mnemobus.WriteRejected):
                    await (await bob.write(longer)).committed()

                async def shadowed() -> bool:
                    await bob.recent("messages", room="r5")
                    return bob.stats().shadow_reads > 0

                await eventually(shadowed)
                line = b'{"table": "facts", "room": "r1", "content": {}}\n'
                await run("import", "-", role="agent", stdin=line)
                assert "dead letter" in await run("doctor")
                await run("stats", "--json")
                await run("dead", "show", str(json.loads(await run("dead", "list", "--json"))["version"]))
                await run("dead", "requeue", "--all")
                await eventually(lambda: admin.xlen(dead(settings, longer)) == 1)
                await run("replay")
                await run("dead", "drop", "--all", "--yes")
                await run("repartition", "2")
                await alice.write(Memory(table="messages", room="r4", content={}), durability="committed")
                tail = command("tail", "--json", settings=as_("operator"))
                watching = command("verify", "--json", "--seconds", "3", settings=as_("operator"))
                while watching.process.poll() is None:
                    await alice.update(said.id, content={"text": secrets.token_hex(4)})
                    await bob.recent("messages", room="r1")
                    await asyncio.sleep(0.2)
                assert watching.status == 0, watching.out + watching.err
                assert tail.lines
                assert (await alice.health()).ok, await alice.health()
        # Then nobody was refused anything
        assert refused(admin) == []


def has_waitaof(client: redis.Redis) -> bool:
    major, minor, *_ = str(client.info("server")["redis_version"]).split(".")
    return (int(major), int(minor)) >= (7, 2)


def dead(settings: Settings, memory: Memory) -> str:
    keys = Keyspace(settings.redis_key_prefix, settings.log_partitions, settings.feed_partitions)
    return keys.dead(keys.log_partition(memory.room))


@pytest.mark.parametrize("binary", redis_binaries())
def test_a_user_can_do_nothing_that_its_role_has_no_use_for(
    binary: str, own_redis: Callable[..., RedisServer], settings: Settings
) -> None:
    server = own_redis(binary=binary)
    with redis.Redis.from_url(server.url) as admin:
        passwords = set_up(admin, "mnemobus")
    nobody = [
        "FLUSHALL",
        "KEYS *",
        "CONFIG SET dir /tmp",
        "SHUTDOWN",
        "ACL LIST",
        "CLIENT KILL ID 1",
        "MONITOR",
    ]
    nobody += ["HGET other field", "XADD other * a b", "PUBLISH other x", "REPLICAOF NO ONE", "SCRIPT FLUSH"]
    log = "{mnemobus:l0}:log"
    only = {
        "agent": [
            f"XTRIM {log} MAXLEN 0",
            f"XDEL {log} 1-1",
            f"XACK {log} apply 1-1",
            f"XGROUP DESTROY {log} apply",
        ],
        "worker": ["SUBSCRIBE {mnemobus:f0}:feed", "CLIENT LIST"],
        "operator": [f"XTRIM {log} MAXLEN 0", f"XACK {log} apply 1-1"],
    }
    for role in ROLES:
        with redis.Redis(port=server.port, username=role, password=passwords[role]) as client:
            assert client.ping()
            for line in nobody + only[role]:
                with pytest.raises(redis.exceptions.NoPermissionError):
                    print(role, line, client.execute_command(*line.split()))


# What is never shown


@pytest.mark.parametrize(
    "words",
    ["doctor", "stats", "verify --seconds 1", "dead list", "replay", "import -", "tail --count 1"],
)
@pytest.mark.parametrize("way", ["an option", "a login", "a login that is not well formed"])
def test_no_command_shows_a_password_when_servers_are_away(
    words: str, way: str, command: Callable[..., Command]
) -> None:
    # Given servers that are away, whose passwords are in the URLs
    login, option = {
        "an option": ("me", "?password=hunter2"),
        "a login": ("me:hunter2", ""),
        "a login that is not well formed": ("me:hun/ter2", ""),
    }[way]
    addresses = {
        "REDIS_URL": f"redis://{login}@127.0.0.1:1/0{option}",
        "MNEMOBUS_DATABASE_URL": f"postgresql://{login}@127.0.0.1:1/db{option}",
        "MNEMOBUS_DATABASE_TIMEOUT": "1",
        "MNEMOBUS_LOG": "debug",
    }
    # Then whatever a command has to say about it, it says without them
    run = command(*words.split(), stdin=b'{"table": "t", "room": "r", "content": {}}\n', **addresses)
    if words.startswith("tail") and way != "a login that is not well formed":
        run.says("does not answer")  # and it waits for Redis
        run.signal(2)
    assert run.status != 0
    assert "ter2" not in run.out + run.err, run.out + run.err
    assert run.err or run.out


# TLS


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority of our own, ca.crt, and the certificate of a server at localhost, server.crt."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ["req", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    for name in ("ca", "another"):
        openssl(*new, "-x509", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt")
    (folder / "names").write_text("subjectAltName=DNS:localhost")
    openssl(
        "req",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=localhost",
        "-keyout",
        "server.key",
        "-out",
        "request",
    )
    signed = [
        "x509",
        "-req",
        "-in",
        "request",
        "-CA",
        "ca.crt",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-days",
        "1",
    ]
    openssl(*signed, "-extfile", "names", "-out", "server.crt")
    return folder


async def test_redis_is_reached_by_tls_and_only_if_its_certificate_is_good(
    certificates: Path, own_redis: Callable[..., RedisServer], settings: Settings
) -> None:
    # Given a Redis as the page sets it up
    binary = redis_binaries().get("redis-system")
    if binary is None or not has_tls(binary):
        pytest.skip("no redis-server that was built with TLS")
    port = free_port()
    [page] = re.findall(r"^```text\n(port 0\n.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names = {"redis.crt": "server.crt", "redis.key": "server.key", "ca.crt": "ca.crt"}
    lines = [line.split() for line in page.splitlines() if not line.startswith(("port", "tls-port"))]
    options = [
        word
        for name, value in lines
        for word in (f"--{name}", str(certificates / names[Path(value).name]) if "/" in value else value)
    ]
    own_redis("--tls-port", str(port), *options)
    query = f"ssl_ca_certs={certificates}/ca.crt"
    url = f"rediss://localhost:{port}/0"
    secure = settings.model_copy(update={"redis_url": f"{url}?{query}"})
    # Then a bus and its workers work
    with worker_threads(secure):
        async with mnemobus.connect(**secure.model_dump()) as bus:
            await (await bus.write(Memory(table="messages", room="r1", content={}))).committed()
            assert len(await bus.recent("messages", room="r1")) == 1
            assert (await bus.health()).ok
    # And with another authority, none, or another name of the host it is not spoken to
    wrong = (f"{url}?ssl_ca_certs={certificates}/another.crt", url, f"rediss://127.0.0.1:{port}/0?{query}")
    for address in wrong:
        bus = mnemobus.connect(**settings.model_copy(update={"redis_url": address}).model_dump())
        async with bus:
            problems = " ".join((await bus.health()).problems)
        assert "certificate" in problems.lower(), problems


def has_tls(binary: str) -> bool:
    """Whether the server was built with TLS."""
    options = ["--tls-port", "1", "--port", "0", "--tls-cert-file", "/gone"]
    said = subprocess.run([binary, *options], capture_output=True, check=False, timeout=10).stdout
    return b"Bad directive" not in said and b"TLS" in said


async def test_postgresql_is_reached_by_tls_and_only_if_its_certificate_is_good(
    certificates: Path, own_postgres: PostgresServer, settings: Settings
) -> None:
    # Given a PostgreSQL with TLS
    own_postgres.use_certificate(certificates / "server.crt", certificates / "server.key")
    url = (
        f"postgresql://postgres@localhost:{own_postgres.port}/postgres?hostaddr=127.0.0.1&sslmode=verify-full"
    )
    secure = settings.model_copy(update={"database_url": f"{url}&sslrootcert={certificates}/ca.crt"})
    # Then a bus and its workers work
    with worker_threads(secure):
        async with mnemobus.connect(**secure.model_dump()) as bus:
            await (await bus.write(Memory(table="messages", room="r1", content={}))).committed()
            assert (await bus.health()).ok
    # And with another authority, or another name of the host, it is not spoken to
    for wrong in (
        f"{url}&sslrootcert={certificates}/another.crt",
        f"{url}&sslrootcert={certificates}/ca.crt".replace("localhost", "127.0.0.1"),
    ):
        reader = mnemobus.store.open_reader(settings.model_copy(update={"database_url": wrong}))
        with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
            await reader.open()
        await reader.close()
