"""Fixtures of the scenarios: both versions of the protocol, and a way to Redis on which things go wrong.

A scenario is one story of what others get wrong, told through the public face, with agents and workers in processes of
their own or behind a proxy. Which of them there are, by file:

    test_seven_readers     one writer and seven readers of one memory, for half a minute
    test_two_writers       two processes that write the same memories at about the same time
    test_late_fills        answers of a slow store that an invalidation overtakes; eviction while L2 is filled
    test_messages          a message of the feed lost, late or twice; an agent that comes when the feed is long
    test_connections       what happens between SUBSCRIBE and its confirmation, at a reconnect, at CLIENT KILL
    test_failover          a master that becomes a replica while connections to it stay open
    test_half_open_link    a link on which nothing arrives any more, and nobody is told
    test_late_writes       what was deleted, and older writes that come afterwards
    test_one_producer      a publish whose answer is lost; two processes that take themselves for the same
    test_clocks            clocks of agents and workers that disagree by minutes
    test_poison            one bad event among hundreds
    test_store_away        a store that is down for a minute

Those that last longest have both versions of the protocol at work in one test, and `protocol` overridden.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit

import pytest

from chaos.proxy import Proxy
from mnemobus import Settings

Way = Callable[[Settings], Awaitable[tuple[Proxy, Settings]]]


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def protocol(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def settings(settings: Settings, protocol: int) -> Settings:
    return settings.model_copy(update={"redis_protocol": protocol})


@pytest.fixture
async def way() -> AsyncIterator[Way]:
    """Makes a party's own way to Redis: the proxy, and settings that lead through it."""
    proxies: list[Proxy] = []

    async def make(settings: Settings) -> tuple[Proxy, Settings]:
        url = urlsplit(settings.redis_url)
        proxy = Proxy(url.hostname or "127.0.0.1", url.port or 6379)
        proxies.append(proxy)
        await proxy.start()
        login, at, _ = url.netloc.rpartition("@")
        through = url._replace(netloc=f"{login}{at}127.0.0.1:{proxy.port}").geturl()
        return proxy, settings.model_copy(update={"redis_url": through})

    yield make
    for proxy in proxies:
        await proxy.close()
