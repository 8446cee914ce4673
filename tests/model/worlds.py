"""All worlds, by name."""

from __future__ import annotations

from .caches import Caches
from .epochs import Epochs
from .join import Join
from .kernel import World
from .live import Live
from .own import Own
from .publish import Publish
from .repartition import Repartition
from .rooms import Rooms
from .store import Store
from .workers import Workers

WORLDS: dict[str, type[World]] = {
    world.name: world
    for world in (Publish, Workers, Store, Rooms, Caches, Join, Epochs, Own, Live, Repartition)
}
