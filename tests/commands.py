"""The command line as people run it: `mnemobus` in its own process, with or without a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

from mnemobus import Settings
from servers import alive, children, end, spawn, wait_until

OURS = ("REDIS_", "MNEMOBUS_", "DATABASE_URL", "TEST_")
COLUMNS = 160


class Command:
    """A command that runs, or has run. Its output goes to files, so that it never waits for a reader.

    pid     of the process
    out     what it has said on standard output, or on the terminal, so far
    err     on standard error
    status  its exit status; waits until it has ended
    """

    def __init__(
        self,
        *arguments: str,
        folder: Path,
        settings: Settings | None = None,
        stdin: bytes | int | None = None,
        terminal: bool = False,
        program: tuple[str, ...] = ("-m", "mnemobus"),
        **environment: str,
    ) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        kept |= {"COLUMNS": str(COLUMNS), "TERM": "xterm"}
        given = {} if settings is None else settings.environment()
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        options: dict[str, Any] = {"env": kept | given | environment, "cwd": folder}
        command = [sys.executable, *program, *arguments]
        self._terminal: int | None = None
        if terminal:
            self._run_on_a_terminal(command, options)
            return
        with self._out.open("wb") as out, self._err.open("wb") as err:
            wanted = subprocess.PIPE if isinstance(stdin, bytes) else stdin or subprocess.DEVNULL
            self.process = spawn(command, stdin=wanted, stdout=out, stderr=err, **options)
        if isinstance(stdin, bytes) and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(stdin)
            self.process.stdin.close()

    def _run_on_a_terminal(self, command: list[str], options: dict[str, Any]) -> None:
        self._err.touch()
        self._terminal, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
        self.process = spawn(command, stdin=inside, stdout=inside, stderr=inside, **options)
        os.close(inside)
        self._reader = threading.Thread(target=self._read_terminal, args=(self._terminal,))
        self._reader.start()

    def _read_terminal(self, terminal: int) -> None:
        with (
            self._out.open("wb", buffering=0) as out,
            contextlib.suppress(OSError),
        ):  # EIO: nobody writes any more
            while said := os.read(terminal, 65_536):
                out.write(said)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace") if self._out.exists() else ""

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    @property
    def status(self) -> int:
        return self.process.wait(60)

    @property
    def json(self) -> Any:
        """The one line of JSON that it printed, once it has ended."""
        _ = self.status
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """The lines of JSON that it has printed so far."""
        return [json.loads(line) for line in self.out.splitlines(keepends=True) if line.endswith("\n")]

    def says(self, text: str, timeout: float = 30.0) -> str:
        """Wait for a text in its output; return all of the output."""
        wait_until(
            lambda: text in self.out + self.err or self.process.poll() is not None,
            timeout,
            what=f"{text!r} in {self.out + self.err!r}",
        )
        said = self.out + self.err
        assert text in said, said
        return said

    def type(self, text: str) -> None:
        """Type something on its terminal."""
        assert self._terminal is not None
        os.write(self._terminal, text.encode())

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        end(self.process, 0)
        if self._terminal is not None:
            self._reader.join()
            os.close(self._terminal)
            self._terminal = None


def descendants(pid: int) -> list[int]:
    """All processes that a process has started, directly or indirectly."""
    found = children(pid)
    return found + [each for child in found for each in descendants(child)]


def wait_until_gone(pids: list[int], timeout: float = 10.0) -> None:
    """Wait until all of these processes have ended. Those left at the deadline are ended, and fail the test."""
    try:
        wait_until(
            lambda: not any(map(alive, pids)),
            timeout,
            what=f"the end of {[pid for pid in pids if alive(pid)]}",
        )
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
