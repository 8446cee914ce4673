"""``mnemobus up``: runs Redis and workers on this machine until somebody stops them."""

from __future__ import annotations

import os
import signal

from ..embedded import Embedded, with_port
from ..settings import Settings, hide_password
from .console import emit, err, out, run_until_signal


def run(*, processes: int | None, threads: int | None, port: int | None, json: bool) -> int:
    settings = Settings.load()
    if port is not None:
        settings = settings.model_copy(update={"redis_url": with_port(settings.redis_url, port)})
    status = run_until_signal(_up(settings, processes, threads, json))
    return 0 if status == 128 + signal.SIGTERM else status  # as a service manager stops it


async def _up(settings: Settings, processes: int | None, threads: int | None, json: bool) -> int:
    def step(text: str) -> None:
        if not json:
            err().print(f"[green]started[/green] {text}")

    system = Embedded(settings, processes=processes, threads=threads, on_step=step)
    try:
        async with system:
            _announce(system, json)
            await system.serve()
    finally:
        if not json:
            err().print("stopped")
    return 0


def _announce(system: Embedded, json: bool) -> None:
    settings = system.settings
    if json:
        emit(
            {
                "ready": True,
                "redis_url": system.redis.url,
                "database_url": hide_password(settings.database_url),
                "data_dir": str(settings.data_dir),
                "pid": os.getpid(),
                "redis_pid": system.redis.pid,
                "worker_pids": system.workers.pids(),
            }
        )
        return
    console = out()
    variables = {
        "REDIS_URL": system.redis.url,
        "MNEMOBUS_DATABASE_URL": hide_password(settings.database_url),
    }
    if system.redis.has_own_password:  # agents find it in the data directory
        variables["MNEMOBUS_DATA_DIR"] = str(settings.data_dir)
    # Settings that agents must share, if they aren't the defaults.
    defaults = Settings.model_fields
    for name, variable in (
        ("redis_key_prefix", "REDIS_KEY_PREFIX"),
        ("log_partitions", "MNEMOBUS_LOG_PARTITIONS"),
        ("feed_partitions", "MNEMOBUS_FEED_PARTITIONS"),
    ):
        if getattr(settings, name) != defaults[name].default:
            variables[variable] = str(getattr(settings, name))
    console.print("\nFor your agents:\n", soft_wrap=True)
    for name, value in variables.items():
        console.print(f"  export {name}={value}", markup=False, soft_wrap=True)
    if not system.redis.has_own_password:
        console.print("  export REDIS_PASSWORD=...  (as it is here)", markup=False)
    console.print(f"\nLogs: {system.redis.log}, {system.workers.log}", markup=False, soft_wrap=True)
    console.print("[bold green]ready[/bold green]; Ctrl-C stops it")
