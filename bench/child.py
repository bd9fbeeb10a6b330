"""A measuring process beside this one: takes a command as a JSON line, answers with another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from vecfleet.common.errors import EngineFailed
from vecfleet.fleet.process import dies_with_parent

_LINE_BYTES = 1 << 20
Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class Child:
    """The parent's end."""

    def __init__(self, module: str, log: Path, *arguments: str) -> None:
        """``module`` of this package is run with ``arguments``; what it says goes to ``log``."""
        self._command = [sys.executable, "-m", f"vecfleet.bench.{module}", *arguments]
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    async def __aenter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=_LINE_BYTES,
                process_group=0,
                preexec_fn=dies_with_parent(signal.SIGKILL),
            )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with what it has started itself
        await self._process.wait()

    async def finish(self, patience_s: float) -> None:
        """Let it end in order, as engines with processes of their own should."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._process.wait()

    async def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """Carry out a command and wait for what comes of it; raises ``EngineFailed``."""
        self.tell(do, **options)
        return await self.answer()

    def tell(self, do: str, **options: Any) -> None:
        """Send a command; its answer is read by ``answer``."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **options}).encode() + b"\n")

    async def answer(self) -> dict[str, Any]:
        """The next answer."""
        assert self._process is not None and self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(errors="replace")[-1500:]
            raise EngineFailed(f"{self._command[2]} ended:\n{tail}")
        told: dict[str, Any] = json.loads(line)
        return told


def answers_apart() -> TextIO:
    """A stream for the answers alone: whatever else is printed here goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


async def serve(
    handlers: Mapping[str, Handler],
    on_stop: Callable[[], None] | None = None,
    answers: TextIO | None = None,
) -> None:
    """The child's end: carry out the commands of stdin until it closes.

    The command "stop" has no answer: it reaches ``on_stop`` while another command runs. Answers go
    to ``answers``, standard output by default.
    """
    loop = asyncio.get_running_loop()
    commands: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def read() -> None:
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "stop" and on_stop is not None:
                loop.call_soon_threadsafe(on_stop)
            else:
                loop.call_soon_threadsafe(commands.put_nowait, command)
        loop.call_soon_threadsafe(commands.put_nowait, None)

    reader = loop.run_in_executor(None, read)
    while (command := await commands.get()) is not None:
        answer = await handlers[command.pop("do")](command)
        print(json.dumps(answer), flush=True, file=answers)
    await reader
