"""compose/: checks of the files; and, with TEST_COMPOSE=1, of the running stack."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from mnemobus.settings import POLICIES
from servers import NoServer, docker, end, free_port, has_image, redis_binaries, spawn, wait_until
from test_project import ROOT, variables

FILE = ROOT / "compose" / "compose.yaml"
DOCKERFILE = (ROOT / "compose" / "Dockerfile").read_text()
WORKERS = ("worker-1", "worker-2")


PASSWORDS = {"REDIS_PASSWORD": "redis' password", "POSTGRES_PASSWORD": "d@e"}
IMAGES = {
    "REDIS_IMAGE": "redis:8",
    "POSTGRES_IMAGE": "pgvector/pgvector:pg17",
    "PYTHON_IMAGE": "python:3.13-slim",
}
"""What the tests have; compose.yaml names versions that are more exact."""


def filled_in(text: str, **environment: str) -> str:
    """The file as compose reads it: variables in it replaced, except in comments."""
    given = PASSWORDS | environment
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: given.get(match[1]) or match[2], text)
    return re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: given[match[1]], text)


def services(**environment: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(filled_in(FILE.read_text(), **environment))["services"]
    return found


def option(service: dict[str, Any], name: str) -> str:
    """What follows an option in a service's command."""
    command = service["command"]
    return str(command[command.index(name) + 1])


def configuration(redis: dict[str, Any]) -> dict[str, str]:
    """What Redis is told on standard input."""
    script: str = redis["command"][2]
    lines = script.partition("<<EOF\n")[2].partition("EOF\n")[0].splitlines()
    return dict(line.split(" ", 1) for line in lines)  # type: ignore[misc]


# The files


def test_the_services_and_their_images() -> None:
    images = {name: service["image"] for name, service in services().items()}
    assert images == {
        "redis": "redis:8.2.2",
        "postgres": "pgvector/pgvector:0.8.0-pg17",
        **dict.fromkeys((*WORKERS, "demo"), "mnemobus"),
    }
    # Each can be another, and none is a tag that comes to mean something else with the next minor version
    named = re.findall(r"\$\{(\w+_IMAGE):-([^}]*)\}", FILE.read_text())
    assert {name for name, _ in named} == IMAGES.keys()
    assert all(re.search(r":\d+\.\d+\.\d+", image) for _, image in named)


@pytest.mark.parametrize("name", [*WORKERS, "demo"])
def test_only_settings_that_there_are_are_set(name: str) -> None:
    given = services()[name]["environment"]
    assert given.keys() - variables().keys() == {"PGPASSWORD"}


def test_redis_keeps_the_log() -> None:
    redis = services()["redis"]
    told = configuration(redis)
    assert told["maxmemory-policy"] in POLICIES
    assert (told["appendonly"], told["appendfsync"]) == ("yes", "everysec")
    assert "redis:/data" in redis["volumes"]
    assert told["dir"] == "/data"


def test_what_redis_is_given_is_what_agents_expect() -> None:
    environment = {
        "REDIS_PASSWORD": "a b#c",
        "REDIS_MAX_MEMORY": "2gb",
        "REDIS_EVICTION_POLICY": "noeviction",
        "POSTGRES_PASSWORD": "d@e",
    }
    found = services(**environment)
    told = configuration(found["redis"])
    for name, option in (
        ("REDIS_MAX_MEMORY", "maxmemory"),
        ("REDIS_EVICTION_POLICY", "maxmemory-policy"),
    ):
        assert told[option] == environment[name] == found["demo"]["environment"][name]
    assert found["redis"]["environment"]["REDISCLI_AUTH"] == "a b#c"
    assert found["demo"]["environment"]["REDIS_PASSWORD"] == "a b#c"
    assert found["postgres"]["environment"]["POSTGRES_PASSWORD"] == "d@e"
    assert found["demo"]["environment"]["PGPASSWORD"] == "d@e"


def test_passwords_have_no_defaults_and_are_on_no_command_line() -> None:
    text = FILE.read_text()
    assert len(re.findall(r"\$\{(?:REDIS|POSTGRES)_PASSWORD:\?run compose/passwords", text)) == 4
    assert not re.search(r"_PASSWORD:?-", text)
    for service in services().values():
        for words in (service.get("command", ()), service.get("healthcheck", {}).get("test", ())):
            assert not any(password in str(words) for password in PASSWORDS.values())
    # and only processes of this machine can have them
    for service in services().values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_passwords_are_made_once_at_random_and_for_nobody_else(tmp_path: Path) -> None:
    made = set()
    for name in ("a", "b", "a"):
        file = tmp_path / name
        subprocess.run([ROOT / "compose" / "passwords", file], check=True, capture_output=True)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        found = dict(line.split("=") for line in file.read_text().splitlines())
        assert found.keys() == PASSWORDS.keys()
        assert all(re.fullmatch("[0-9a-f]{48}", word) for word in found.values())
        made |= set(found.values())
    assert len(made) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("binary", redis_binaries())
def test_redis_is_started_with_the_password_and_shows_it_nowhere(binary: str, tmp_path: Path) -> None:
    # Given the command of the service, on this machine, with a password that a shell or a configuration would misread
    word = 'it\'s "$HOME" \\ `x` #1 ü'
    script = str(services()["redis"]["command"][2]).replace("$$", "$").replace("dir /data", f"dir {tmp_path}")
    port = free_port()
    script = script.replace("<<EOF\n", f"<<EOF\nport {port}\n").replace("bind * -::*", "bind 127.0.0.1")
    (tmp_path / "redis-server").symlink_to(redis_binaries()[binary])
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    server = spawn(["sh", "-c", script], env=os.environ | {"REDISCLI_AUTH": word, "PATH": path}, stdout=-3)
    try:
        # Then it wants that password
        with redis.Redis(port=port, password=word) as client:
            wait_until(lambda: answers(client))
            # and nobody who has it can set it up in another way
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.config_set("dir", "/tmp")
            config = client.config_get("*")
            assert (config["maxmemory"], config["appendonly"]) == (str(512 << 20), "yes")
        with redis.Redis(port=port) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        # and the list of processes has neither it nor its digest
        listed = subprocess.run(
            ["ps", "-ww", "-o", "args=", "-p", str(server.pid)], capture_output=True, check=True
        )
        assert b"redis-server" in listed.stdout
        assert b"$HOME" not in listed.stdout and b"user default" not in listed.stdout
    finally:
        end(server)


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_is_always_restarted_and_given_time_to_finish(name: str) -> None:
    worker = services()[name]
    assert worker["restart"] == "always"
    assert worker["command"][:2] == ["mnemobus", "worker"]
    grace = int(worker["stop_grace_period"].removesuffix("s"))
    assert int(option(worker, "--worker-shutdown-timeout")) / 1000 < grace


def test_servers_come_first_and_everything_that_stays_has_a_healthcheck() -> None:
    found = services()
    for name in (*WORKERS, "demo"):
        waits = found[name]["depends_on"]
        assert {n: w["condition"] for n, w in waits.items()} == dict.fromkeys(
            ("redis", "postgres"), "service_healthy"
        )
    for name, service in found.items():
        assert ("healthcheck" in service) == (name != "demo")
        assert service["restart"] == ("no" if name == "demo" else "always")
        assert "stop_grace_period" in service


def test_the_image_is_built_from_the_root_with_the_fixed_versions_and_runs_as_nobody_special() -> None:
    for name in (*WORKERS, "demo"):
        build = services()[name]["build"]
        assert (FILE.parent / build["context"]).resolve() == ROOT.resolve()
        assert ROOT / build["dockerfile"] == ROOT / "compose" / "Dockerfile"
        assert build["network"] == "host"
    assert "-c constraints.txt '.[postgres]'" in DOCKERFILE
    stages = DOCKERFILE.split("\nFROM ")
    assert all(stage.startswith("${PYTHON_IMAGE}") for stage in stages[1:])
    assert re.search(r"^ARG PYTHON_IMAGE=(.*)$", DOCKERFILE, re.MULTILINE)[1] == "python:3.13.7-slim"  # type: ignore[index]
    assert services()["demo"]["build"]["args"] == {"PYTHON_IMAGE": "python:3.13.7-slim"}
    # What is needed to build stays in the first stage
    assert "pip" not in stages[-1]
    assert re.search(r"^USER (?!root)\w+$", stages[-1], re.MULTILINE)


def test_what_the_image_needs_is_in_the_build_context_and_little_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {
        word
        for words in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
        for word in words.split()
    }
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)


def test_compose_reads_the_file(compose: Callable[..., str]) -> None:
    assert sorted(compose("config", "--services").split()) == sorted(services())


# For real


def command() -> list[str]:
    """Compose as this machine has it; skips if it has none."""
    for words in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(words[0]):
            done = subprocess.run([*words, "version"], capture_output=True, check=False)
            if done.returncode == 0:
                return words
    pytest.skip("neither docker compose nor docker-compose is here")


@pytest.fixture
def compose() -> Callable[..., str]:
    """Runs compose on the file, as a project that nobody else has; its standard output."""
    words = command()
    project = f"mnemobus-test-{secrets.token_hex(3)}"
    secrets_of = {name: secrets.token_hex(8) for name in PASSWORDS}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*words, "-f", str(FILE), "-p", project, *arguments],
            env=os.environ
            | {"IMAGE": project, "REDIS_PORT": "", "POSTGRES_PORT": ""}
            | IMAGES
            | {name: secrets_of[name] for name in PASSWORDS},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (
            f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout

    run.project = project  # type: ignore[attr-defined]
    return run


@pytest.fixture
def stack(compose: Any) -> Iterator[Callable[..., str]]:
    """The same, where an engine and the images are; what it brings up is taken down, whatever happens."""
    if os.environ.get("TEST_COMPOSE") != "1":
        pytest.skip("takes minutes: set TEST_COMPOSE=1")
    try:
        docker()
    except NoServer as error:
        pytest.skip(str(error))
    for image in IMAGES.values():
        if not has_image(image):
            pytest.skip(f"the Docker engine has no image {image} and could not pull it")
    try:
        yield compose
    finally:
        print(compose("logs", "--no-color", "--tail", "50"))
        compose("down", "--volumes", "--timeout", "5")
        subprocess.run(["docker", "image", "rm", compose.project], capture_output=True, check=False)


KILL_A_WORKER = """
import os, signal
from pathlib import Path
for folder in Path("/proc").iterdir():
    if folder.name.isdigit() and (folder / "stat").read_text().rpartition(")")[2].split()[1] == "1":
        os.kill(int(folder.name), signal.SIGKILL)
        break
"""
"""One of the processes that the container's first, Dramatiq's master, has started."""


@pytest.mark.timeout(900)
def test_the_stack_comes_up_serves_the_demo_and_survives_a_killed_worker(stack: Callable[..., str]) -> None:
    # If everything is started, then the demo agent proves that it works, and ends with 0
    said = stack("up", "--build", "--exit-code-from", "demo")
    assert "Every agent agrees with the store, and nothing was lost." in said
    # Given that it runs on in the background
    stack("up", "-d", "--no-build", "redis", "postgres", *WORKERS)
    containers = [stack("ps", "-q", name).strip() for name in WORKERS]
    wait_until(lambda: all(healthy(c) for c in containers), 60, what="the workers to be healthy")
    # What the demo wrote is still there: in the log, and in the database
    figures = json.loads(stack("exec", "-T", WORKERS[1], "mnemobus", "stats", "--json"))
    assert figures["backlog"] == 0
    assert figures["dead_letters"] == 0
    assert figures["store"]["memories"] > 2000
    assert sum(partition["added"] for partition in figures["log"]) > 2000
    # If a worker process is killed, then its container comes back by itself
    stack("exec", "-T", WORKERS[0], "python", "-c", KILL_A_WORKER)
    wait_until(lambda: restarts(containers[0]) == 1, 60, what="the container to be restarted")
    wait_until(lambda: healthy(containers[0]), 60, what="the restarted worker to be healthy")
    assert restarts(containers[1]) == 0
    # and all is well
    stack("exec", "-T", WORKERS[0], "mnemobus", "doctor")
    stack("exec", "-T", WORKERS[0], "mnemobus", "demo", "--external", "--writes", "100")


def inspect(container: str) -> dict[str, Any]:
    done = subprocess.run(["docker", "inspect", container], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)[0]
    return found


def healthy(container: str) -> bool:
    state = inspect(container)["State"]
    return bool(state["Running"] and state["Health"]["Status"] == "healthy")


def restarts(container: str) -> int:
    return int(inspect(container)["RestartCount"])
