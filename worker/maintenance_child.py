"""The parent's end of a maintenance process: started when needed, asked without waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import IO

from vecfleet.common.errors import JobFailed
from vecfleet.worker.maintenance import Result, Task

_READ_BYTES = 1 << 16
_KEPT_ERROR_BYTES = 2000


class MaintenanceChild:
    """One child process that does one task at a time; it ends with this process."""

    def __init__(self, nice: int | None) -> None:
        """``nice`` is how far the child stands back, 0 to 19; None: only idle cores are its."""
        self._nice = nice
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._received = b""
        self._idle_since = 0.0
        self.busy = False

    @property
    def pid(self) -> int | None:
        """The process id, while there is a process."""
        return self._process.pid if self._process else None

    def submit(self, task: Task) -> None:
        """Start ``task``; the child must not be busy."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        self._received = b""
        self.busy = True
        try:
            self._process.stdin.write(task.to_json().encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # poll() tells

    def poll(self) -> Result | None:
        """The result of the task, or None while it runs; a child that died gives an error."""
        if not self.busy or self._process is None or self._process.stdout is None:
            return None
        ended = self._process.poll() is not None
        while True:
            try:
                piece = os.read(self._process.stdout.fileno(), _READ_BYTES)
            except BlockingIOError:
                break
            if not piece:
                break
            self._received += piece
        if self._received.endswith(b"\n"):
            self.busy = False
            self._idle_since = time.monotonic()
            return Result.from_json(self._received.decode())
        if ended:
            message = f"the maintenance process ended with {self._process.returncode}"
            error = JobFailed(f"{message}: {self._last_words()}")
            self.close()
            return Result(error=error.to_wire())
        return None

    def rest(self, after_s: float) -> None:
        """End the process when it has had nothing to do for so long."""
        idle_s = time.monotonic() - self._idle_since
        if self._process is not None and not self.busy and idle_s > after_s:
            self.close()

    def close(self) -> None:
        """End the child, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        continue
        if self._errors is not None:
            self._errors.close()
        self._process = self._errors = None
        self.busy = False

    def _start(self) -> None:
        self.close()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vecfleet.worker.maintenance", str(self._nice)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            process_group=0,  # Ctrl-C is for the parent, which then closes stdin
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - _KEPT_ERROR_BYTES))
        return self._errors.read().decode(errors="replace").strip()
