"""Processes of the fleet as slots: each slot has one life after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chaos.launch import Order

from vecfleet.common.parent_death import dies_with

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "VECFLEET_LOG_FORMAT": "text",
    "VECFLEET_MAX_CPU_PERCENT": "100",
    "VECFLEET_MAX_MEMORY_PERCENT": "100",
}
END_S = 20.0
_POLL_S = 0.02


class Nursery:
    """The warm process that roles are forked from; they end with it, and it with us."""

    def __init__(
        self, lease_s: float, log: Path, settings: Mapping[str, str] | None = None
    ) -> None:
        """``lease_s`` 0: the leases of production; ``settings`` go into the environment."""
        arguments = [sys.executable, "-m", "chaos.launch", "--serve"]
        if lease_s:
            arguments += ["--lease", str(lease_s)]
        path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            **_ENVIRONMENT,
            **(settings or {}),
            "PYTHONPATH": os.pathsep.join(path),
        }
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                preexec_fn=dies_with(os.getpid(), signal.SIGKILL),
            )
        self._lock = threading.Lock()
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"the nursery did not start: {log.read_text()}")

    def _ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the nursery has died")
        return dict(json.loads(answer))

    def start(self, order: Order) -> int:
        """Fork a role; its process id."""
        wire = {name: getattr(order, name) for name in Order.__dataclass_fields__}
        return int(self._ask(do="start", **wire)["pid"])

    def signal(self, pid: int, number: int) -> None:
        """Send a signal; nothing happens to a process that has ended."""
        self._ask(do="signal", pid=pid, signal=int(number))

    def code(self, pid: int) -> int | None:
        """The exit code, None while it runs."""
        code = self._ask(do="poll", pid=pid)["code"]
        return None if code is None else int(code)

    def close(self) -> None:
        """End it, and with it all that it started."""
        self._process.kill()
        self._process.communicate()


@dataclass(slots=True)
class Slot:
    """One place of the fleet."""

    name: str
    role: str
    order: Order  # "{life}" in its arguments becomes the number of the life
    nursery: Nursery
    pid: int = 0
    life: int = 0
    crash_at: str = ""  # of this life
    is_wanted: bool = True
    is_stopped: bool = False  # by SIGSTOP
    was_killed: bool = False  # by us, in this life
    codes: list[int] = field(default_factory=list)  # of ended lives
    log_ends: list[int] = field(default_factory=list)  # where they left the log, bytes

    @property
    def worker(self) -> str:
        """The name that a worker has in Redis."""
        return f"{self.name}-{self.life}"

    def is_named(self, worker: str) -> bool:
        """Whether this life has that name in Redis; a writer's holds its process id."""
        return worker == self.worker or f"-{self.pid}-" in worker

    def start(self, crash_at: str = "", nth: int = 1, *, stops: bool = False) -> None:
        """Begin a new life, which ends (or ``stops``) at a crash point where one is named."""
        self.life += 1
        self.crash_at = crash_at
        self.is_stopped = self.was_killed = False
        arguments = tuple(a.replace("{life}", str(self.life)) for a in self.order.arguments)
        number = int(signal.SIGSTOP if stops else signal.SIGKILL)
        order = replace(
            self.order, arguments=arguments, crash_at=crash_at, nth=nth, signal_there=number
        )
        self.pid = self.nursery.start(order)

    def running(self) -> bool:
        """Whether it lives; notes its exit code when it does not."""
        if not self.pid:
            return False
        code = self.nursery.code(self.pid)
        if code is None:
            return True
        self.codes.append(code)
        log = Path(self.order.log)
        self.log_ends.append(log.stat().st_size if log.exists() else 0)
        self.pid = 0
        return False

    def log_of(self, life: int) -> str:
        """What the ended life of this number wrote; the first one is 1."""
        begin, end = [0, *self.log_ends][life - 1 : life + 1]
        log = Path(self.order.log)
        return log.read_bytes()[begin:end].decode(errors="replace") if end else ""

    def has_stopped(self) -> bool:
        """Whether it stands still, by SIGSTOP."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] == "T"

    def kill(self) -> None:
        """kill -9."""
        self.was_killed = True
        self.nursery.signal(self.pid, signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP."""
        self.is_stopped = True
        self.nursery.signal(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.is_stopped = False
        self.nursery.signal(self.pid, signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: it is to end in order."""
        self.nursery.signal(self.pid, signal.SIGTERM)

    def end(self) -> int:
        """SIGTERM, and wait; its exit code."""
        self.is_wanted = False
        if self.running():
            self.resume()
            self.terminate()
        return self.wait(END_S)

    def wait(self, deadline_s: float) -> int:
        """Wait for its end; it is killed at the deadline. Its exit code, -9 then."""
        end = time.monotonic() + deadline_s
        while self.running():
            if time.monotonic() > end:
                self.kill()
                end += END_S
            time.sleep(_POLL_S)
        return self.codes[-1] if self.codes else 0
