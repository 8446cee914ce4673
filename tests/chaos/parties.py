"""The parties of a run: each is a process (or a pool) behind its own proxy, and is restarted when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mnemobus import Settings
from servers import _command, _die_with_parent, children

from .agent import Plan
from .clocks import in_the_future
from .proxy import Proxy

TESTS = Path(__file__).parents[1]
AHEAD = 5
"""Seconds by which a wrong clock is ahead."""
_RESTART_AFTER = 0.2


class Party:
    """A process that is started again each time that it ends, until it is closed."""

    def __init__(self, name: str, settings: Settings, proxy: Proxy, folder: Path) -> None:
        self.name = name
        self.proxy = proxy
        self.folder = folder
        self.ahead = False
        """Whether the next process's clocks will be ahead."""
        self.ready = asyncio.Event()
        """Set while the process does its work."""
        self.starts = 0
        self.crashes: list[str] = []
        """Its exit statuses, from each time that it died without being killed."""
        self._environment = settings.model_copy(update={"redis_url": proxy.url}).environment()
        self._process: asyncio.subprocess.Process | None = None
        self._killed = False
        self._closing = False
        self._in_future = False
        self._was_ready = False
        self._task: asyncio.Task[None] | None = None
        self.log = folder / f"{name}.log"

    # What a subclass says

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _more_environment(self) -> dict[str, str]:
        return {}

    async def _attend(self, process: asyncio.subprocess.Process) -> None:
        """Listen to the process until it ends, and set `ready`."""
        raise NotImplementedError

    # Its life

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._supervise())

    async def _supervise(self) -> None:
        while not self._closing:
            self.starts += 1
            self._killed = False
            command = self._command()
            environment = os.environ | self._environment | self._more_environment()
            paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
            before = in_the_future(AHEAD) if self.ahead else []
            self._in_future = bool(before)
            command = before + command
            with self.log.open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    cwd=self.folder,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                    limit=1 << 24,
                )
            self._process = process
            self._was_ready = False
            try:
                await self._attend(process)
                self.ready.clear()
                await process.wait()
            finally:
                self.signal(signal.SIGKILL)  # what it has left behind
                await process.wait()
            self._ended(process.returncode)
            if not self._closing:
                await asyncio.sleep(_RESTART_AFTER)

    def _ended(self, status: int | None) -> None:
        if self._was_ready and status and not self._killed:
            self.crashes.append(f"{self.name}, process {self.starts}, ended with {status}; see {self.log}")

    def signal(self, number: int) -> None:
        """Send a signal to the process and to all that it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL; it is started again soon after."""
        self._killed = True
        self.ready.clear()
        self.signal(signal.SIGKILL)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def abandon(self) -> None:
        """SIGKILL, without a restart; `close` still has to be awaited."""
        self._closing = self._killed = True
        self.signal(signal.SIGKILL)

    async def close(self, patience: float = 10.0) -> None:
        """End it, by force if it does not end on request, and don't start it again."""
        self._closing = True
        if self._task is None:
            return
        self.resume()
        self._ask_to_end()
        done, _ = await asyncio.wait([self._task], timeout=patience)
        if not done:
            self.signal(signal.SIGKILL)
            await asyncio.wait([self._task], timeout=5)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _ask_to_end(self) -> None:
        raise NotImplementedError


class AgentParty(Party):
    """An agent (agent.py). Its processes are `name.1`, `name.2`, ..., and share a data directory."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        proxy: Proxy,
        folder: Path,
        plan: Plan,
        on_token: Callable[[AgentParty, str, float], None],
    ) -> None:
        settings = settings.model_copy(update={"data_dir": folder / f"{name}-data"})
        super().__init__(name, settings, proxy, folder)
        self._plan = plan
        self._on_token = on_token
        self._answers: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._asking = asyncio.Lock()

    @property
    def current(self) -> str:
        """The name of the process that runs now."""
        return f"{self.name}.{self.starts}"

    @property
    def outbox(self) -> Path:
        return self.folder / f"{self.name}-data" / "outbox"

    def _command(self) -> list[str]:
        ahead = AHEAD if self.ahead else 0
        offset = AHEAD if self.ahead and in_the_future(AHEAD) else 0
        plan = dataclasses.replace(self._plan, name=self.current, ahead=ahead, offset=offset)
        return [sys.executable, "-m", "chaos.agent", json.dumps(dataclasses.asdict(plan))]

    async def _attend(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            said = json.loads(line)
            if said["says"] == "ready":
                self._was_ready = True
                self.ready.set()
            elif said["says"] == "token":
                self._on_token(self, said["token"], said["at"])
            else:
                self._answers.put_nowait(said)
        self._answers.put_nowait(None)

    def tell(self, what: str, **more: Any) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.write(json.dumps({"told": what, **more}).encode() + b"\n")

    async def ask(self, what: str, timeout: float = 30.0) -> dict[str, Any]:
        """Send it a request and return the answer; TimeoutError, or ConnectionError if it ended."""
        async with self._asking, asyncio.timeout(timeout):
            await self.ready.wait()
            while not self._answers.empty():
                self._answers.get_nowait()
            self.tell(what)
            answer = await self._answers.get()
        if answer is None:
            raise ConnectionError(f"{self.name} ended")
        return answer

    async def restart(self) -> None:
        """Have it close its bus and end, and start again."""
        self.ready.clear()
        self.tell("stop")

    def _ask_to_end(self) -> None:
        self.tell("stop")


class WorkerParty(Party):
    """A pool of workers (dying_workers.py), under Dramatiq's own command line."""

    def __init__(
        self, name: str, settings: Settings, proxy: Proxy, folder: Path, processes: int, threads: int
    ) -> None:
        super().__init__(name, settings, proxy, folder)
        self._processes, self._threads = processes, threads
        self.deaths = folder / f"{name}-deaths"
        self.deaths.mkdir()

    def _command(self) -> list[str]:
        return [
            # The second module is for when Dramatiq's master is killed and can't end its processes.
            sys.executable, "-m", "dramatiq", "chaos.dying_workers", "mnemobus.embedded.tethered",
            "--processes", str(self._processes), "--threads", str(self._threads),
        ]  # fmt: skip

    def _more_environment(self) -> dict[str, str]:
        return {
            "CHAOS_DEATHS": str(self.deaths),
            "CHAOS_AHEAD": str(AHEAD if self.ahead else 0),
            "MNEMOBUS_WORKER_PID_FILE": str(self.folder / f"{self.name}.pid"),
        }

    async def _attend(self, process: asyncio.subprocess.Process) -> None:
        begins = self.log.stat().st_size
        while process.returncode is None and not self.ready.is_set():
            with self.log.open("rb") as log:
                log.seek(begins)
                if log.read().count(b"Worker process is ready for action") == self._processes:
                    self.ready.set()
            await asyncio.sleep(0.05)
        await process.wait()

    def _ended(self, status: int | None) -> None:
        """Dramatiq's master ends whenever one of its processes is killed; that is no crash."""

    def kill_one(self) -> bool:
        """SIGKILL for one of the processes that apply batches; return whether there was one."""
        for pid in self._applying():
            os.kill(pid, signal.SIGKILL)
            return True
        return False

    def pause_one(self) -> int | None:
        """SIGSTOP for one of them; its process id, or None if there is none."""
        for pid in self._applying():
            os.kill(pid, signal.SIGSTOP)
            return pid
        return None

    def _applying(self) -> list[int]:
        if self._process is None or not self.ready.is_set():
            return []
        found = [pid for master in self._masters() for pid in children(master)]
        return [pid for pid in found if b"resource_tracker" not in _command(pid)]

    def _masters(self) -> list[int]:
        """Dramatiq's master. In a time namespace it is the child of the process that made it, which ignores SIGTERM."""
        assert self._process is not None
        return children(self._process.pid) if self._in_future else [self._process.pid]

    def _ask_to_end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            for pid in self._masters():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    def die_at(self, point: str) -> Path:
        """Have the next process that reaches the point kill itself; return the file that it removes then."""
        order = self.deaths / point
        order.touch()
        return order

    async def restart(self) -> None:
        self.ready.clear()
        self._ask_to_end()
