"""What everyone did in a run, as it was recorded: the only thing that the checker goes by.

Each agent process writes one file of JSON lines, one record a line, in the order in which its calls *ended*; the
campaign writes two more, of the faults and of the end. All times are of CLOCK_MONOTONIC, in seconds, which the
processes of one machine share (a suspended process finds that it went on). Versions are ``"<ms>-<seq>"``. A line that
a kill cut short is the last one of its file and is left out.

Every content that is written is ``{"n": "<agent>/<number>"}``, never the same twice, so that a value that is read tells
which write it is from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO


@dataclass(slots=True)
class Write:
    """A call of write, update, delete or delete_room.

    op        put | update | delete | delete_room
    id        of the memory; empty for delete_room
    value     content["n"] of a put or an update; empty otherwise
    outcome   acked: it returned. unknown: LogUnavailable, or the agent was killed before it knew (then ended is None).
              refused: an error that says that nothing was written. missing: MemoryNotFound, or None from delete
    version   None where it was not told (outboxed, unknown, refused)
    number    of the write among the agent's own, from 1; 0 where nobody counts. An agent notes each write twice, before
              the call (as unknown) and after it: of two with the same agent and number the later one counts
    """

    agent: str
    began: float
    ended: float | None
    op: str
    table: str
    room: str
    id: str
    value: str
    outcome: str
    version: str | None = None
    outboxed: bool = False
    error: str = ""
    number: int = 0
    kind: str = "write"


@dataclass(slots=True)
class Published:
    """A write that had been outboxed, or whose version was not known, turned out to have this version.

    agent   who published it: the one that wrote it, or the one that took up its outbox
    number  of the write among that agent's own; 0 where it is another's
    """

    agent: str
    at: float
    id: str
    value: str
    version: str
    op: str = ""
    table: str = ""
    room: str = ""
    number: int = 0
    kind: str = "published"


@dataclass(slots=True)
class Read:
    """A call of get, recent or count that answered.

    scope   the scope that the query depends on
    limit   of a recent; 0 for get and count
    seen    [id, version, value] of each memory in the answer, in its order; for count: [] and ``count``
            (the scope is all that the query says, but for the limit: no second dimension, no before or after)
    source  local | shared | store; empty where it is not known
    stale   also of an answer that can't carry the mark: None, a count
    live    the scope was held live when the read began or ended: what it shows may not be in the store yet
    """

    agent: str
    began: float
    ended: float
    scope: str
    limit: int
    seen: list[list[str]] = field(default_factory=list)
    source: str = ""
    stale: bool = False
    count: int = -1
    error: str = ""
    live: bool = False
    kind: str = "read"


@dataclass(slots=True)
class Applied:
    """The agent has applied an invalidation: from now on no answer of its own may be older than these versions in
    these scopes."""

    agent: str
    at: float
    scopes: list[str]
    versions: list[str]
    kind: str = "applied"


@dataclass(slots=True)
class Observed:
    """The agent has observed a token of another: from now on it sees all that the other had been acknowledged by
    ``of_at``."""

    agent: str
    at: float
    of: str
    of_at: float
    kind: str = "observed"


@dataclass(slots=True)
class Fault:
    """Something that the campaign did.

    what  see the campaign's table of faults
    on    an agent, a worker, "redis", ...
    loses_log  whether it may cost Redis what it had: emptied, or killed under appendfsync everysec. Agents then forget
               which of their writes are on their way, so G6 does not hold across it
    """

    what: str
    on: str
    began: float
    ended: float | None = None
    loses_log: bool = False
    kind: str = "fault"


@dataclass(slots=True)
class Final:
    """The end, once all is quiet.

    log     [version, op, table, room, id, value] of every event that is still in the log, in order of each partition;
            and before them those that were in it when Redis was emptied
    lost    those of them that need not be in the store: Redis was emptied, or killed under appendfsync everysec, before
            they were known to be applied
    store   [id, version, value, table, room] of every memory that the store has
    views   by agent and scope: [id, version, value] of what it sees, newest first
    dead    versions of dead letters
    poison  those of them that were to be: written so that no worker can apply them
    lost_log whether Redis was emptied or lost its last second in this run: then the log does not have everything
    whole   whether it has everything nevertheless, because what was lost was noted: all that is not in `log` was never
            there
    """

    at: float
    log: list[list[str]] = field(default_factory=list)
    store: list[list[str]] = field(default_factory=list)
    views: dict[str, dict[str, list[list[str]]]] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)
    lost_log: bool = False
    lost: list[list[str]] = field(default_factory=list)
    poison: list[str] = field(default_factory=list)
    whole: bool = False
    kind: str = "final"


Record = Write | Published | Read | Applied | Observed | Fault | Final
_KINDS: dict[str, type[Any]] = {
    "write": Write,
    "published": Published,
    "read": Read,
    "applied": Applied,
    "observed": Observed,
    "fault": Fault,
    "final": Final,
}


class Recorder:
    """Appends records to a file; each is handed to the kernel at once: a SIGKILL loses none that was recorded."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def record(self, record: Record) -> None:
        self._file.write(json.dumps(asdict(record), separators=(",", ":")) + "\n")
        self._file.flush()


@dataclass(slots=True)
class Bounds:
    """What the promises allow in a run, in seconds.

    fan_out  how long a committed write may wait for its fan-out: claim_idle and the time to apply, where workers are
             killed between the two. None: for as long as it takes, as where workers are cut off from Redis
    """

    max_staleness: float
    heartbeat: float
    own_write_timeout: float
    fan_out: float | None = None


@dataclass(slots=True)
class History:
    """All records of a run, by kind; those of one agent in the order in which it made them."""

    bounds: Bounds
    records: list[Record] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> History:
        """The files ``*.jsonl`` of a folder, and its ``bounds.json``."""
        history = cls(Bounds(**json.loads((folder / "bounds.json").read_text())))
        for path in sorted(folder.glob("*.jsonl")):
            history.records += read(path)
        history.records = _settled(history.records)
        return history

    def save(self, folder: Path) -> None:
        (folder / "bounds.json").write_text(json.dumps(asdict(self.bounds)))
        with (folder / "all.jsonl").open("w") as file:
            for record in self.records:
                Recorder(file).record(record)

    def of(self, kind: type[Any]) -> list[Any]:
        return [record for record in self.records if isinstance(record, kind)]


def _settled(records: list[Record]) -> list[Record]:
    """Without the intentions of writes whose outcome is recorded, too."""
    last = {
        (r.agent, r.number): index for index, r in enumerate(records) if isinstance(r, Write) and r.number
    }
    return [
        r
        for index, r in enumerate(records)
        if not isinstance(r, Write) or not r.number or last[r.agent, r.number] == index
    ]


def read(path: Path) -> Iterator[Record]:
    """The records of one file; ValueError, with the line's number, for one that is none and is not the last."""
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            record = _KINDS[fields["kind"]](**fields)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                return
            raise ValueError(f"{path.name}, line {number}: {error}") from None
        yield record
