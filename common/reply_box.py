"""A client's letter box: the replies of its jobs come through one list in Redis."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, cast

import redis.asyncio
import redis.exceptions

from vecfleet.common import codec, keys, names
from vecfleet.common.errors import (
    DeadlineExceeded,
    QueueFull,
    VecfleetError,
    from_wire,
)
from vecfleet.common.logs import shown
from vecfleet.common.redis_client import translated

log = logging.getLogger(__name__)

_WAIT_S = 5
_RETRY_S = 0.5
_MOST_AT_ONCE = 256
_GRACE_S = 1.0


class ReplyBox:
    """Futures by job id, resolved by one reader of one Redis list.

    A reply is the msgpack array ``[job id, "ok" or "error", body]``.
    """

    def __init__(self, client: redis.asyncio.Redis, name: str | None = None) -> None:
        """``client`` must not be shared with calls that must not wait: the reader blocks on it."""
        self.name = name or names.new_id()
        self._redis = client
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Show that this box is alive and begin to read.

        On a full Redis it is shown once there is room, which is also when a call can be enqueued.
        """
        with contextlib.suppress(QueueFull):
            await self._say_alive()
        self._tasks = [
            asyncio.create_task(self._keep_alive(), name="reply-box-alive"),
            asyncio.create_task(self._read_forever(), name="reply-box-reader"),
        ]

    async def close(self) -> None:
        """Stop reading; whoever still waits is cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for future in self._waiting.values():
            future.cancel()  # the jobs go on; nobody here learns what became of them
        self._waiting.clear()
        with contextlib.suppress(VecfleetError), translated():
            await self._redis.delete(keys.alive(self.name), keys.reply(self.name))

    def expect(self, job_id: str) -> asyncio.Future[Any]:
        """The future of a job's reply; call it before the job is enqueued."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[job_id] = future
        return future

    def forget(self, job_id: str) -> None:
        """Stop waiting for a job."""
        self._waiting.pop(job_id, None)

    async def wait(self, job_id: str, future: asyncio.Future[Any], timeout_s: float) -> Any:
        """The reply's body; raises the error it carries, or ``DeadlineExceeded``."""
        try:
            async with asyncio.timeout(timeout_s + _GRACE_S):
                return await future
        except TimeoutError:
            raise DeadlineExceeded(
                f"no answer within {timeout_s:g} s; the queue is long or no worker runs"
            ) from None
        finally:
            self.forget(job_id)

    async def _say_alive(self) -> None:
        key = keys.alive(self.name)
        with translated():
            # A full Redis refuses to write the sign, but never to let it live longer.
            if not await self._redis.expire(key, keys.ALIVE_TTL_S):
                await self._redis.set(key, "1", ex=keys.ALIVE_TTL_S)

    async def _keep_alive(self) -> None:
        pause_s = 0.0  # what ``open`` was refused is tried at once
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self._say_alive()
                pause_s = keys.ALIVE_TTL_S / 3
            except VecfleetError as error:
                log.warning("cannot renew the reply box: %s", error)
                pause_s = _RETRY_S  # without its sign no reply reaches it

    async def _read_forever(self) -> None:
        while True:
            try:
                await self._read_once()
            except VecfleetError as error:
                log.warning("cannot read replies: %s", error)
                await asyncio.sleep(_RETRY_S)

    async def _read_once(self) -> None:
        key = keys.reply(self.name)
        with translated():
            first = cast(Any, await self._redis.blpop([key], timeout=_WAIT_S))
            if first is None:
                return
            self._deliver(first[1])
            if not self._waiting:
                return
            # LPOP's count came with Redis 6.2; it saves a round trip for each further reply.
            for raw in cast(Any, await self._redis.lpop(key, _MOST_AT_ONCE)) or ():
                self._deliver(raw)

    def _deliver(self, raw: bytes) -> None:
        try:
            job_id, status, body = codec.loads(raw)
            future = self._waiting.pop(job_id, None)
            error = None if status == "ok" else from_wire(body)
        except (VecfleetError, ValueError, TypeError, AttributeError) as fault:
            # Whoever waits for it has a deadline; the other answers must not wait for that.
            log.error("a reply that is no reply was dropped: %s", shown(fault))
            return
        if future is None or future.done():
            return
        if error is None:
            future.set_result(body)
        else:
            future.set_exception(error)
