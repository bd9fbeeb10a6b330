"""A TCP proxy between the fleet and Redis that drops, delays and cuts connections."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

_PIECE_BYTES = 1 << 16


class Proxy:
    """Listens on a loopback port, in a thread of its own; faults may be set from any thread.

    Each chance is of one piece of bytes on its way, drawn from a generator of its own seed.
    """

    def __init__(self, target_port: int, seed: int) -> None:
        self._target_port = target_port
        self._chance = random.Random(f"proxy/{seed}")
        self._loop = asyncio.new_event_loop()
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._delay_s = 0.0
        self._cut_chance = 0.0  # of a request, before Redis sees it
        self._lose_chance = 0.0  # of a reply: Redis has done it, and nobody is told
        self._refuses = False
        self._server = self._call(self._listen())
        self.port = int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Cut everything and stop listening."""
        self._call(self._shut())
        self._do(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def cut(self) -> None:
        """Cut all connections at once."""
        self._do(lambda: [_reset(*pair) for pair in list(self._pairs)])

    @contextlib.contextmanager
    def shut(self) -> Iterator[None]:
        """Nobody comes through meanwhile; whatever else it did is over afterwards."""
        self.disturb(refuse=True)
        self.cut()
        try:
            yield
        finally:
            self.heal()

    def heal(self) -> None:
        """No faults any more."""
        self.disturb()

    def disturb(
        self,
        *,
        delay_s: float = 0.0,
        cut: float = 0.0,
        lose: float = 0.0,
        refuse: bool = False,
        stall: bool = False,
    ) -> None:
        """Delay each piece, cut before or after Redis, refuse new connections, or hold all."""

        def change() -> None:
            self._delay_s, self._cut_chance, self._lose_chance = delay_s, cut, lose
            self._refuses = refuse
            if stall:
                self._flowing.clear()
            else:
                self._flowing.set()

        self._do(change)

    def _do(self, change: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(change)

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, "127.0.0.1", 0)

    async def _shut(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            writer.transport.abort()
            return
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, up_writer)
        self._pairs.add(pair)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, up_writer, pair, is_reply=False))
                group.create_task(self._pump(up_reader, writer, pair, is_reply=True))
        except* OSError:
            pass
        except* asyncio.CancelledError:
            pass  # the end: asyncio's streams would complain
        finally:
            self._pairs.discard(pair)
            _reset(*pair)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        *,
        is_reply: bool,
    ) -> None:
        while piece := await reader.read(_PIECE_BYTES):
            await self._flowing.wait()
            if self._delay_s:
                await asyncio.sleep(self._delay_s * self._chance.random())
            chance = self._lose_chance if is_reply else self._cut_chance
            if chance and self._chance.random() < chance:
                break
            writer.write(piece)
            await writer.drain()
        _reset(*pair)


def _reset(*writers: asyncio.StreamWriter) -> None:
    """Close without a word, as a network that fails does."""
    for writer in writers:
        with contextlib.suppress(OSError, AttributeError):
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
