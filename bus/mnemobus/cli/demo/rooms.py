"""What demo and agents have to agree on: the rooms of a run, the ids in them, and how to compare answers."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from .samples import Conversation, conversations

_RUNS = uuid.UUID("0c5c3d6e-3b1f-5d0a-8d2b-6f0a4e7d9b11")


@dataclass(frozen=True, slots=True)
class Role:
    """What an agent has to know to play its part; ``run`` separates the rooms of this run from those of others."""

    number: int
    agents: int
    writes: int
    run: str


@dataclass(frozen=True, slots=True)
class DemoRoom:
    """A conversation as it is held in one run."""

    number: int
    name: str
    entity: str
    conversation: Conversation

    def message(self, turn: int) -> str:
        """The id of a turn's message, so that the other agents know what they wait for."""
        return str(uuid.uuid5(_RUNS, f"{self.name}/turn/{turn}"))

    def fact(self, key: str) -> str:
        return str(uuid.uuid5(_RUNS, f"{self.name}/fact/{key}"))

    def draft(self, turn: int) -> str:
        return str(uuid.uuid5(_RUNS, f"{self.name}/draft/{turn}"))

    @property
    def has_drafts(self) -> bool:
        """Whether the room has a draft, which `delete_room` deletes at the end; every fifth room has one."""
        return self.number % 5 == 0

    @property
    def writes(self) -> int:
        return self.conversation.writes + 2 * self.has_drafts

    def ids(self) -> list[str]:
        """The memories that are fetched one by one at the end: those that changed, and the last message."""
        facts = {self.fact(turn.learn[0]) for turn in self.conversation.turns if turn.learn}
        return [*sorted(facts), self.message(len(self.conversation.turns) - 1)]


def rooms_of(part: Role) -> list[DemoRoom]:
    return [
        DemoRoom(number, f"{part.run}-{c.room}", f"{c.entity} ({part.run})", c)
        for number, c in enumerate(conversations(part.writes))
    ]


def digest(memories: Sequence[Any]) -> str:
    """The content of a listing, in a form in which the store's rows and an agent's memories can be compared."""
    seen = [[m.id, str(m.version), _plain(m.content), _plain(m.metadata)] for m in memories]
    return hashlib.sha256(orjson.dumps(seen, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _plain(value: Any) -> Any:
    return orjson.loads(value) if isinstance(value, bytes) else dict(value)
