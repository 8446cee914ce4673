"""How broker, actor and upkeep come together."""

from __future__ import annotations

import dramatiq

from mnemobus.settings import Settings
from mnemobus.store import open_writer

from .apply import Applier
from .broker import ACTOR, QUEUE, Batch, StreamBroker
from .standing import Standing
from .upkeep import Lifecycle


def make_broker(settings: Settings) -> StreamBroker:
    """A broker with the actor that applies batches. Connects to nothing."""
    broker = StreamBroker(settings)
    writer = open_writer(settings)
    standing = broker.standing = Standing(settings, broker.link, writer, broker.consumer_name)
    applier = Applier(settings, broker.link, writer, broker.stopping, broker.state, standing)
    broker.add_middleware(Lifecycle(broker, applier))

    def apply(batch: Batch) -> None:
        applier.apply(batch)

    dramatiq.actor(actor_name=ACTOR, queue_name=QUEUE, broker=broker)(apply)
    return broker
