"""agent-coherence's CCSStore: a LangGraph store in memory whose agents each have a cache, kept coherent by MESI states.

As in https://github.com/Cohexa-ai/agent-coherence#readme (``CCSStore(strategy="lazy")``) and its guide: the first
element of a namespace is the agent, the rest is what the agents share. Everything, including the "coordinator", is
objects of one process: two processes share nothing, and what was written is lost with the process. (Its further
guarantees, of CoherentVolume, are for files on one host.) `search` uses the whole namespace, including the agent, and
returns results in no order.

Its search for crashed agents, which is on by default, is at least half of the cost of a hit, and grows with the number
of memories.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from ccs.adapters import CCSStore
from langgraph.store.base import PutOp

from . import Cannot, Item, Place, Value

Address = tuple[tuple[str, ...], str]


class CcsStore:
    name: ClassVar[str] = "agent-coherence CCSStore"
    package: ClassVar[str] = "agent-coherence"
    sync: ClassVar[Literal[True]] = True
    cannot: ClassVar[Cannot] = {
        "recent": "its search finds only what the same agent wrote, and has no order",
        "embeddings": "it has no vectors; a query is ignored with a warning",
        "processes": "it lives in one process: its agents are objects of that process",
        "hosts": "it lives in one process: its agents are objects of that process",
        "durable": "it is in memory: what was written ends with the process",
        "bounded": "its caches have no bound",
    }

    def __init__(self, place: Place, agent: str = "a", store: Any = None) -> None:
        """``store``: another agent's, in the same process."""
        self._place = place
        self._agent = agent
        self.store = store
        self.loads = 0
        """Not counted: it reports them only to a callback, which would be charged to every read."""

    def open(self) -> None:
        if self.store is None:
            logging.getLogger("ccs").setLevel(logging.ERROR)  # it warns of each crashed agent that it finds
            with warnings.catch_warnings():  # that a default has changed since its version 0.8
                warnings.simplefilter("ignore", RuntimeWarning)
                self.store = CCSStore(strategy="lazy")

    def close(self) -> None:
        self.store = None

    def address(self, room: str, id: str) -> Address:
        return (self._agent, self._place.prefix, room), id

    def get(self, address: Address, /) -> Any:
        return self.store.get(*address)

    def recent(self, room: str, limit: int) -> Sequence[Any]:
        raise NotImplementedError(self.cannot["recent"])

    def put(self, item: Item) -> None:
        self.store.put(*self.address(item.room, item.id), item.value)

    def write_many(self, items: Sequence[Item]) -> None:
        self.store.batch([PutOp(*self.address(item.room, item.id), item.value) for item in items])

    def forget(self, address: Address) -> None:
        namespace, key = address
        id = self.store._artifact_map[namespace[1:], key]
        self.store.core.runtime(namespace[0]).cache.invalidate(id)

    def value(self, answer: Any) -> Value | None:
        return None if answer is None else answer.value
