"""The life of a bus: made, opened, closed; and where it may be used: in one event loop of one process.

Its parts are opened side by side, so that Redis or the store may be away, and closed in a fixed order: what still
writes first, the connections last.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import weakref
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Any, Literal

from .connection.server_errors import AWAY
from .errors import BusClosed, IdentityMismatch, StoreError, StoreUnavailable, WrongLoop
from .log.routing import forget_producers
from .parts import BusParts
from .settings import Settings
from .tasks import end

logger = logging.getLogger("mnemobus")


class LifeCycle:
    """The life of one bus.

    use  is given the parts of the bus: at once, and new ones in a child process that was forked before the bus was
         opened
    """

    def __init__(self, settings: Settings, use: Callable[[BusParts], None]) -> None:
        self._settings = settings
        self._use = use
        self._state: Literal["new", "open", "closed", "forked"] = "new"
        self._loop: asyncio.AbstractEventLoop | None = None
        """That in which it was opened."""
        self._opening: list[asyncio.Task[Any]] = []
        self._closing: asyncio.Task[None] | None = None
        self._make_parts()
        _lives.add(self)

    def _make_parts(self) -> None:
        self._parts = BusParts(self._settings, self.check)
        self._use(self._parts)

    # Opening

    async def open(self) -> None:
        """See `Bus.open`."""
        if self._state == "forked":
            raise self._elsewhere()
        if self._state != "new":
            raise BusClosed("a bus is opened once; connect() gives a new one")
        self._loop = asyncio._get_running_loop()
        if self._loop is None:
            raise WrongLoop("a bus needs an event loop of asyncio (or uvloop's), and none is running here")
        parts = self._parts
        parts.shadow.loop = self._loop
        self._state = "open"
        redis, store = asyncio.create_task(self._open_redis()), asyncio.create_task(self._open_store())
        self._opening = [redis, store]
        try:
            redis_error, store_error = await asyncio.gather(redis, store)
            if redis_error is not None and store_error is not None:
                raise StoreUnavailable(
                    f"neither Redis ({parts.link.address}: {redis_error}) nor the store ({store_error}) can be reached"
                )
            for what, error in (("Redis", redis_error), ("the store", store_error)):
                if error is not None:
                    logger.warning("%s is away, going on without it: %s", what, error)
            await parts.acquaintance.start()
            if parts.outbox is not None:
                await parts.outbox.open()
        except BaseException as error:
            closed = self._closing is not None
            await self.close()
            task = asyncio.current_task()
            if closed and isinstance(error, asyncio.CancelledError) and not (task and task.cancelling()):
                raise BusClosed("the bus was closed while it was being opened") from None
            raise

    async def _open_redis(self) -> Exception | None:
        link, away = self._parts.link, None
        try:
            link.pool.give_back(await link.pool.take())
        except AWAY as error:
            away = error
        await link.start()
        await self._parts.feed.start()
        return away

    async def _open_store(self) -> Exception | None:
        try:
            await self._parts.reader.open()
        except StoreUnavailable as error:
            return error
        try:
            await self._parts.acquaintance.look()
        except StoreError as error:
            logger.debug("the identity of the store is asked for again later: %s", error)
        return None

    # Closing

    async def close(self) -> None:
        """See `Bus.close`."""
        if self._state == "forked" or (
            self._loop is not asyncio._get_running_loop()
            and self._state != "new"
            and not (self._closing is not None and self._closing.done())
        ):
            raise self._elsewhere()
        if self._closing is None:
            self._state = "closed"
            self._parts.pending.stop()
            self._parts.feed.stop()
            self._closing = asyncio.create_task(self._close(), name="mnemobus-close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        # If one of them failed or was cancelled, the other may still run, and would start what nobody ends.
        await end(self._opening)
        parts = self._parts
        async with AsyncExitStack() as steps:  # the last one first, and all of them, even if one fails
            steps.push_async_callback(parts.link.close)
            steps.push_async_callback(self._close_store)
            steps.callback(parts.local.stop)
            steps.push_async_callback(parts.feed.close)
            steps.push_async_callback(parts.acquaintance.close)
            steps.push_async_callback(parts.pending.close)
            steps.push_async_callback(forget_producers, parts.link, parts.writes.publishers)
            steps.push_async_callback(parts.shadow.close)
            if parts.outbox is not None:
                steps.push_async_callback(parts.outbox.close, self._settings.write_timeout)
            steps.push_async_callback(parts.writes.publishers.close)

    async def _close_store(self) -> None:
        with suppress(StoreError):
            await self._parts.reader.close()

    # May it be used?

    def check(self) -> None:
        """Raise if the bus may not be used, here and now: BusClosed, WrongLoop, or IdentityMismatch if its store turned
        out to be another's. Every call checks this, except a hit in L1, which needs no loop."""
        self.check_state()
        if self._parts.acquaintance.refused:
            raise IdentityMismatch(self._parts.acquaintance.refused)

    def check_state(self) -> None:
        """BusClosed unless it is open; WrongLoop in another loop or process."""
        self.check_process()
        if self._state != "open":
            raise BusClosed(f"the bus is {'closed' if self._state == 'closed' else 'not open yet'}")
        if asyncio._get_running_loop() is not self._loop:
            raise self._elsewhere()

    def check_process(self) -> None:
        """WrongLoop if it belongs to the process from which this one was forked."""
        if self._state == "forked":
            raise self._elsewhere()

    def _elsewhere(self) -> WrongLoop:
        if self._state == "forked":
            return WrongLoop(
                "the bus was opened before this process was forked, and belongs to its parent. Open a bus in each"
                " process, after the fork"
            )
        ended = self._loop is not None and self._loop.is_closed()
        return WrongLoop(
            f"the bus was opened in another event loop{', which has ended' if ended else ''}. A bus belongs to the loop"
            " in which it is opened: open one in each, or hand calls over with asyncio.run_coroutine_threadsafe()"
        )

    # The end of a process, and its children

    def forked(self) -> None:
        """Called in a child process, for the bus that it has inherited."""
        if self._state == "new":
            on_drop = self._parts.local.on_drop
            self._make_parts()  # under another id: to the log, two processes with one id would be one
            self._parts.local.on_drop = on_drop
        elif self._closing is None or not self._closing.done():
            self._state = "forked"
            self._parts.local.stop()
            # Connections, files and locks are the parent's. Whatever this process does with them would harm it, even
            # closing them when they are forgotten. So they are never forgotten.
            _keep_forever(self)

    def exiting(self) -> None:
        """Called when the interpreter ends. A bus that nobody closed ends with the process. To take it apart would be
        useless, and each of its tasks and connections would print a traceback."""
        if self._state == "open":
            _keep_forever(self)


_lives: weakref.WeakSet[LifeCycle] = weakref.WeakSet()
"""Those of all buses of this process."""


def _after_fork() -> None:
    for life in list(_lives):
        life.forked()


def _at_exit() -> None:
    for life in list(_lives):
        life.exiting()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


def _keep_forever(thing: object) -> None:
    """Have the interpreter not forget an object, nor what it refers to, even as it ends."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
